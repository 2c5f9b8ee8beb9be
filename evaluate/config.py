"""Settings of ``tcsae evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tcsae.store.errors import ConfigError, UnknownName

Suite = Literal["core", "temporal", "probing", "unlearning", "truth"]
SUITES: tuple[Suite, ...] = get_args(Suite)

DEFAULT_SUITES: tuple[Suite, ...] = ("core", "temporal")
"""What is measured where nothing else is asked for, and the truth beside it of a store that has one."""

REFERENCES = ("identity", "pca", "random", "untrained")
"""Kinds of references; pca is followed by a colon and its number of components."""
TemporalReference = Literal["raw", "random", "averaged"]
TEMPORAL_REFERENCES: tuple[TemporalReference, ...] = get_args(TemporalReference)

EvaluatedSplit = Literal["train", "test", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is evaluated, on what and how thoroughly."""

    saes: tuple[Path, ...]
    """run folders, single SAE folders or folders in SAELens' format, in any mixture"""
    out: Path
    """evaluation folder; finished results in it are kept when their settings are the same"""
    store: str | Path | None = None
    """activation store that the figures are computed on; a folder or a URL. None: ``tokens`` are"""
    model: str | None = None
    """hub name, folder or packaged name of the model to replay; None: the store's own"""
    suites: tuple[Suite, ...] = DEFAULT_SUITES
    """which groups of metrics"""
    tokens: Path | None = None
    """.npy file of token ids [rows, context], BOS included, which the core suite replays in its order, all of
    it, instead of contexts of the store's documents"""
    references: tuple[str, ...] = ()
    """what is evaluated beside the SAEs: "identity", "pca:K", "random", "untrained"
    (see `tcsae.evaluate.references`)"""
    split: EvaluatedSplit = "test"
    """which of the store's documents; figures on "train" are not held out"""
    max_tokens: int = 8192
    """tokens of the core suite's replay through the model (whole contexts, drawn at random); what is
    computed from the store alone always uses every document of the split"""
    batch_size: int = 16
    """contexts of one forward pass; SAEBench's mse and explained variance depend on it"""
    forget: tuple[str, ...] = ()
    """topics or sources that the unlearning suite makes the model forget, one after the other; empty: the
    largest topics"""
    domain_tokens: int = 2048
    """tokens that the unlearning suite scores on, inside each forget domain and as many outside it (whole
    contexts, the documents taking turns); every setting replays them"""
    questions_forget: Path | None = None
    """JSON lines of multiple-choice questions about what is forgotten, for the unlearning suite"""
    questions_retain: Path | None = None
    """the same about anything else"""
    device: str = "auto"
    """torch device, or "auto" for CUDA where there is one"""
    n_bootstrap: int = 2000
    """resamples of the documents behind every interval"""
    seed: int = 0
    """of the contexts' draw and of the resamples"""
    temporal_references: tuple[TemporalReference, ...] = ()
    """rows to hold the temporal suite's figures against, see `tcsae.evaluate.temporal_references`"""
    workers: int = 1
    """Dask processes on this machine for the temporal suite's pass; 1: this process alone"""
    scheduler: str | None = None
    """address of a running Dask scheduler whose workers see the same files; takes precedence over ``workers``"""

    def __post_init__(self) -> None:
        if not self.saes:
            raise ConfigError("saes: expected at least one run or SAE folder, got none")
        if not self.suites:
            raise ConfigError(f"suites: expected some of {', '.join(SUITES)}, got none")
        for suite in self.suites:
            if suite not in SUITES:
                raise UnknownName.among("suite", suite, SUITES)
        if (self.questions_forget is None) != (self.questions_retain is None):
            raise ConfigError("questions_forget, questions_retain: expected both files or none, got one")
        if self.questions_forget is not None and len(self.forget) != 1:
            raise ConfigError(
                f"forget: with questions, expected the one topic that they are about, got {len(self.forget)}; "
                "its documents select the features"
            )
        for reference in self.references:
            parse_reference(reference)
        if self.store is None and self.tokens is None:
            raise ConfigError(
                "store: expected --store STORE, or --tokens ROWS.npy with --suite core and --model; got neither"
            )
        if self.tokens is not None and self.suites != ("core",):
            others = ", ".join(suite for suite in self.suites if suite != "core")
            raise ConfigError(f"tokens: rows of tokens are for --suite core alone, got {others} as well")
        if self.store is None and self.model is None:
            raise ConfigError("model: expected --model beside --tokens, since no store names the model")
        if self.temporal_references and "temporal" not in self.suites:
            raise ConfigError(
                "temporal_references: expected suite temporal beside them, got " + ", ".join(self.suites)
            )
        for reference in self.temporal_references:
            if reference not in TEMPORAL_REFERENCES:
                raise UnknownName.among("temporal reference", reference, TEMPORAL_REFERENCES)
        if self.split not in get_args(EvaluatedSplit):
            raise UnknownName.among("split", self.split, get_args(EvaluatedSplit))
        for name, least in (
            ("max_tokens", 1),
            ("domain_tokens", 1),
            ("batch_size", 1),
            ("n_bootstrap", 100),
            ("workers", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {self.seed}")


def documents_text(n: int, split: EvaluatedSplit) -> str:
    """What figures rest on, in words.

    >>> documents_text(85, "test"), documents_text(1, "all")
    ('85 test documents', '1 document')
    """
    return f"{n} {'' if split == 'all' else f'{split} '}document{'' if n == 1 else 's'}"


def parse_reference(text: str) -> tuple[str, int | None]:
    """Kind of a reference and, of ``pca:K``, its number of components.

    >>> parse_reference("pca:32")
    ('pca', 32)

    Raises
    ------
    ConfigError
        it is none of those, or K is no whole number of at least 1
    """
    kind, colon, number = text.partition(":")
    if kind not in REFERENCES:
        raise UnknownName.among("reference", text, REFERENCES)
    if kind != "pca":
        if colon:
            raise ConfigError(f"reference {text!r}: {kind} takes no number")
        return kind, None
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"reference {text!r}: expected pca:K with K components of at least 1, as in pca:32")
    return kind, int(number)
