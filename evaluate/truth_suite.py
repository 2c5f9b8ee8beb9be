"""The truth suite as ``evaluate`` runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.subjects import Subject
from tcsae.evaluate.truth import truth_result
from tcsae.harvest.synthetic import truth_of_store
from tcsae.store.progress import progress


class TruthSuite:
    """What an SAE has found of a known dictionary; only for stores that were made from one."""

    name: Suite = "truth"

    def decides(self, config: EvaluateConfig) -> dict[str, Any]:
        """Nothing beside what decides every suite's figures."""
        return {}

    def check(self, subjects: Sequence[Subject], bench: Bench) -> None:
        """Refuse a store that a model made, whose features nobody knows."""
        truth_of_store(bench.store)

    def measure(
        self, subjects: Sequence[Subject], prints: Sequence[str], bench: Bench
    ) -> Iterator[tuple[Subject, Measured]]:
        """One SAE after the other."""
        source = truth_of_store(bench.store)
        n_tokens = sum(2 * bench.held_out[one.hook].n_tokens for one in subjects)
        with progress(n_tokens, "token", self.name) as bar:
            for one, print_ in zip(subjects, prints, strict=True):
                result, details = truth_result(
                    one.sae.to(bench.device),
                    bench.held_out[one.hook],
                    source,
                    n_bootstrap=bench.config.n_bootstrap,
                    seed=bench.config.seed,
                    print_=print_,
                    advance=bar.update,
                )
                figures = {name: estimate.value for name, estimate in result.estimates.items()}
                yield (
                    one,
                    Measured(
                        result=result,
                        kind="tcsae_truth",
                        settings=bench.conditions,
                        metrics={self.name: figures},
                        details=details,
                    ),
                )
