"""Settings of ``tcsae evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tcsae.store.errors import ConfigError, UnknownName

Suite = Literal["core", "temporal", "unlearning"]
SUITES: tuple[Suite, ...] = get_args(Suite)

DEFAULT_SUITES: tuple[Suite, ...] = ("core", "temporal")
"""Those that are measured unless others are named: the rest takes much longer."""

EvaluatedSplit = Literal["train", "test", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is evaluated, on what and how thoroughly."""

    saes: tuple[Path, ...]
    """run folders, single SAE folders or folders in SAELens' format, in any mixture"""
    out: Path
    """evaluation folder; finished results in it are kept when their settings are the same"""
    store: str | Path
    """activation store that the figures are computed on; a folder or a URL"""
    model: str | None = None
    """hub name, folder or packaged name of the model to replay; None: the store's own"""
    suites: tuple[Suite, ...] = DEFAULT_SUITES
    """which groups of metrics"""
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
        if self.split not in get_args(EvaluatedSplit):
            raise UnknownName.among("split", self.split, get_args(EvaluatedSplit))
        for name, least in (("max_tokens", 1), ("domain_tokens", 1), ("batch_size", 1), ("n_bootstrap", 100)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {self.seed}")
