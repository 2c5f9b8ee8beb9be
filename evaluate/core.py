"""The core suite: what the SAE costs the model, and how well it reconstructs.

Two sources, never mixed. *Store*: reconstruction and sparsity on the stored activations of every held-out
token (`reconstruction`). *Replay* (`core_replay`): the model runs on some of those contexts with the SAE
spliced in, which gives cross-entropy and KL and, on the same batches, all of SAEBench's own figures
(`saebench`). Where rows of a file are evaluated, the replay's own activations stand in for the store's.

Repaired figures of the replay (sums over tokens per document, in float64; KL through log_softmax; nothing is
spliced or ablated at special tokens):

    ce_clean, ce_sae, ce_zero, ce_mean   mean next-token cross-entropy over kept tokens with a kept target
    kl_sae, kl_zero, kl_mean             mean KL(clean || variant) over kept tokens
    loss_recovered       (ce_zero - ce_sae) / (ce_zero - ce_clean)
    loss_recovered_mean  the same with ce_mean: on zero ablation, a weak floor, the mean alone scores high
    kl_score, kl_score_mean   1 - kl_sae / kl_zero, 1 - kl_sae / kl_mean
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tcsae.evaluate import reconstruction, saebench
from tcsae.evaluate.core_checkpoint import ReplayCheckpoint
from tcsae.evaluate.core_replay import COLUMNS, Replay
from tcsae.evaluate.core_text import ReplayText
from tcsae.evaluate.estimates import Draws, Estimate, Metric, SuiteResult, estimates_of
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.intervals import MAX_UNITS, Array, bootstrap, resample_counts
from tcsae.evaluate.reconstruction import Gathered
from tcsae.store.interrupt import stop_on_signal
from tcsae.train.sae.inference import SAE

NO_PREDICTION = "no kept token is followed by a kept token"
NO_EFFECT = "the ablation changes nothing"

METRICS = (
    Metric("ce_clean", "nats", NO_PREDICTION),
    Metric("ce_sae", "nats", NO_PREDICTION),
    Metric("ce_zero", "nats", NO_PREDICTION),
    Metric("ce_mean", "nats", NO_PREDICTION),
    Metric("loss_recovered", "1", NO_EFFECT),
    Metric("loss_recovered_mean", "1", NO_EFFECT),
    Metric("kl_sae", "nats", reconstruction.NO_TOKEN),
    Metric("kl_zero", "nats", reconstruction.NO_TOKEN),
    Metric("kl_mean", "nats", reconstruction.NO_TOKEN),
    Metric("kl_score", "1", NO_EFFECT),
    Metric("kl_score_mean", "1", NO_EFFECT),
)

NO_MODEL = "no language model made the store"
"""why a synthetic store has no replay figures"""

NO_INTERVAL = "no interval, because a resample has fewer different {}s, hence more silent features"

STORED, REPLAYED = "store", "replayed_activations"
"""Where the reconstruction figures come from, as the result's file calls it."""


def outliers_left_out(result: SuiteResult) -> int:
    """Tokens that the reconstruction figures of a core result leave out."""
    facts = result.facts[STORED if STORED in result.facts else REPLAYED]
    return int(facts["n_outliers_left_out"])


