"""The temporal suite as ``evaluate`` runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.subjects import Subject
from tcsae.evaluate.temporal import temporal_figures
from tcsae.evaluate.temporal_encoders import Encoder, SAEEncoder
from tcsae.evaluate.temporal_features import figures
from tcsae.evaluate.temporal_pass import Advance, n_tokens_read, temporal_sums, units_of
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.evaluate.temporal_workers import temporal_sums_on_workers
from tcsae.store.parallel import check_scheduler
from tcsae.store.progress import progress

DEFINITIONS = 2
"""Raised whenever a figure of this suite changes its meaning; 1 had the pooled autocorrelation alone."""


class TemporalSuite:
    """How long features stay on; the store alone is read, no model runs."""

    name: Suite = "temporal"

    def decides(self, config: EvaluateConfig) -> dict[str, Any]:
        """The figures' definitions; who counts changes none of them."""
        return {"definitions": DEFINITIONS}

    def check(self, subjects: Sequence[Subject], bench: Bench) -> None:
        """Any SAE of the store can be measured, by a scheduler that is there.

        Raises
        ------
        ConfigError
            none answers at the address, or it has no workers
        """
        if bench.config.scheduler is not None:
            check_scheduler(bench.config.scheduler)

    def measure(
        self, subjects: Sequence[Subject], prints: Sequence[str], bench: Bench
    ) -> Iterator[tuple[Subject, Measured]]:
        """One SAE after the other."""
        n_tokens = sum(n_tokens_read(bench.held_out[one.hook]) for one in subjects)
        with progress(n_tokens, "token", self.name) as bar:
            for one, print_ in zip(subjects, prints, strict=True):
                encoder = SAEEncoder(one.sae.to(bench.device))
                yield one, measured(encoder, bench.held_out[one.hook], bench, print_, bar.update)


def measured(encoder: Encoder, held_out: HeldOut, bench: Bench, print_: str, advance: Advance) -> Measured:
    """Every figure of one encoder, with its table of features."""
    config = bench.config
    sums = counted(encoder, held_out, bench, advance).without_empty_units()
    result, table = temporal_figures(
        sums,
        figures(sums),
        block_size=encoder.block_size,
        n_documents=n_documents(sums, held_out),
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
        print_=print_,
    )
    values = {name: estimate.value for name, estimate in result.estimates.items()}
    return Measured(
        result=result,
        kind="tcsae_temporal",
        settings=bench.conditions,
        metrics={"temporal": values},
        features=table,
    )


def counted(encoder: Encoder, held_out: HeldOut, bench: Bench, advance: Advance) -> TemporalSums:
    """The sums of one encoder, counted here or on the workers that were asked for."""
    config = bench.config
    if config.workers <= 1 and config.scheduler is None:
        return temporal_sums(encoder, held_out, seed=config.seed, advance=advance)
    return temporal_sums_on_workers(
        encoder,
        held_out,
        config.out,
        seed=config.seed,
        workers=config.workers,
        scheduler=config.scheduler,
        advance=advance,
    )


def n_documents(sums: TemporalSums, held_out: HeldOut) -> int:
    """Documents that ``sums``, without empty units, rest on; where units are groups of them, all there are."""
    is_grouped = int(units_of(held_out, sums.d_sae).max()) + 1 < held_out.n_documents
    return held_out.n_documents if is_grouped else sums.n_units
