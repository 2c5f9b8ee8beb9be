"""The activation store, format 1: names, axes, dtypes and what a harvest knows before the model runs.

All ranges are half-open, ``[start, stop)``. Rows are counted over the whole store, positions from a
context's first stored row, which is 0. ``docs/format.md`` states the format in MUST/MAY lines.

Axis names used in the annotations of every package:

=============  =============================================================
``row``        one stored token, in document order
``d_model``    one dimension of the hook's activation
``document``   one document of the corpus
``context``    one forward pass of the model; never spans documents
=============  =============================================================
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from tcsae.store.errors import ConfigError, StoreCorrupt
from tcsae.store.json_types import is_finite_number, type_problem

FORMAT = "tcsae-activations"
"""Value of the group attribute ``format``; never changes."""

FORMAT_VERSION = 1
"""Version this package writes; every earlier one is read forever."""

TOKENS = "tokens"
DOCUMENT_OFFSETS = "document_offsets"
CONTEXT_OFFSETS = "context_offsets"
ACTIVATIONS = "activations"
CHECKSUMS = "checksums"
DOCUMENTS_FILE = "documents.parquet"
TRUTH = "truth"

Dtype = Literal["float16", "bfloat16", "float32"]
Precision = Literal["float32", "bfloat16"]
Split = Literal["train", "test"]

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Stored dtype of an activation, by name."""

ZARR_DTYPES: dict[Dtype, str] = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}
"""Zarr v3 has no core bfloat16: its bits are stored as uint16 and the array says so in ``stored_as``."""

TEST_SHARE = 0.1
"""Share of documents held out, in expectation."""

OUTLIER_FACTOR = 10.0
"""A row is an outlier if its norm exceeds this multiple of the train split's median norm."""

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
"""Quantiles of the norms that a store's statistics hold."""

KINDS = ("slow", "medium", "fast")
"""How long a true feature stays on, in a store with a truth."""

TRUTH_ARRAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "directions": ("<f4", ("feature", "d_model")),
    "mean": ("<f4", ("d_model",)),
    "kind": ("|u1", ("feature",)),
    "rate": ("<f8", ("feature",)),
    "run_length": ("<f8", ("feature",)),
    "hold": ("<f8", ("feature",)),
    "topic": ("<i4", ("feature",)),
}
"""dtype and axes of each array of the group ``truth``; see `tcsae.store.truth`"""

PLAIN: dict[str, Any] = {
    "codec": "raw",
    "codec_configuration": {},
    "codec_effect": {},
    "derived_from": None,
    "truth": None,
}
"""Attributes that a store may leave out, and what it is then."""

DOCUMENT_COLUMNS = ("id", "source", "topic", "split", "n_tokens", "sha256")
"""Columns of documents.parquet that every store has; ``text`` may follow."""


