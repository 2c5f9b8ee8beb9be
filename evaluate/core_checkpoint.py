"""A replay that was stopped goes on at its next batch: what it had gathered lies beside the results.

One file a hook, ``core/.replay-<hook>.safetensors``, written every minute and when the call is interrupted, removed by
a call that has every one of its SAEs' results (`remove_states`). It is used if the text, the batches and the settings
are the same and all SAEs asked for were in it; the figures are then, bit for bit, those of a call never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcsae.evaluate.core_replay import Replay
from tcsae.evaluate.saved_arrays import arrays_from_bytes, bytes_of_arrays
from tcsae.store.atomic import write_atomically

SECONDS_BETWEEN = 60.0
"""Between two checkpoints: their megabytes are nothing beside the batches of a minute."""

NAME = ".replay-{}.safetensors"
"""Name of the file of a hook, beside the results"""

FORMAT = 1
"""Of the state: which arrays it has and what is in them. To be raised with them."""


class ReplayCheckpoint:
    """Where a replay's state is kept.

    Parameters
    ----------
    path
        the file
    prints
        fingerprints of the SAEs, in the replay's order; each covers the text and the settings too
    """

    def __init__(self, path: Path, prints: Sequence[str]) -> None:
        self._path = path
        self._prints = list(prints)
        self._saved_at = time.monotonic()

    def load(self, replay: Replay) -> None:
        """Let ``replay`` go on from the file, if there is one that fits; else it begins at the first batch."""
        found = _read(self._path) if self._path.is_file() else None
        if found is not None and set(self._prints) <= set(found.prints):
            replay.restore(found.state, [found.prints.index(one) for one in self._prints])

    def save_if_due(self, replay: Replay) -> None:
        """Write the state if the last time is long ago."""
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN:
            self.save(replay)

    def save(self, replay: Replay) -> None:
        """Write the state now."""
        text = json.dumps({"format": FORMAT, "prints": self._prints})
        write_atomically(self._path, bytes_of_arrays(replay.state(), text))
        self._saved_at = time.monotonic()


def remove_states(folder: Path, finished: Collection[str]) -> None:
    """Remove from ``folder`` the states of replays all of whose SAEs have results, given by their fingerprints.

    A state that cannot be read is of no use to anyone and goes as well.
    """
    for path in sorted(folder.glob(NAME.format("*"))):
        found = _read(path)
        if found is None or set(found.prints) <= set(finished):
            path.unlink(missing_ok=True)


class _Saved(NamedTuple):
    state: dict[str, np.ndarray]
    prints: list[str]


def _read(path: Path) -> _Saved | None:
    """None where it is damaged, or of an older version: nothing is lost but the time."""
    try:
        state, text = arrays_from_bytes(path.read_bytes())
        saved = json.loads(text)
        return _Saved(state, saved["prints"]) if saved["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
