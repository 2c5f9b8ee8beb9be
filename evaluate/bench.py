"""What the suites share: the documents, the store, the settings and a model that is loaded once, when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import pyarrow as pa
import torch

from tcsae.evaluate.config import EvaluateConfig, Suite, documents_text
from tcsae.evaluate.estimates import SuiteResult, fingerprint
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.splice import ReplayModel
from tcsae.evaluate.subjects import Subject
from tcsae.evaluate.token_rows import TokenRows
from tcsae.harvest.model import LanguageModel
from tcsae.store.device import choose_device
from tcsae.store.errors import ConfigError, StoreMismatch
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


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """Model and text behind the figures, as result files and captions name them."""

    model: str
    """name of the model"""
    model_sha256: str
    """of its weights"""
    precision: str
    """dtype of the forward pass"""
    corpus: str
    """where the text comes from"""
    context_length: int
    """tokens of a full context, BOS included"""
    has_bos: bool
    """whether contexts begin with a BOS"""
    n_documents: int
    """documents, or rows of a file"""
    n_tokens: int
    """their tokens"""
    caption: str
    """such as ``199 test documents``"""


class Bench:
    """What an evaluation measures on.

    Parameters
    ----------
    config
        what was asked for
    store
        the opened store; None: only ``rows`` are evaluated
    held_out
        its documents of the split, for each hook that an SAE reads; empty where ``rows`` are given
    rows
        rows of token ids that the core suite replays instead
    model
        the model, if it is loaded already
    """

    def __init__(
        self,
        config: EvaluateConfig,
        store: ActivationStore | None,
        held_out: dict[str, HeldOut],
        rows: TokenRows | None = None,
        model: LanguageModel | None = None,
    ) -> None:
        self.config = config
        self.store_or_none = store
        self.held_out = held_out
        self.rows = rows
        if model is not None:
            # stands in for the cached property of that name
            self.__dict__["language_model"] = model

    @property
    def store(self) -> ActivationStore:
        """The store, which every suite but core needs.

        Raises
        ------
        ConfigError
            rows of tokens are evaluated without a store
        """
        if self.store_or_none is None:
            raise ConfigError("store: expected --store STORE, got rows of tokens only")
        return self.store_or_none

    @cached_property
    def device(self) -> torch.device:
        """Where SAEs and model run."""
        return choose_device(self.config.device)

    @property
    def has_model(self) -> bool:
        """Whether there is a language model to replay: none made a store that has a truth."""
        return self.rows is not None or self.store.provenance.truth is None

    @property
    def model(self) -> ReplayModel:
        """`language_model` as the splice knows it."""
        return cast(ReplayModel, self.language_model)

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model that made the store; loaded at the first use and then shared by all suites.

        Raises
        ------
        StoreMismatch
            the weights or the tokenizer are not those of the store, or no model made it
        """
        self.check_model()
        # imported here, where it is used: what the store alone gives needs no model
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
        return model

    def check_model(self) -> None:
        """Raise `StoreMismatch` if no language model made the store, so that there is none to replay."""
        made = None if self.store_or_none is None else self.store_or_none.provenance
        if made is not None and made.truth is not None:
            raise StoreMismatch(
                f"{self.store.url}: made from a known dictionary by no language model, so there is none to replay; "
                "use --suite core,temporal,probing,truth"
            )

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Tokens that no figure counts."""
        return self.language_model.special_token_ids

    @cached_property
    def about(self) -> About:
        """Model and text, for files and captions."""
        rows, held_out = self.rows, next(iter(self.held_out.values()), None)
        if rows is not None:
            model = self.language_model
            return About(
                model=model.name,
                model_sha256=model.sha256,
                precision=model.precision,
                corpus=rows.path.name,
                context_length=rows.context_length,
                has_bos=model.bos_token_id is not None and bool((rows.ids[:, 0] == model.bos_token_id).all()),
                n_documents=rows.n_rows,
                n_tokens=rows.n_tokens,
                caption=f"{rows.n_rows} rows of {rows.path.name}",
            )
        assert held_out is not None  # there is at least one SAE
        made = self.store.provenance
        return About(
            model=made.model,
            model_sha256=made.model_sha256,
            precision=made.precision,
            corpus=made.corpus,
            context_length=made.context_length,
            has_bos=made.bos_token_id is not None,
            n_documents=held_out.n_documents,
            n_tokens=held_out.n_tokens,
            caption=documents_text(held_out.n_documents, self.config.split),
        )

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
        rows = {} if self.rows is None else {"tokens": self.rows.sha256, "model": self.about.model_sha256}
        return fingerprint(
            suite=suite,
            sae=one.digest,
            name=one.name,
            arm=one.arm,
            store=None if self.store_or_none is None else self.store_or_none.id,
            hook=one.hook,
            **rows,
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
