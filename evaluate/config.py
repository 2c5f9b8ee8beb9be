"""Settings of ``tcsae evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tcsae.store.errors import ConfigError, UnknownName

Suite = Literal["core", "temporal"]
SUITES: tuple[Suite, ...] = get_args(Suite)

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
    store: str | Path
    """activation store that the figures are computed on; a folder or a URL"""
    model: str | None = None
    """hub name, folder or packaged name of the model to replay; None: the store's own"""
    suites: tuple[Suite, ...] = SUITES
    """which groups of metrics"""
    split: EvaluatedSplit = "test"
    """which of the store's documents; figures on "train" are not held out"""
    max_tokens: int = 8192
    """tokens of the core suite's replay through the model (whole contexts, drawn at random); what is
    computed from the store alone always uses every document of the split"""
    batch_size: int = 16
    """contexts of one forward pass; SAEBench's mse and explained variance depend on it"""
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
        if self.temporal_references and "temporal" not in self.suites:
            raise ConfigError(
                "temporal_references: expected suite temporal beside them, got " + ", ".join(self.suites)
            )
        for reference in self.temporal_references:
            if reference not in TEMPORAL_REFERENCES:
                raise UnknownName.among("temporal reference", reference, TEMPORAL_REFERENCES)
        if self.split not in get_args(EvaluatedSplit):
            raise UnknownName.among("split", self.split, get_args(EvaluatedSplit))
        for name, least in (("max_tokens", 1), ("batch_size", 1), ("n_bootstrap", 100), ("workers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {self.seed}")
