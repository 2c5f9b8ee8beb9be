"""A part of a store, or a store with another codec, written as a store of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store.cache import CACHE_VARIABLE, cache_folder
from tcsae.store.chunks import codec_of
from tcsae.store.codecs import fit, measured_ratio, relative_error
from tcsae.store.errors import DiskFull
from tcsae.store.layout import Layout
from tcsae.store.metadata import ROOT, read_root
from tcsae.store.places import Place
from tcsae.store.progress import progress
from tcsae.store.reader import ActivationStore
from tcsae.store.selection import Part, document_range, layout_of
from tcsae.store.space import folder_bytes, free_bytes, store_bytes
from tcsae.store.spec import Provenance
from tcsae.store.writer import StoreWriter

SAMPLE_ROWS = 32_768
"""rows that a codec is fitted to and measured on, from pieces spread over the store"""

SAMPLE_PIECES = 16

log = logging.getLogger(__name__)


class Recoding(NamedTuple):
    """A store to be written, known before its first row is."""

    source: ActivationStore
    """where the rows come from"""
    begin: int
    """row of the source that becomes row 0"""
    layout: Layout
    """of the new store"""
    made: Provenance
    """of the new store"""


def plan_recoding(source: ActivationStore, part: Part | None, codec: str) -> Recoding:
    """Plan the store that ``part`` (None: all) of ``source`` makes with ``codec``.

    A codec is fitted to a sample; its size and error on it are logged. Raises `ConfigError` if the part is empty.
    """
    first, last = document_range(source, part)
    hooks = source.hooks if part is None else part.hooks
    return Recoding(
        source,
        int(source.document_offsets[first]),
        layout_of(source, first, last),
        _provenance_of(source, hooks, codec, (first, last)),
    )


def write_recoded(plan: Recoding, path: Path, *, resume: bool, advice: str = "") -> None:
    """Write the planned store to the folder ``path``; with ``resume``, what is missing or damaged of it.

    ``advice`` is what to do, besides freeing space, if it does not fit. Raises as `StoreWriter` does, and
    `DiskFull` with the numbers before the first byte if there is too little space.
    """
    going_on = resume and (path / ROOT).exists()
    in_all = store_bytes(plan.made, plan.layout)
    if not (going_on and read_root(path).get("complete")):
        _check_space(plan, path, in_all - folder_bytes(path)[0], advice)
    opened = (
        StoreWriter.resume(path, plan.made)
        if going_on
        else StoreWriter.create(path, plan.layout, plan.made, truth=plan.source.truth())
    )
    with opened as writer:
        # chunks whose root group is not complete have no table to be compared with: each must be whole by itself
        missing = writer.missing()
        if writer.complete:
            if not missing:
                return
            _check_space(plan, path, in_all * len(missing) // writer.n_chunks, advice)
        with progress(writer.n_chunks, "chunk", f"write {path.name}", writer.n_chunks - len(missing)) as bar:
            for chunk in missing:
                start, stop = (plan.begin + row for row in writer.rows_of(chunk))
                for hook in plan.made.hooks:
                    writer.write(hook, chunk, plan.source.rows(start, stop, hook))
                bar.update()
        writer.finish()


def _check_space(plan: Recoding, path: Path, needed: int, advice: str) -> None:
    if needed > free_bytes(path):
        raise DiskFull(
            f"{path}: expected {needed:,} bytes free for {plan.layout.n_rows:,} rows of {len(plan.made.hooks)} "
            f"hooks as {plan.made.codec}, got {free_bytes(path):,}; free some space{advice}, or copy fewer documents"
        )


@contextmanager
def staged(plan: Recoding, dst: Place) -> Iterator[Path]:
    """The planned store in a folder of the cache, on its way to ``dst``; removed once the block is through.

    If the block raises, it stays, and the next call for the same copy takes it up.
    """
    name = f"{plan.source.url} {plan.source.id} {plan.made.to_dict()} {dst}"
    staging = cache_folder() / "staging" / hashlib.sha256(name.encode()).hexdigest()[:24]
    advice = f" or set {CACHE_VARIABLE} to a folder on a larger disk (the copy is put together here before it is sent)"
    write_recoded(plan, staging, resume=True, advice=advice)
    yield staging
    shutil.rmtree(staging)


def _provenance_of(
    store: ActivationStore, hooks: tuple[str, ...], codec: str, documents: tuple[int, int]
) -> Provenance:
    """Settings of the copy; a codec is fitted to a sample and its size and error on it are logged."""
    old = store.provenance
    fitted = {}
    effect = {}
    for hook in hooks:
        if codec == "raw":
            continue
        if codec == old.codec:  # rows that were decoded are encoded again as what they came from
            fitted[hook] = old.codec_configuration.get(hook, {})
            if hook in old.codec_effect:
                effect[hook] = old.codec_effect[hook]
            continue
        sample = _sample(store, hook)
        fitted[hook] = fit(codec, sample, old.dtype)
        used = codec_of(dataclasses.replace(old, codec=codec, codec_configuration=fitted), hook)
        effect[hook] = {
            "ratio": round(measured_ratio(used, sample), 4),
            "relative_error": relative_error(used, sample),
        }
        log.info(
            "%s as %s: %.2f x smaller than the raw rows, squared error %.2g of the variance (on %d rows)",
            hook,
            codec,
            effect[hook]["ratio"],
            effect[hook]["relative_error"],
            len(sample),
        )
    return dataclasses.replace(
        old,
        hooks=hooks,
        codec=codec,
        codec_configuration={hook: found for hook, found in fitted.items() if found},
        codec_effect=effect,
        derived_from={"id": store.id, "documents": list(documents)},
    )


def _sample(store: ActivationStore, hook: str) -> Float[Tensor, "row d_model"]:
    """Rows from pieces spread evenly over the store: few chunks are touched, so a remote one is not fetched whole."""
    if store.n_rows <= SAMPLE_ROWS:
        return store.rows(0, store.n_rows, hook).clone()
    length = SAMPLE_ROWS // SAMPLE_PIECES
    starts = np.linspace(0, store.n_rows - length, SAMPLE_PIECES).astype(int)
    return torch.cat([store.rows(int(start), int(start) + length, hook) for start in starts])
