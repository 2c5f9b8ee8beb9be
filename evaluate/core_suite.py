"""The core suite as ``evaluate`` runs it: which SAEs share a pass, and what SAEBench's file says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.core import CoreResult, core_results
from tcsae.evaluate.subjects import Subject
from tcsae.store.errors import ConfigError
from tcsae.store.progress import progress

BRANCH_INPUTS = ("hook_resid_mid", "ln1.hook_in", "ln2.hook_in")
"""Ends of the names of hooks that hold the residual stream, but only as the input of one branch off it."""


class CoreSuite:
    """What the SAE costs the model, and how well it reconstructs."""

    name: Suite = "core"

    def decides(self, config: EvaluateConfig) -> dict[str, Any]:
        """How much text is replayed, and in which batches."""
        return {"max_tokens": config.max_tokens, "batch_size": config.batch_size}

    def check(self, subjects: Sequence[Subject], bench: Bench) -> None:
        """Refuse hooks that nothing can be spliced in at."""
        check_spliceable(subjects)

    def measure(
        self, subjects: Sequence[Subject], prints: Sequence[str], bench: Bench
    ) -> Iterator[tuple[Subject, Measured]]:
        """All SAEs of a hook share every pass that does not depend on them."""
        config = bench.config
        print_of = {one.name: print_ for one, print_ in zip(subjects, prints, strict=True)}
        by_hook: dict[str, list[Subject]] = {}
        for one in subjects:
            by_hook.setdefault(one.hook, []).append(one)
        settings = {"max_tokens": config.max_tokens, "batch_size": config.batch_size, "seed": config.seed}
        n_tokens = sum(
            sum(batch.length) for hook in by_hook for batch in bench.held_out[hook].batches(**settings)
        )
        with progress(n_tokens, "token", self.name) as bar:
            for hook, ones in by_hook.items():
                found = core_results(
                    [one.sae.to(bench.device) for one in ones],
                    [print_of[one.name] for one in ones],
                    bench.held_out[hook],
                    bench.model,
                    n_bootstrap=config.n_bootstrap,
                    advance=bar.update,
                    **settings,
                )
                for one, result in zip(ones, found, strict=True):
                    yield one, _measured(result, bench)


def check_spliceable(subjects: Sequence[Subject]) -> None:
    """Refuse SAEs of hooks that nothing can be spliced in at.

    Raises
    ------
    ConfigError
        a hook is only the input of one branch off the residual stream
    """
    for hook in dict.fromkeys(one.hook for one in subjects):
        if hook.endswith(BRANCH_INPUTS):
            raise ConfigError(
                f"hook {hook}: read at the input of a norm, which the residual stream also goes past, so "
                "nothing can be spliced into the stream there; use --suite temporal, or SAEs of "
                "hook_resid_pre or hook_resid_post"
            )


def _measured(found: CoreResult, bench: Bench) -> Measured:
    made = bench.store.provenance
    n_batches = found.result.facts["replay"]["n_batches"]
    settings = {
        "model_name": made.model,
        "llm_dtype": made.precision,
        "batch_size_prompts": bench.config.batch_size,
        "n_eval_reconstruction_batches": n_batches,
        "n_eval_sparsity_variance_batches": n_batches,
        "dataset": made.corpus,
        "context_size": made.context_length,
        "compute_kl": True,
        "compute_ce_loss": True,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }
    return Measured(
        result=found.result, kind="core", settings=settings, metrics=found.metrics, details=found.details
    )
