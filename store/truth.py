"""The truth of a store that no language model made: the dictionary that its activations were drawn from.

A group ``truth`` beside the activations, of one-chunk arrays that any Zarr reader opens. It is the dictionary
alone, so it does not grow with the rows and survives every copy whole; which feature is on at which row follows
from it and the store's parameters, document by document (`tcsae.harvest.synthetic`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

from tcsae.store.chunks import CHECKSUM_BYTES, COPY_AGAIN, map_raw, write_raw
from tcsae.store.errors import ConfigError, StoreCorrupt, StoreError
from tcsae.store.index import digest_problems, refuse_link
from tcsae.store.metadata import ROOT, read_root, recorded_digests
from tcsae.store.spec import KINDS, TRUTH, TRUTH_ARRAYS, Provenance

NORM_TOLERANCE = 1e-5
"""Largest deviation of a direction's norm from 1; they are float32"""


class Shaped(NamedTuple):
    """An array of the truth as it lies on the disk."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """A known dictionary; entry i of every array but ``mean`` is true feature i.

    Raises `ConfigError` if an array does not fit the others or holds what no dictionary can.
    """

    directions: Float32[np.ndarray, "feature d_model"]
    """unit vectors that a feature's value is multiplied with"""
    mean: Float32[np.ndarray, " d_model"]
    """what every activation has in common, whatever is on"""
    kind: UInt8[np.ndarray, " feature"]
    """index into `KINDS`: how long the feature stays on"""
    rate: Float64[np.ndarray, " feature"]
    """share of the tokens at which it is on, of documents in which it can be"""
    run_length: Float64[np.ndarray, " feature"]
    """mean length of a run of tokens at which it is on, in a document without end"""
    hold: Float64[np.ndarray, " feature"]
    """correlation of its log-magnitude from one token of a run to the next"""
    topic: Int32[np.ndarray, " feature"]
    """number of the only topic in whose documents it can be on; -1: all"""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ConfigError(f"truth: {problem}")

    @property
    def n_features(self) -> int:
        """true features"""
        return len(self.directions)

    def of_kind(self, kind: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which features are ``slow``, ``medium`` or ``fast``, bool [feature]."""
        found: np.ndarray[Any, np.dtype[np.bool_]] = self.kind == KINDS.index(kind)
        return found

    def _problem(self) -> str | None:
        """What no dictionary can hold, or None."""
        for one in fields(self):
            values = getattr(self, one.name)
            if one.name != "mean" and len(values) != self.n_features:
                return f"{one.name}: expected {self.n_features} entries, got {len(values)}"
            if not np.isfinite(values).all():
                return f"{one.name}: holds NaN or infinite values"
        if self.directions.shape[1:] != self.mean.shape:
            return f"mean: expected {self.directions.shape[1]} dimensions, got {len(self.mean)}"
        norms = np.linalg.norm(self.directions.astype(np.float64), axis=1)
        if np.abs(norms - 1).max(initial=0) > NORM_TOLERANCE:
            worst = int(np.abs(norms - 1).argmax())
            return f"directions: expected unit vectors, number {worst} has norm {norms[worst]:.6g}"
        for name, low, high in (
            ("kind", 0, len(KINDS) - 1),
            ("rate", np.nextafter(0, 1), np.nextafter(1, 0)),
            ("run_length", 1, np.inf),
            ("hold", 0, 1),
            ("topic", -1, np.inf),
        ):
            values = getattr(self, name)
            if values.min(initial=low) < low or values.max(initial=low) > high:
                return f"{name}: expected {low:.4g} to {high:.4g}, got {values.min()} to {values.max()}"
        return None


def truth_shapes(made: Provenance) -> dict[str, Shaped]:
    """The arrays of a store's truth by their names; empty if it has none."""
    if made.truth is None:
        return {}
    sizes = {"feature": int(made.truth["features"]), "d_model": made.d_model}
    return {
        name: Shaped(dtype, tuple(sizes[axis] for axis in axes))
        for name, (dtype, axes) in TRUTH_ARRAYS.items()
    }


def truth_chunks(made: Provenance) -> tuple[str, ...]:
    """Names of the files that hold the truth's values; none if there is no truth."""
    return tuple(f"{TRUTH}/{name}/c/{'/'.join('0' for _ in one.shape)}" for name, one in _shaped(made))


def truth_files(made: Provenance) -> tuple[str, ...]:
    """Names of all files of a store's truth; none if there is no truth."""
    if made.truth is None:
        return ()
    return (f"{TRUTH}/{ROOT}", *(f"{TRUTH}/{name}/{ROOT}" for name, _ in _shaped(made)), *truth_chunks(made))


def write_truth(store: Path, truth: Truth) -> None:
    """Write the arrays' values, each with its CRC-32C; their metadata is `metadata.array_metadata`'s."""
    for name, (dtype, axes) in TRUTH_ARRAYS.items():
        values = np.ascontiguousarray(getattr(truth, name).astype(dtype))
        path = store / TRUTH / name / "c" / Path(*("0" for _ in axes))
        write_raw(path, values.reshape(-1).view(np.uint8), sync_folder=False)


def read_truth(store: Path, made: Provenance) -> Truth | None:
    """The truth of the store in the folder ``store``, checked against its checksums; None if it has none.

    Raises `StoreCorrupt` naming the file that is missing, altered or not what a dictionary can be.
    """
    if made.truth is None:
        return None
    attributes = read_root(store)
    digests = recorded_digests(attributes, str(store / ROOT))
    for altered in digest_problems(store, digests, truth_chunks(made)):
        raise StoreCorrupt(f"{altered}; copy the store again")
    arrays: dict[str, Any] = {}
    for (name, one), file in zip(_shaped(made), truth_chunks(made), strict=True):
        path = store / file
        refuse_link(store, path)
        dtype = np.dtype(one.dtype)
        size = int(np.prod(one.shape)) * dtype.itemsize + CHECKSUM_BYTES
        arrays[name] = map_raw(path, size, mend=COPY_AGAIN)[0].view(dtype).reshape(one.shape).copy()
    try:
        return Truth(**arrays)
    except ConfigError as error:
        raise StoreCorrupt(f"{store / TRUTH}: {error}; copy the store again") from error


def truth_problems(store: Path, made: Provenance) -> Iterator[str]:
    """A line for what is wrong with a store's truth; nothing if it has none."""
    try:
        read_truth(store, made)
    except StoreError as error:
        yield str(error)


def _shaped(made: Provenance) -> tuple[tuple[str, Shaped], ...]:
    return tuple(truth_shapes(made).items())