def split_of(document_id: str) -> Split:
    """The split of a document: a function of its id alone, so it never changes as a corpus grows.

    >>> [split_of(name) for name in ("a", "b", "f", "i")]
    ['train', 'train', 'train', 'train']
    """
    digest = hashlib.sha256(document_id.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Who made a store, from what and with which settings: the group's attributes.

    Two harvests with equal provenance write the same bytes, so it is also what `--resume` compares.
    """

    model: str
    """hub name, folder or packaged name, as given"""
    model_revision: str
    """commit of the weights on the hub, or "" for a local folder"""
    model_sha256: str
    """SHA-256 over the weight files"""
    tokenizer_sha256: str
    """SHA-256 over the tokenizer's files"""
    hooks: tuple[str, ...]
    """TransformerLens names, in the order given"""
    d_model: int
    """columns of every hook's array"""
    context_length: int
    """tokens of one forward pass, a prepended BOS included"""
    bos_token_id: int | None
    """token prepended to every context, its row not stored; None: nothing is prepended (0 is a BOS)"""
    special_token_ids: tuple[int, ...]
    """the tokenizer's pad, BOS and EOS, which the metrics mask"""
    vocab_size: int
    """every stored token id is below this"""
    dtype: Dtype
    """dtype of the stored activations"""
    precision: Precision
    """dtype of the forward pass"""
    rows_per_chunk: int
    """rows of a chunk file"""
    corpus: str
    """the corpus as given on the command line"""
    corpus_sha256: str
    """SHA-256 over the documents' ids and texts, in order"""
    max_tokens: int | None
    """bound on the rows, or None"""
    versions: dict[str, str]
    """package versions that decide the bytes (torch, transformers, tcsae, ...)"""
    created: str
    """UTC day, YYYY-MM-DD: no finer, so that a second harvest of the same day is byte-identical"""
    codec: str = "raw"
    """how the rows of a chunk became its bytes: a name of `tcsae.store.codecs`"""
    codec_configuration: dict[str, dict[str, Any]] = field(default_factory=dict)
    """what a lossy codec was fitted to, by hook; empty for the others"""
    codec_effect: dict[str, dict[str, float]] = field(default_factory=dict)
    """by hook: ``ratio`` to the raw bytes and ``relative_error`` (squared, of the variance), of a sample"""
    derived_from: dict[str, Any] | None = None
    """``id`` of the store that this is a copy of, and its ``documents`` [start, stop); None for a harvest"""
    truth: dict[str, Any] | None = None
    """of a store that no model made: ``features`` of its known dictionary and the ``parameters`` that, with the
    arrays of the group ``truth``, give every row's true code; None for a model's activations"""

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise ConfigError(f"dtype: expected one of {', '.join(get_args(Dtype))}, got {self.dtype!r}")
        for name in ("d_model", "context_length", "vocab_size", "rows_per_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.hooks or len(set(self.hooks)) != len(self.hooks):
            raise ConfigError(
                f"hooks: expected one or more different names, got {', '.join(self.hooks) or 'none'}"
            )
        for hook in self.hooks:
            if not hook or "/" in hook or hook.startswith("."):
                raise ConfigError(f"hooks: {hook!r} cannot name an array")
        if self.truth is not None:
            n_features, parameters = self.truth.get("features"), self.truth.get("parameters")
            if type(n_features) is not int or n_features < 1 or not isinstance(parameters, dict):
                raise ConfigError(
                    f"truth: expected a number of features, at least 1, and parameters, got {n_features!r} and "
                    f"{type(parameters).__name__}"
                )

    def measured(self, name: str) -> dict[str, float]:
        """``ratio`` or ``relative_error`` of the codec by hook, of the hooks that have it."""
        return {hook: found[name] for hook, found in self.codec_effect.items() if name in found}

    def to_dict(self) -> dict[str, Any]:
        """JSON form; tuples become lists. Fields that say that a store is a plain harvest are left out.

        Those came later than format 1's first stores, whose `id` is a hash of this form.
        """
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        for name, plain in PLAIN.items():
            if values[name] == plain:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Provenance:
        """Read back what `to_dict` wrote; ``where`` names the file in errors.

        Raises
        ------
        StoreCorrupt
            a field is missing or has a value that no writer writes
        """
        missing = [f.name for f in fields(cls) if f.name not in values and f.name not in PLAIN]
        if missing:
            raise StoreCorrupt(f"{where}: attributes lack {', '.join(missing)}; copy the store again")
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if problem := type_problem(known):
            raise StoreCorrupt(f"{where}: {problem}; copy the store again")
        known["hooks"] = tuple(known["hooks"])
        known["special_token_ids"] = tuple(known["special_token_ids"])
        try:
            return cls(**known)
        except (ConfigError, TypeError) as error:
            raise StoreCorrupt(f"{where}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class HookStatistics:
    """What a hook's activations look like, over the rows of the train split, in float64."""

    mean: npt.NDArray[np.float64]
    """mean activation, outliers left out, float64 [d_model]"""
    mean_square_norm: float
    """mean of ||x - mean||^2, outliers left out; the scaler makes it d_model"""
    norm_quantiles: dict[str, float]
    """`QUANTILES` of ||x||, outliers included, exact to 0.3 %; keys such as "0.5" """
    outlier_norm: float
    """rows with a larger norm are outliers: `OUTLIER_FACTOR` times the median"""
    n_outliers: int
    """outliers in the train split: stored, but kept out of the mean, the scaler and the loss"""
    n_rows: int
    """rows in the train split, outliers included"""

    def to_dict(self) -> dict[str, Any]:
        """JSON form; float64 survives it exactly."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "mean": self.mean.tolist()}

    @classmethod
    def from_attributes(
        cls, attributes: dict[str, Any], hook: str, d_model: int, where: str
    ) -> HookStatistics:
        """Read back what `to_dict` wrote for ``hook`` from a group's attributes.

        Raises `StoreCorrupt` naming the file ``where`` if it is not there or has values that no writer writes.
        """
        by_hook = attributes.get("statistics")
        values: Any = by_hook.get(hook) if isinstance(by_hook, dict) else None
        if problem := _statistics_problem(values, d_model):
            raise StoreCorrupt(f"{where}: statistics of {hook}: {problem}; copy the store again")
        return cls(**{**values, "mean": np.array(values["mean"], dtype=np.float64)})


def _statistics_problem(values: Any, d_model: int) -> str | None:
    """What is wrong with a hook's statistics in JSON form, or None."""
    if not isinstance(values, dict):
        return "missing" if values is None else f"expected dict, got {type(values).__name__}"
    names = [f.name for f in fields(HookStatistics)]
    if set(values) != set(names):
        return f"expected {', '.join(names)}, got {', '.join(values) or 'none'}"
    mean, quantiles = values["mean"], values["norm_quantiles"]
    if not isinstance(mean, list) or len(mean) != d_model or not all(map(is_finite_number, mean)):
        return f"mean: expected a list of {d_model} finite numbers"
    if not isinstance(quantiles, dict) or not all(is_finite_number(quantiles.get(str(q))) for q in QUANTILES):
        return f"norm_quantiles: expected finite numbers for {', '.join(map(str, QUANTILES))}"
    for name in ("mean_square_norm", "outlier_norm"):
        if not is_finite_number(values[name]):
            return f"{name}: expected a finite number"
    for name in ("n_outliers", "n_rows"):
        if type(values[name]) is not int or not 0 <= values[name] < 2**63:
            return f"{name}: expected a count"
    return None
