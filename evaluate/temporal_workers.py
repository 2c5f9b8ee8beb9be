"""Parts of a temporal pass as tasks for other processes.

What a task needs, the encoder and the thirds, lies in a file that the workers read once each. A part's counts are
sparse and are sent as such; they are added in the order of the parts, so the result is that of a single process.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tcsae.evaluate.config import EvaluatedSplit
from tcsae.evaluate.heldout import HeldOut, Indices
from tcsae.evaluate.information import Thirds
from tcsae.evaluate.temporal_encoders import Encoder
from tcsae.evaluate.temporal_pass import (
    Advance,
    accumulate,
    calibrated,
    codes_of,
    is_short,
    nothing_counted,
    parts_of_text,
    units_of,
    untold,
)
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.store.errors import ConfigError
from tcsae.store.kept import Kept
from tcsae.store.parallel import map_tasks
from tcsae.store.reader import ActivationStore
from tcsae.store.remote import is_url

SHARED = ".temporal-pass-"
"""How the file's name begins that the workers read."""


@dataclass(frozen=True, slots=True)
class PartTask:
    """One part to be counted."""

    shared: Path
    """file with the encoder and the thirds, absolute; of this pass alone"""
    store: str
    """absolute folder, or URL: a worker may run in another folder"""
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
    """What a worker needs for every part of one pass."""

    encoder: Encoder
    thirds: Thirds
    held_out: HeldOut
    parts: list[list[Indices]]
    units: Int64[Tensor, " document"]


_kept = Kept[_Ready]()


def count_part(task: PartTask) -> PartSums:
    """Count one part in this process.

    Raises
    ------
    ConfigError
        the encoder's file cannot be seen from here
    Interrupted
        the pass is over
    """
    run = str(task.shared)
    with _kept.of(run, partial(_prepared, task)) as ready:
        encoder, held_out = ready.encoder, ready.held_out
        sums = nothing_counted(held_out, ready.units, encoder.d_sae)
        blocks = (held_out.block(contexts) for contexts in _until_over(run, ready.parts[task.number]))
        codes = (codes_of(encoder, block) for block in blocks)
        accumulate(sums, codes, ready.thirds, ready.units, encoder.block_size, [task.seed, task.number])
    return PartSums.of(sums)


def _until_over(run: str, blocks: Iterable[Indices]) -> Iterator[Indices]:
    for contexts in blocks:
        _kept.check(run)
        yield contexts


def _prepared(task: PartTask) -> _Ready:
    if not task.shared.is_file():
        raise ConfigError(
            f"scheduler: expected workers that see the same files, got one on {socket.gethostname()} that does not "
            f"find {task.shared}; use an evaluation folder and a store that all machines share"
        )
    # written by `temporal_sums_on_workers` of the evaluation that sent the task, perhaps on a machine with other GPUs
    where = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, thirds = torch.load(task.shared, map_location=where, weights_only=False)
    held_out = HeldOut(ActivationStore.open(task.store), task.hook, task.split)
    units = units_of(held_out, encoder.d_sae)
    return _Ready(encoder, thirds, held_out, parts_of_text(held_out), units)


def release(shared: Path) -> None:
    """Drop what `count_part` has kept of the pass with that file, at the latest after the block that it is at."""
    _kept.end(str(shared))


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
    total = nothing_counted(held_out, units, encoder.d_sae)
    url = held_out.store.url
    store = url if is_url(url) else str(Path(url).absolute())
    with _shared(folder, encoder, thirds) as shared:
        tasks = [
            PartTask(shared, store, held_out.hook, held_out.split, seed, number)
            for number in range(len(parts))
        ]
        waiting: dict[int, PartSums] = {}
        following = 0
        found = map_tasks(
            count_part, tasks, workers=workers, scheduler=scheduler, release=partial(release, shared)
        )
        with closing(found):
            for task, result in found:
                waiting[task.number] = result
                while following in waiting:
                    total.add(waiting.pop(following).unpacked(total.n_units, total.cells))
                    following += 1
                advance(int(sum(held_out.length[contexts].sum() for contexts in parts[task.number])))
    return total


@contextmanager
def _shared(folder: Path, encoder: Encoder, thirds: Thirds) -> Iterator[Path]:
    """What all tasks need in one file, for the block.

    Its name is new each time: a worker that outlived a killed evaluation must not take another encoder for this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{SHARED}*"):  # by an evaluation that was killed; only one at a time writes here
        left.unlink()
    path = (folder / f"{SHARED}{uuid.uuid4().hex}.pt").absolute()
    torch.save((encoder, thirds), path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
