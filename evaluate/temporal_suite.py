"""The temporal suite as ``evaluate`` runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.subjects import Subject
from tcsae.evaluate.temporal import temporal_result
from tcsae.store.progress import progress


class TemporalSuite:
    """How long features stay on; the store alone is read, no model runs."""

    name: Suite = "temporal"

    def decides(self, config: EvaluateConfig) -> dict[str, Any]:
        """Nothing beside what decides every suite's figures."""
        return {}

    def check(self, subjects: Sequence[Subject], bench: Bench) -> None:
        """Any SAE of the store can be measured."""

    def measure(
        self, subjects: Sequence[Subject], prints: Sequence[str], bench: Bench
    ) -> Iterator[tuple[Subject, Measured]]:
        """One SAE after the other."""
        with progress(len(subjects), "SAE", self.name) as bar:
            for one, print_ in zip(subjects, prints, strict=True):
                result = temporal_result(
                    one.sae.to(bench.device),
                    bench.held_out[one.hook],
                    n_bootstrap=bench.config.n_bootstrap,
                    seed=bench.config.seed,
                    print_=print_,
                )
                figures = {name: estimate.value for name, estimate in result.estimates.items()}
                yield (
                    one,
                    Measured(
                        result=result,
                        kind="tcsae_temporal",
                        settings=bench.conditions,
                        metrics={self.name: figures},
                    ),
                )
                bar.update()
