"""Parts of a temporal pass as tasks for other processes.

What a task needs, the encoder and the thirds, lies in a file that the workers read once each. A part's counts are
sparse and are sent as such; they are added in the order of the parts, so the result is that of a single process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tcsae.evaluate.config import EvaluatedSplit
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.information import Thirds
from tcsae.evaluate.temporal_codes import LAGS
from tcsae.evaluate.temporal_pass import (
    Advance,
    Encoder,
    accumulate,
    calibrated,
    codes_of,
    is_short,
    parts_of_text,
    units_of,
    untold,
)
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.store.parallel import map_tasks
from tcsae.store.reader import ActivationStore


@dataclass(frozen=True, slots=True)
class PartTask:
    """One part to be counted."""

    shared: Path
    """file with the encoder and the thirds, absolute"""
    store: str
    """folder or URL"""
    hook: str
    split: EvaluatedSplit
    seed: int
    """of the permutations"""
    number: int
    """of the part"""

    def __str__(self) -> str:
        return f"{self.store}: part {self.number} of the temporal pass"


@dataclass(frozen=True, slots=True)
class PartSums:
    """The `TemporalSums` of one part, of its own units alone, its counts of pairs as the places that are not 0."""

    lags: tuple[int, ...]
    units: np.ndarray
    """numbers of the part's units"""
    n: np.ndarray
    n_pairs: np.ndarray
    values: np.ndarray
    published: np.ndarray
    places: np.ndarray
    """of the counts in ``cells`` of all units, flattened"""
    counts: np.ndarray

    @classmethod
    def of(cls, sums: TemporalSums) -> PartSums:
        """``sums`` for sending."""
        units = np.flatnonzero(sums.n)
        cells = sums.cells.reshape(-1)
        places = np.flatnonzero(cells)
        return cls(
            lags=sums.lags,
            units=units,
            n=sums.n[units],
            n_pairs=sums.n_pairs[units],
            values=sums.values[units],
            published=sums.published[units],
            places=places,
            counts=cells[places],
        )

    def unpacked(self, n_units: int, cells: np.ndarray) -> TemporalSums:
        """The sums; the counts of pairs are added to ``cells``."""
        flat = cells.reshape(-1)
        flat[self.places] += self.counts
        whole = TemporalSums.zeros(n_units, self.values.shape[2], self.lags, cells)
        for mine, theirs in (
            (whole.n, self.n),
            (whole.n_pairs, self.n_pairs),
            (whole.values, self.values),
            (whole.published, self.published),
        ):
            mine[self.units] = theirs
        return whole


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    shared: Path
    encoder: Encoder
    thirds: Thirds
    held_out: HeldOut


_one_at_a_time = threading.Lock()

_ready: list[_Ready] = []
"""What this process has loaded: nothing, or one encoder with its documents."""


def count_part(task: PartTask) -> PartSums:
    """Count one part in this process."""
    with _one_at_a_time:
        if not (_ready and _ready[0].shared == task.shared):
            _ready.clear()
            # written by `temporal_sums_on_workers` of the evaluation that sent the task
            encoder, thirds = torch.load(task.shared, weights_only=False)
            held_out = HeldOut(ActivationStore.open(task.store), task.hook, task.split)
            _ready.append(_Ready(task.shared, encoder, thirds, held_out))
        ready = _ready[0]
        encoder, held_out = ready.encoder, ready.held_out
        units = units_of(held_out, encoder.d_sae)
        sums = TemporalSums.zeros(int(units.max()) + 1, encoder.d_sae, LAGS)
        blocks = parts_of_text(held_out)[task.number]
        codes = (codes_of(encoder, held_out.block(contexts)) for contexts in blocks)
        accumulate(sums, codes, ready.thirds, units, encoder.block_size, [task.seed, task.number])
    return PartSums.of(sums)


def release() -> None:
    """Drop what `count_part` has kept."""
    with _one_at_a_time:
        _ready.clear()


def temporal_sums_on_workers(
    encoder: Encoder,
    held_out: HeldOut,
    folder: Path,
    *,
    seed: int,
    workers: int,
    scheduler: str | None,
    advance: Advance,
) -> TemporalSums:
    """What `temporal_sums` gives, bit by bit, counted by Dask workers.

    Parameters
    ----------
    encoder, held_out, seed, advance
        as there
    folder
        that the workers see too; a file lies in it while they work
    workers, scheduler
        as in `tcsae.store.parallel.map_tasks`
    """
    thirds, _ = calibrated(encoder, held_out, untold if is_short(held_out) else advance)
    parts = parts_of_text(held_out)
    units = units_of(held_out, encoder.d_sae)
    n_units = int(units.max()) + 1
    total = TemporalSums.zeros(n_units, encoder.d_sae, LAGS)
    with _shared(folder, encoder, thirds) as shared:
        tasks = [
            PartTask(shared, str(held_out.store.url), held_out.hook, held_out.split, seed, number)
            for number in range(len(parts))
        ]
        waiting: dict[int, PartSums] = {}
        following = 0
        found = map_tasks(count_part, tasks, workers=workers, scheduler=scheduler, release=release)
        for task, result in found:
            waiting[task.number] = result
            while following in waiting:
                total.add(waiting.pop(following).unpacked(n_units, total.cells))
                following += 1
            advance(int(sum(held_out.length[contexts].sum() for contexts in parts[task.number])))
    return total


@contextmanager
def _shared(folder: Path, encoder: Encoder, thirds: Thirds) -> Iterator[Path]:
    """What all tasks need in one file, for the block."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / ".temporal-pass.pt").resolve()
    torch.save((encoder, thirds), path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
