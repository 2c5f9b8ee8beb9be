"""The core suite as ``evaluate`` runs it: which SAEs share a pass, and what SAEBench's file says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.core import CoreResult, core_result, core_result_without_model, run_replay
from tcsae.evaluate.core_checkpoint import NAME, ReplayCheckpoint
from tcsae.evaluate.core_replay import Replay
from tcsae.evaluate.core_text import ReplayText, text_of_rows, text_of_store
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
        print_of = {one.name: print_ for one, print_ in zip(subjects, prints, strict=True)}
        by_hook: dict[str, list[Subject]] = {}
        for one in subjects:
            by_hook.setdefault(one.hook, []).append(one)
        measure = _measure_hook if bench.has_model else _measure_rows
        for hook, ones in by_hook.items():
            yield from measure(hook, ones, [print_of[one.name] for one in ones], bench)


def _measure_hook(
    hook: str, ones: Sequence[Subject], prints: Sequence[str], bench: Bench
) -> Iterator[tuple[Subject, Measured]]:
    text = _text(hook, bench)
    saes = [one.sae.to(bench.device) for one in ones]
    replay = Replay(bench.model, hook, text.mean, saes, text.n_documents, reconstructs=text.held_out is None)
    checkpoint = ReplayCheckpoint(bench.config.out / "core" / NAME.format(hook), prints)
    with progress(text.n_tokens, "token", "core: replay") as bar:
        run_replay(replay, text, checkpoint, bar)
    n_rows = text.held_out.n_tokens if text.held_out is not None else 0
    with progress(n_rows * len(ones), "row", "core: stored activations") as bar:
        for at, (one, print_) in enumerate(zip(ones, prints, strict=True)):
            bar.set_postfix_str(one.name)
            found = core_result(saes[at], at, print_, replay, text, _conditions(bench), bar.update)
            yield one, _measured(found, bench)


def _measure_rows(
    hook: str, ones: Sequence[Subject], prints: Sequence[str], bench: Bench
) -> Iterator[tuple[Subject, Measured]]:
    """What the stored activations of a store give that no language model made."""
    held_out = bench.held_out[hook]
    with progress(held_out.n_tokens * len(ones), "row", "core: stored activations") as bar:
        for one, print_ in zip(ones, prints, strict=True):
            sae = one.sae.to(bench.device)
            found = core_result_without_model(sae, print_, held_out, _conditions(bench), bar.update)
            yield one, _measured(found, bench)


def _text(hook: str, bench: Bench) -> ReplayText:
    """What is replayed: the file's rows where there are any, else contexts of the store."""
    config = bench.config
    if bench.rows is None:
        return text_of_store(
            bench.held_out[hook],
            max_tokens=config.max_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
        )
    n_tokens = bench.rows.n_tokens if bench.store_or_none is None else 0
    with progress(n_tokens, "token", "core: mean", is_shown=bool(n_tokens)) as bar:
        return text_of_rows(
            bench.rows,
            hook,
            bench.model,
            bench.special_token_ids,
            bench.store_or_none,
            batch_size=config.batch_size,
            advance=bar.update,
        )


def _conditions(bench: Bench) -> dict[str, Any]:
    """What the figures depend on, for the result's file."""
    config = bench.config
    text = (
        {"tokens": str(config.tokens), "tokens_sha256": bench.rows.sha256}
        if bench.rows is not None
        else {"split": config.split, "max_tokens": config.max_tokens}
    )
    store = bench.store_or_none
    return {
        "store": None if store is None else store.id,
        **text,
        "n_bootstrap": config.n_bootstrap,
        "seed": config.seed,
    }


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
    about = bench.about
    n_batches = found.result.facts["replay"]["n_batches"]
    settings = {
        "model_name": about.model,
        "llm_dtype": about.precision,
        "batch_size_prompts": bench.config.batch_size,
        "n_eval_reconstruction_batches": n_batches,
        "n_eval_sparsity_variance_batches": n_batches,
        "dataset": about.corpus,
        "context_size": about.context_length,
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
