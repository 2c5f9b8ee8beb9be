"""A replay that was stopped goes on at its next batch: what it had gathered lies beside the results.

One file a hook, ``core/.replay-<hook>.npz``, written every minute and when the call is interrupted, removed once
every SAE's result is there. It is used if the text, the batches and the settings are the same and all SAEs asked
for were in it; the figures are then, bit for bit, those of a call that was never stopped.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tcsae.evaluate.core_replay import Replay
from tcsae.store.atomic import partial_file

SECONDS_BETWEEN = 60.0
"""Between two checkpoints: their megabytes are nothing beside the batches of a minute."""


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
        if not self._path.is_file():
            return
        try:
            # opened here, since numpy leaves the file open if it is no archive
            with self._path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                prints = json.loads(str(file["prints"]))
                if not set(self._prints) <= set(prints):
                    return
                state = {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            # damaged, or of another version: nothing is lost but the time
            return
        replay.restore(state, [prints.index(one) for one in self._prints])

    def save_if_due(self, replay: Replay) -> None:
        """Write the state if the last time is long ago."""
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN:
            self.save(replay)

    def save(self, replay: Replay) -> None:
        """Write the state now."""
        with partial_file(self._path) as beside, beside.open("wb") as file:
            np.savez(
                file, allow_pickle=False, **{"prints": np.array(json.dumps(self._prints)), **replay.state()}
            )
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        """Forget the state: every result is written."""
        self._path.unlink(missing_ok=True)
