"""Reading a whole store to see whether it is what it says."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tcsae.store.chunks import CHECKSUM_BYTES, chunk_path, map_raw, read_chunk
from tcsae.store.errors import ConfigError, StoreError
from tcsae.store.index import digest_problems, read_layout, refuse_link
from tcsae.store.interrupt import interruptible
from tcsae.store.layout import Layout
from tcsae.store.metadata import DIGESTED, ROOT, read_root, recorded_digests, store_id
from tcsae.store.parallel import Pool, task_pool
from tcsae.store.progress import progress
from tcsae.store.remote import is_url, local_path
from tcsae.store.spec import CHECKSUMS, HookStatistics, Provenance, split_of
from tcsae.store.statistics import (
    ChunkRows,
    NormCounts,
    chunk_rows,
    count_norms,
    quantiles_of,
    train_statistics,
)
from tcsae.store.truth import truth_problems

STATISTICS_TOLERANCE = 1e-9
"""Largest relative difference between the attributes' statistics and recomputed ones; both are float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What a verification found."""

    path: str
    """folder of the store"""
    chunks: int
    """chunk files read, all hooks together"""
    rows: int
    """rows of the store"""
    problems: tuple[str, ...]
    """one line each, naming the file; empty: the store is what it says"""

    @property
    def is_good(self) -> bool:
        """whether nothing was found"""
        return not self.problems


class _ChunkTask(NamedTuple):
    store: Path
    hook: str
    chunk: int
    checksum: int
    """that the store's table has for it"""
    rows: ChunkRows | None
    """which rows count; None where the tables are too damaged to tell, and the file alone is looked at"""

    def __str__(self) -> str:
        return str(chunk_path(self.store, self.hook, self.chunk))


class _Look(NamedTuple):
    problems: list[str]
    """of a chunk"""
    norms: NormCounts | None
    """of its rows of the train split; None if it has problems"""


def verify(path: str | Path, *, workers: int = 1, scheduler: str | None = None) -> Verification:
    """Read every byte of the store at ``path`` and compare it with what the store says about itself.

    Checked are links, of which there may be none; the group's attributes and every array's metadata; the tables'
    SHA-256; the offsets; the range of token ids; the documents' table (types, unique ids, token counts, splits);
    every chunk's size, CRC-32C, place, padding and NaN or infinite values; the statistics in the attributes,
    recomputed; the known dictionary, where there is one. All problems are collected, none is raised, but for a
    folder that is no store at all. Where the tables are too damaged to say which row is where, every chunk file is
    still compared with its checksum.

    Parameters
    ----------
    path
        folder of the store
    workers, scheduler
        where chunks are read, as `tcsae.store.parallel.task_pool` takes them

    Raises
    ------
    StoreNotFound
        there is no store at ``path``
    ConfigError
        ``path`` is a URL, or no worker or scheduler can be had
    Interrupted
        Ctrl-C or SIGTERM
    """
    if is_url(path):
        raise ConfigError(
            f"{path}: a store is verified on this machine; copy it here first with `tcsae store copy`, which checks "
            "every file on the way"
        )
    path = local_path(path).absolute()  # a scheduler's workers may have been started in another folder
    with (
        interruptible(f"{path}: interrupted; nothing was changed, run the same command again"),
        task_pool(workers=workers, scheduler=scheduler) as pool,
    ):
        return _verify(path, pool)


def _verify(path: Path, pool: Pool) -> Verification:
    attributes = read_root(path)
    try:
        made = Provenance.from_dict(attributes, str(path / ROOT))
    except StoreError as error:
        return Verification(path=str(path), chunks=0, rows=0, problems=(str(error),))
    problems = [] if attributes.get("complete") else [f"{path}: the harvest has not finished"]
    problems += _link_problems(path)
    layout = None
    try:
        digests = recorded_digests(attributes, str(path / ROOT))
        problems += digest_problems(path, digests, DIGESTED)
        layout = read_layout(path, check_digests=False)  # a wrong one does not hide what else is wrong
    except StoreError as error:
        problems.append(str(error))
    else:
        problems += truth_problems(path, made)
        problems += _table_problems(path, made, layout)
    tables = {}
    for hook in made.hooks:
        try:
            tables[hook] = _checksums(path, made, hook, layout)
        except StoreError as error:
            problems.append(str(error))
    if layout is not None and len(tables) == len(made.hooks):
        identity = store_id(made, layout.tokens, tables.values())
        if identity != attributes.get("id"):
            problems.append(f"{path / ROOT}: id does not fit the attributes, tokens and checksums")
    n_chunks = sum(map(len, tables.values()))
    with progress(n_chunks * (1 if layout is None else 2), "chunk", f"verify {path.name}") as bar:
        for hook, table in tables.items():
            problems += _hook_problems(path, made, layout, hook, table, attributes, pool, bar.update)
    n_rows = 0 if layout is None else layout.n_rows
    return Verification(path=str(path), chunks=n_chunks, rows=n_rows, problems=tuple(sorted(set(problems))))


