"""A part of a store, or a store with another codec, written as a store of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
from tcsae.store.writer import StoreWriter, differences

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


def plan_recoding(
    source: ActivationStore, part: Part | None, codec: str, begun: Path | None = None
) -> Recoding:
    """Plan the store that ``part`` (None: all) of ``source`` makes with ``codec``.

    A codec is fitted to a sample; its size and error on it are logged. Where the same copy lies in the folder
    ``begun``, as far as it got, its fit is kept: on other threads the sums of another one round differently. Raises
    `ConfigError` if the part is empty.
    """
    first, last = document_range(source, part)
    hooks = source.hooks if part is None else part.hooks
    return Recoding(
        source,
        int(source.document_offsets[first]),
        layout_of(source, first, last),
        _provenance_of(source, hooks, codec, (first, last), begun),
    )


def write_recoded(plan: Recoding, path: Path, *, resume: bool, advice: str = "") -> int:
    """Write the planned store to the folder ``path``; with ``resume``, what is missing or damaged of it.

    Returns how many chunk files were there already. ``advice`` is what to do, besides freeing space, if it does not
    fit. Raises as `StoreWriter` does, and `DiskFull` with the numbers before the first byte if there is too little
    space.
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
        kept = (writer.n_chunks - len(missing)) * len(plan.made.hooks)
        if not missing and writer.is_finished:
            return kept
        if writer.complete:
            _check_space(plan, path, in_all * len(missing) // writer.n_chunks, advice)
        with progress(writer.n_chunks, "chunk", f"write {path.name}", writer.n_chunks - len(missing)) as bar:
            for chunk in missing:
                start, stop = (plan.begin + row for row in writer.rows_of(chunk))
                for hook in plan.made.hooks:
                    writer.write(hook, chunk, plan.source.rows(start, stop, hook))
                bar.update()
        writer.finish()
    return kept


def _check_space(plan: Recoding, path: Path, needed: int, advice: str) -> None:
    if needed > free_bytes(path):
        raise DiskFull(
            f"{path}: expected {needed:,} bytes free for {plan.layout.n_rows:,} rows of {len(plan.made.hooks)} "
            f"hooks as {plan.made.codec}, got {free_bytes(path):,}; free some space{advice}, or copy fewer documents"
        )


def staging_folder(source: ActivationStore, part: Part | None, codec: str, dst: Place) -> Path:
    """Where in the cache a copy is put together on its way to ``dst``: the same for every call for the same copy."""
    name = f"{source.url} {source.id} {part} {codec} {dst}"
    return cache_folder() / "staging" / hashlib.sha256(name.encode()).hexdigest()[:24]


@contextmanager
def staged(plan: Recoding, staging: Path) -> Iterator[Path]:
    """The planned store in the folder ``staging``; removed once the block is through.

    If the block raises, it stays, and the next call for the same copy takes it up.
    """
    advice = f" or set {CACHE_VARIABLE} to a folder on a larger disk (the copy is put together here before it is sent)"
    write_recoded(plan, staging, resume=True, advice=advice)
    yield staging
    shutil.rmtree(staging)


def _provenance_of(
    store: ActivationStore, hooks: tuple[str, ...], codec: str, documents: tuple[int, int], begun: Path | None
) -> Provenance:
    """Settings of the copy: a codec as it was fitted where the copy was begun, or as `_fitted` has it."""
    made = dataclasses.replace(
        store.provenance,
        hooks=hooks,
        codec=codec,
        codec_configuration={},
        codec_effect={},
        derived_from={"id": store.id, "documents": list(documents)},
    )
    if begun is not None and (begun / ROOT).exists():
        there = Provenance.from_dict(read_root(begun), str(begun / ROOT))
        as_there = dataclasses.replace(
            made, codec_configuration=there.codec_configuration, codec_effect=there.codec_effect
        )
        if not differences(there, as_there):
            return as_there
    fitted, effect = _fitted(store, hooks, codec)
    return dataclasses.replace(made, codec_configuration=fitted, codec_effect=effect)


def _fitted(
    store: ActivationStore, hooks: tuple[str, ...], codec: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """By hook: the configuration of a codec that is fitted to a sample, and its size and error, which are logged.

    The error is of all lossy codecs that the rows have been through.
    """
    old = store.provenance
    before = old.measured("relative_error")
    fitted: dict[str, dict[str, Any]] = {}
    effect: dict[str, dict[str, float]] = {}
    for hook in hooks:
        if codec == "raw":
            if before.get(hook):
                effect[hook] = {"relative_error": before[hook]}
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
            # two roundings know nothing of each other, so that their squared errors add up
            "relative_error": relative_error(used, sample) + before.get(hook, 0.0),
        }
        log.info(
            "%s as %s: %.2f x smaller than the raw rows, squared error %.2g of the variance (on %d rows)",
            hook,
            codec,
            effect[hook]["ratio"],
            effect[hook]["relative_error"],
            len(sample),
        )
    return {hook: found for hook, found in fitted.items() if found}, effect


def _sample(store: ActivationStore, hook: str) -> Float[Tensor, "row d_model"]:
    """Rows from pieces spread evenly over the store: few chunks are touched, so a remote one is not fetched whole."""
    if store.n_rows <= SAMPLE_ROWS:
        return store.rows(0, store.n_rows, hook).clone()
    length = SAMPLE_ROWS // SAMPLE_PIECES
    starts = np.linspace(0, store.n_rows - length, SAMPLE_PIECES).astype(int)
    return torch.cat([store.rows(int(start), int(start) + length, hook) for start in starts])