def replay_figures(sums: Array) -> Array:
    """`METRICS` of (weighted) sums [..., sum]; NaN where undefined."""
    of = {name: sums[..., at] for at, name in enumerate(COLUMNS)}
    ce = {name: of[name] / of["n_ce"] for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean")}
    kl = {name: of[name] / of["n_kl"] for name in ("kl_sae", "kl_zero", "kl_mean")}

    def recovered(floor: str) -> Array:
        span = ce[floor] - ce["ce_clean"]
        return np.where(span != 0, (ce[floor] - ce["ce_sae"]) / span, np.nan)

    def score(floor: str) -> Array:
        return np.where(kl[floor] != 0, 1 - kl["kl_sae"] / kl[floor], np.nan)

    columns = {
        **ce,
        **kl,
        "loss_recovered": recovered("ce_zero"),
        "loss_recovered_mean": recovered("ce_mean"),
        "kl_score": score("kl_zero"),
        "kl_score_mean": score("kl_mean"),
    }
    return np.stack([columns[metric.name] for metric in METRICS], axis=-1)


def reconstruction_part(
    sae: SAE, found: Gathered, n_documents: int, counts: Array, unit: str = "document"
) -> tuple[dict[str, Estimate], dict[str, Draws], dict[str, Any]]:
    """Estimates, draws and facts of what was gathered; ``counts`` are the resamples of its units, each a ``unit``."""
    boot = bootstrap(found.sums, lambda sums: reconstruction.figures(sums, sae.d_in), counts)
    estimates, draws = estimates_of(reconstruction.METRICS, boot, n_documents, unit)
    dead = found.firings == 0
    parts = {"": dead}
    if sae.block_size:
        parts |= {"_H": dead[: sae.block_size], "_L": dead[sae.block_size :]}
    else:
        for name in ("l0_H", "l0_L"):
            del estimates[name]
            draws.pop(name, None)
    for part, members in parts.items():
        name = f"dead_fraction{part}"
        share, reason = float(members.mean()) if len(members) else None, NO_INTERVAL.format(unit)
        if not found.n_kept:
            share, reason = None, f"undefined, because {reconstruction.NO_TOKEN}"
        estimates[name] = Estimate.count(name, "fraction of features", share, n_documents, reason)
    facts = {
        "n_documents": n_documents,
        "n_kept": found.n_kept,
        "n_outliers_left_out": found.n_outliers,
        "density_of_all_features": None if not found.n_kept else _densities(found),
    }
    return estimates, draws, facts


def _densities(found: Gathered) -> dict[str, float]:
    """Mean over all features, and the share of those that fire often; dead ones included."""
    density = found.firings / found.n_kept
    return {
        "mean": float(density.mean()),
        "over_1_percent": float(np.mean(density > 0.01)),
        "over_10_percent": float(np.mean(density > 0.1)),
    }


def store_part(
    sae: SAE, held_out: HeldOut, *, n_bootstrap: int, seed: int, advance: Callable[[int], None] | None = None
) -> tuple[dict[str, Estimate], dict[str, Draws], dict[str, Any]]:
    """`reconstruction_part` of the stored activations; ``advance`` is told the rows of each block."""
    units = held_out.units(MAX_UNITS)
    centre = torch.from_numpy(held_out.store.statistics(held_out.hook).mean)
    found = reconstruction.store_sums(sae, held_out.blocks(), units, centre, advance)
    counts = resample_counts(len(found.sums), n_bootstrap, seed)
    estimates, draws, facts = reconstruction_part(sae, found, held_out.n_documents, counts)
    return (
        estimates,
        draws,
        facts
        | {
            "n_tokens": held_out.n_tokens,
            "outlier_norm": held_out.outlier_norm,
        },
    )


@dataclass(frozen=True, slots=True)
class CoreResult:
    """The suite's result for one SAE and what SAEBench's file holds beside it."""

    result: SuiteResult
    """repaired figures"""
    metrics: dict[str, dict[str, float]]
    """``eval_result_metrics``"""
    details: list[dict[str, Any]]
    """``eval_result_details``"""


def run_replay(replay: Replay, text: ReplayText, checkpoint: ReplayCheckpoint, bar: tqdm[Any]) -> None:
    """Run what is left of the batches; stopped between two of them it loses nothing, killed a minute at most.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C or SIGTERM, after the batch that was begun; a second one does not wait for it
    """
    checkpoint.load(replay)
    if replay.n_batches < len(text.batches):
        replay.share_again(text.batches)
    bar.update(sum(sum(batch.length) for batch in text.batches[: replay.n_batches]))
    with stop_on_signal() as stop:
        for batch in text.batches[replay.n_batches :]:
            replay.add(batch)
            bar.update(sum(batch.length))
            checkpoint.save_if_due(replay)
            if stop.requested:
                checkpoint.save(replay)
                raise KeyboardInterrupt
    checkpoint.save(replay)


def core_result(
    sae: SAE,
    at: int,
    print_: str,
    replay: Replay,
    text: ReplayText,
    conditions: dict[str, Any],
    advance: Callable[[int], None],
) -> CoreResult:
    """The core suite's result for SAE number ``at`` of a finished replay.

    ``advance`` is told the stored rows that were read.
    """
    n_bootstrap, seed = conditions["n_bootstrap"], conditions["seed"]
    counts = resample_counts(len(replay.n_kl), n_bootstrap, seed)
    if replay.gathered is not None:
        source = REPLAYED
        estimates, draws, activations = reconstruction_part(
            sae, replay.gathered[at], text.n_documents, counts, text.unit
        )
    else:
        assert text.held_out is not None
        source = STORED
        estimates, draws, activations = store_part(
            sae, text.held_out, n_bootstrap=n_bootstrap, seed=seed, advance=advance
        )
    found = bootstrap(replay.sums(at), replay_figures, counts)
    more, more_draws = estimates_of(METRICS, found, text.n_documents, text.unit)
    figures, featurewise = replay.saebench_figures(at)
    figures["total_tokens_eval_reconstruction"] = text.n_positions
    figures["total_tokens_eval_sparsity_variance"] = text.n_positions
    metrics, undefined = saebench.by_category(figures)
    facts = {
        "conditions": conditions,
        source: {"metrics": list(estimates), **activations},
        "replay": {
            "metrics": list(more),
            "n_documents": text.n_documents,
            "n_contexts": sum(len(batch.length) for batch in text.batches),
            "n_batches": len(text.batches),
            "n_kept": int(replay.n_kl.sum()),
            "n_predictions": int(replay.n_ce.sum()),
            "resampled": f"{text.unit}s",
            **text.facts,
        },
        "undefined": undefined,
        "undefined_details": saebench.undefined_details(featurewise),
    }
    return CoreResult(
        SuiteResult(print_, {**estimates, **more}, {**draws, **more_draws}, facts),
        metrics,
        saebench.details(featurewise),
    )


def core_result_without_model(
    sae: SAE, print_: str, held_out: HeldOut, conditions: dict[str, Any], advance: Callable[[int], None]
) -> CoreResult:
    """The core suite's result on a store that no language model made: what the rows alone give.

    All figures of a replay, SAEBench's included, are undefined and say why; ``advance`` is told the rows read.
    """
    estimates, draws, activations = store_part(
        sae,
        held_out,
        n_bootstrap=conditions["n_bootstrap"],
        seed=conditions["seed"],
        advance=advance,
    )
    reason = f"undefined, because {NO_MODEL}"
    replayed = {metric.name: Estimate.count(metric.name, metric.unit, None, 0, reason) for metric in METRICS}
    nothing = {name: float("nan") for names in saebench.CATEGORIES.values() for name in names}
    metrics, undefined = saebench.by_category(nothing)
    facts = {
        "conditions": conditions,
        STORED: {"metrics": list(estimates), **activations},
        "replay": {"metrics": list(replayed), "n_batches": 0},
        "undefined": dict.fromkeys(undefined, reason),
    }
    return CoreResult(SuiteResult(print_, {**estimates, **replayed}, draws, facts), metrics, [])