def _checksums(path: Path, made: Provenance, hook: str, layout: Layout | None) -> npt.NDArray[np.uint32]:
    """The store's table of a hook's checksums, which has as many entries as there are chunks."""
    file = path / CHECKSUMS / hook / "c" / "0"
    refuse_link(path, file)
    expected = None
    if layout is not None:
        expected = 4 * -(-layout.n_rows // made.rows_per_chunk) + CHECKSUM_BYTES
    body, _ = map_raw(file, expected)
    return body[: body.size // 4 * 4].view("<u4")


def _hook_problems(
    path: Path,
    made: Provenance,
    layout: Layout | None,
    hook: str,
    table: npt.NDArray[np.uint32],
    attributes: dict[str, Any],
    pool: Pool,
    on_chunk: Callable[[], Any],
) -> list[str]:
    """What is wrong with a hook's chunks, all of which are read, and, if nothing is, with its statistics."""
    chunks = None if layout is None else chunk_rows(path, made, layout, hook)
    tasks = [
        _ChunkTask(path, hook, chunk, checksum, None if chunks is None else chunks[chunk])
        for chunk, checksum in enumerate(table.tolist())
    ]
    problems: list[str] = []

    def norms() -> Iterator[NormCounts]:
        for found in pool.map_in_order(look, tasks):
            problems.extend(found.problems)
            on_chunk()
            if found.norms is not None:
                yield found.norms

    quantiles = quantiles_of(norms())
    if chunks is None or problems:
        return problems
    known = train_statistics(chunks, quantiles, made.d_model, pool=pool, on_chunk=on_chunk)
    return list(_statistics_problems(path, made, hook, attributes, known))


def look(task: _ChunkTask) -> _Look:
    """What is wrong with one chunk file, and the norms of its rows; reads it once."""
    path = chunk_path(task.store, task.hook, task.chunk)
    try:
        refuse_link(task.store, path)
        if task.rows is None:
            map_raw(path, None, checksum=task.checksum)
            return _Look([], None)
        made = task.rows.made
        rows = read_chunk(task.store, made, task.hook, task.chunk, checksum=task.checksum)
    except StoreError as error:
        return _Look([str(error)], None)
    problems = []
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        problems.append(f"{path}: {int((~finite).sum())} rows hold NaN or infinite values")
    # decoded zeros are zeros again but where a mean is added to them
    if made.codec != "uniform" and rows[len(task.rows.is_train) :].any():
        problems.append(f"{path}: the padding after the last row is not zero")
    return _Look(problems, None if problems else count_norms(rows, task.rows.is_train))


def _link_problems(path: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(path):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            if entry.is_symlink():
                yield f"{entry}: is a link out of its place; a store has plain files only"


def _table_problems(path: Path, made: Provenance, layout: Layout) -> Iterator[str]:
    low, high = int(layout.tokens.min()), int(layout.tokens.max())
    if low < 0 or high >= made.vocab_size:
        yield f"{path}: tokens run from {low} to {high}; the vocabulary has {made.vocab_size}"
    longest = int(np.diff(layout.context_offsets).max())
    room = made.context_length - (made.bos_token_id is not None)
    if longest > room:
        yield f"{path}: a context has {longest} rows; context_length {made.context_length} leaves room for {room}"
    documents = layout.documents
    ids = documents["id"].to_pylist()
    repeated = [name for name, n in Counter(ids).items() if n > 1]
    if repeated:
        yield f"{path}: documents.parquet: id {repeated[0]!r} occurs more than once"
    wrong = np.flatnonzero(np.array(documents["n_tokens"].to_pylist()) != np.diff(layout.document_offsets))
    if wrong.size:
        yield f"{path}: documents.parquet: n_tokens of {ids[int(wrong[0])]!r} does not fit document_offsets"
    for name, split in zip(ids, documents["split"].to_pylist(), strict=True):
        if split != split_of(name):
            yield f"{path}: documents.parquet: split of {name!r}: expected {split_of(name)}, got {split}"
            return


def _statistics_problems(
    path: Path, made: Provenance, hook: str, attributes: dict[str, Any], found: HookStatistics
) -> Iterator[str]:
    """What the attributes say that ``found``, computed from the rows, does not."""
    where = f"{path / ROOT}: statistics of {hook}"
    try:
        claimed = HookStatistics.from_attributes(attributes, hook, made.d_model, str(path / ROOT))
    except StoreError as error:
        yield str(error)
        return
    same = np.allclose(claimed.mean, found.mean, rtol=STATISTICS_TOLERANCE, atol=1e-12)
    for name, one, other in (
        ("mean_square_norm", claimed.mean_square_norm, found.mean_square_norm),
        ("outlier_norm", claimed.outlier_norm, found.outlier_norm),
        ("n_outliers", claimed.n_outliers, found.n_outliers),
        ("n_rows", claimed.n_rows, found.n_rows),
        *((f"norm quantile {q}", claimed.norm_quantiles[q], v) for q, v in found.norm_quantiles.items()),
    ):
        if not np.isclose(one, other, rtol=STATISTICS_TOLERANCE):
            yield f"{where}: {name}: {one} in the attributes, {other} from the rows"
    if not same:
        yield f"{where}: mean: differs from the rows'"
