"""One finished topic of an SAE that is not finished, kept so that an interrupted call goes on after it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tcsae.evaluate.saved_arrays import arrays_from_bytes, bytes_of_arrays
from tcsae.evaluate.unlearning.clamp import Setting
from tcsae.evaluate.unlearning.score import TopicSums
from tcsae.store.atomic import write_atomically
from tcsae.store.errors import RunError

ARRAYS = ("is_forget", "n", "loss", "hits", "rise", "hits_with")


class Parts:
    """A folder of finished topics of one SAE.

    Parameters
    ----------
    folder
        created at the first `write`
    fingerprint
        of the SAE's result; what was written under another is not read
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    def _path(self, topic: str) -> Path:
        # a topic may hold any character
        digest = hashlib.sha256(f"{self._fingerprint} {topic}".encode()).hexdigest()
        return self._folder / f"{digest[:16]}.safetensors"

    def read(self, topic: str) -> TopicSums | None:
        """The finished topic, None if there is none; `RunError` if its file is damaged."""
        path = self._path(topic)
        if not path.is_file():
            return None
        try:
            kept, text = arrays_from_bytes(path.read_bytes())
            settings = [
                Setting(**(fields | {"features": tuple(fields["features"])})) for fields in json.loads(text)
            ]
            arrays: dict[str, Any] = {name: kept[name] for name in ARRAYS}
            return TopicSums(settings=tuple(settings), **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: not what tcsae wrote ({error!r}); delete it to measure again") from error

    def write(self, topic: str, sums: TopicSums) -> None:
        """Keep a finished topic, whole or not at all."""
        settings = json.dumps([asdict(setting) for setting in sums.settings])
        arrays = {name: getattr(sums, name) for name in ARRAYS}
        write_atomically(self._path(topic), bytes_of_arrays(arrays, settings))

    def delete(self) -> None:
        """Remove the folder: the SAE's own result is written."""
        shutil.rmtree(self._folder, ignore_errors=True)
