"""What the suites share: the documents, the store, the settings and a model that is loaded once, when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import pyarrow as pa
import torch

from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.estimates import SuiteResult, fingerprint
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.splice import ReplayModel
from tcsae.evaluate.subjects import Subject
from tcsae.store.device import choose_device
from tcsae.store.errors import StoreMismatch
from tcsae.store.reader import ActivationStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One suite's result for one SAE with what its files hold beside it."""

    result: SuiteResult
    """figures with intervals"""
    kind: str
    """``eval_type_id``"""
    settings: dict[str, Any]
    """``eval_config``"""
    metrics: dict[str, Any]
    """``eval_result_metrics``, by category"""
    details: list[dict[str, Any]] = field(default_factory=list)
    """``eval_result_details``"""
    features: pa.Table | None = None
    """one row a feature, for ``features/<sae>.parquet``; None where the suite has no such table"""


class Bench:
    """What an evaluation measures on.

    Parameters
    ----------
    config
        what was asked for
    store
        the opened store
    held_out
        its documents of the split, for each hook that an SAE reads
    """

    def __init__(self, config: EvaluateConfig, store: ActivationStore, held_out: dict[str, HeldOut]) -> None:
        self.config = config
        self.store = store
        self.held_out = held_out

    @cached_property
    def device(self) -> torch.device:
        """Where SAEs and model run."""
        return choose_device(self.config.device)

    @cached_property
    def model(self) -> ReplayModel:
        """The model that made the store; loaded at the first use and then shared by all suites.

        Raises
        ------
        StoreMismatch
            the weights or the tokenizer are not those of the store
        """
        # imported here: what the store alone gives needs no model, and transformer_lens takes seconds
        from tcsae.harvest.model import load_model

        made = self.store.provenance
        model = load_model(
            self.config.model or made.model, precision=made.precision, device=self.config.device
        )
        for what, theirs, stores in (
            ("weights", model.sha256, made.model_sha256),
            ("tokenizer", model.tokenizer_sha256, made.tokenizer_sha256),
        ):
            if theirs != stores:
                raise StoreMismatch(
                    f"{self.store.url}: made by {made.model} with {what} {stores[:12]}…, but model "
                    f"{model.name} has {what} {theirs[:12]}…; name the store's own model or harvest again"
                )
        return cast(ReplayModel, model)

    @property
    def conditions(self) -> dict[str, Any]:
        """Settings that every suite's figures depend on, for ``eval_config``."""
        return {
            "split": self.config.split,
            "n_bootstrap": self.config.n_bootstrap,
            "seed": self.config.seed,
        }

    def fingerprint(self, suite: Suite, one: Subject, decides: dict[str, Any]) -> str:
        """Hash over everything that decides a suite's figures for one SAE; paths and device do not."""
        return fingerprint(
            suite=suite,
            sae=one.digest,
            name=one.name,
            arm=one.arm,
            store=self.store.id,
            hook=one.hook,
            **self.conditions,
            **decides,
        )


class SuiteOfMetrics(Protocol):
    """A group of metrics; one module each, listed in `tcsae.evaluate.suites`."""

    name: Suite

    def decides(self, config: EvaluateConfig) -> dict[str, Any]:
        """Settings that its figures depend on beside `Bench.conditions`; they enter the fingerprint."""

    def check(self, subjects: Sequence[Subject], bench: Bench) -> None:
        """Refuse, before anything is measured, what it cannot measure."""

    def measure(
        self, subjects: Sequence[Subject], prints: Sequence[str], bench: Bench
    ) -> Iterator[tuple[Subject, Measured]]:
        """Each subject's result as soon as it is there, so that an interrupted call keeps it.

        ``prints`` are the fingerprints that the results carry.
        """
