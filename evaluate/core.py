"""The core suite: what the SAE costs the model, and how well it reconstructs.

Two sources, never mixed. *Store*: reconstruction and sparsity on the stored activations of every held-out
token (`reconstruction`). *Replay*: the model runs on some of those contexts with the SAE spliced in, which
gives cross-entropy and KL and, on the same batches, all of SAEBench's own figures (`saebench`).

Repaired figures of the replay (sums over tokens per document, in float64; KL through log_softmax; nothing is
spliced or ablated at special tokens):

    ce_clean, ce_sae, ce_zero, ce_mean   mean next-token cross-entropy over kept tokens with a kept target
    kl_sae, kl_zero, kl_mean             mean KL(clean || variant) over kept tokens
    loss_recovered       (ce_zero - ce_sae) / (ce_zero - ce_clean)
    loss_recovered_mean  the same with ce_mean: on zero ablation, a weak floor, the mean alone scores high
    kl_score, kl_score_mean   1 - kl_sae / kl_zero, 1 - kl_sae / kl_mean
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate import reconstruction, saebench
from tcsae.evaluate.estimates import Draws, Estimate, Metric, SuiteResult, estimates_of
from tcsae.evaluate.heldout import Batch, HeldOut
from tcsae.evaluate.intervals import MAX_UNITS, Array, bootstrap, resample_counts
from tcsae.evaluate.language import kl_divergence, next_token_loss, saebench_kl
from tcsae.evaluate.splice import Ablation, ReplayModel, Splicer
from tcsae.train.sae.inference import SAE

COLUMNS = ("n_kl", "n_ce", "ce_clean", "ce_zero", "ce_mean", "kl_zero", "kl_mean", "ce_sae", "kl_sae")
"""Sums per document; the last two belong to one SAE, the others to all."""

N_SHARED = 7
"""`COLUMNS` that do not depend on the SAE."""

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

NO_INTERVAL = "no interval, because a resample has fewer different documents, hence more silent features"


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


@dataclass(slots=True)
class _Losses:
    """Sums of one variant's losses: per document for the repaired figures, in all for SAEBench's."""

    ce: Array
    kl: Array
    saebench_ce: float = 0.0
    saebench_kl: float = 0.0


class Replay:
    """One pass over the batches for any number of SAEs at one hook; everything but the SAEs is shared.

    Parameters
    ----------
    model, hook
        what is run and where it is cut
    mean
        what the mean ablation puts there: the store's mean over the train split
    saes
        what is spliced
    n_documents
        documents that the batches come from
    """

    def __init__(
        self,
        model: ReplayModel,
        hook: str,
        mean: Float[Tensor, " d_model"],
        saes: Sequence[SAE],
        n_documents: int,
    ) -> None:
        self._splicer = Splicer(model, hook)
        self._saes = saes
        zero = torch.zeros_like(mean)
        self._ablations = {
            "zero": Ablation(self._splicer, zero, everywhere=False),
            "mean": Ablation(self._splicer, mean, everywhere=False),
            "saebench": Ablation(self._splicer, zero, everywhere=True),
        }
        self.n_documents = n_documents
        self.n_kl = np.zeros(n_documents)
        self.n_ce = np.zeros(n_documents)
        self._n_saebench_ce = 0
        self._clean = self._new_losses()
        self._ablated = {name: self._new_losses() for name in self._ablations}
        self._spliced = [self._new_losses() for _ in saes]
        self._reconstruction = [saebench.ReconstructionFigures() for _ in saes]
        self._features = [saebench.FeatureFigures(sae.d_sae) for sae in saes]
        self._n_batches = 0

    def _new_losses(self) -> _Losses:
        return _Losses(np.zeros(self.n_documents), np.zeros(self.n_documents))

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the model on one batch: once as it is, once per SAE, and the ablations as far as they need."""
        x = self._splicer.activations(batch)
        keep = batch.keep.to(x.device)
        clean = self._splicer.log_probs(batch, x)
        self._count(batch)
        self._add_losses(self._clean, batch, clean, None)
        for name, ablation in self._ablations.items():
            self._add_losses(self._ablated[name], batch, clean, ablation.log_probs(batch, x))
        kept = x[keep]
        for at, sae in enumerate(self._saes):
            f = sae.encode(kept.to(sae.device))
            xh = sae.decode(f)
            self._reconstruction[at].add(kept.to(sae.device), f, xh)
            self._features[at].add(f, saebench.rows_of(batch.keep), len(batch.length))
            replacement = x.clone()
            replacement[keep] = xh.to(x)
            self._add_losses(self._spliced[at], batch, clean, self._splicer.log_probs(batch, replacement))
        self._n_batches += 1

    def _count(self, batch: Batch) -> None:
        for row, (length, document) in enumerate(zip(batch.length, batch.document, strict=True)):
            keep = batch.keep[row, :length]
            self.n_kl[document] += int(keep.sum())
            self.n_ce[document] += int((keep[:-1] & keep[1:]).sum())
            self._n_saebench_ce += int(keep[:-1].sum())

    def _add_losses(
        self,
        losses: _Losses,
        batch: Batch,
        clean: Float[Tensor, "batch position vocab"],
        other: Float[Tensor, "batch position vocab"] | None,
    ) -> None:
        """Add one variant's losses on one batch; None stands for the clean pass itself."""
        for row, (length, document) in enumerate(zip(batch.length, batch.document, strict=True)):
            keep = batch.keep[row, :length]
            tokens = batch.input_ids[row, :length]
            p = clean[row, :length]
            q = p if other is None else other[row, :length]
            ce = next_token_loss(q, tokens.to(q.device)).double().cpu()
            losses.ce[document] += ce[keep[:-1] & keep[1:]].sum().item()
            losses.saebench_ce += ce[keep[:-1]].sum().item()
            if other is not None:
                kept = keep.to(q.device)
                kl = kl_divergence(p, q)[kept]
                losses.kl[document] += kl.sum(dtype=torch.float64).item()
                losses.saebench_kl += saebench_kl(p, q, kl=kl, kept=kept).sum(dtype=torch.float64).item()

    def sums(self, at: int) -> Float[np.ndarray, "document sum"]:
        """`COLUMNS` of SAE number ``at``."""
        zero, mean = self._ablated["zero"], self._ablated["mean"]
        one = self._spliced[at]
        columns = (self.n_kl, self.n_ce, self._clean.ce, zero.ce, mean.ce, zero.kl, mean.kl, one.ce, one.kl)
        return np.stack(columns, axis=1)

    def saebench_figures(self, at: int) -> tuple[dict[str, float], dict[str, Float[Tensor, " feature"]]]:
        """SAEBench's figures of SAE number ``at`` (without ``token_stats``), and the featurewise ones."""
        n_kl, n_ce = int(self.n_kl.sum()), self._n_saebench_ce
        one, ablated = self._spliced[at], self._ablated["saebench"]

        def pooled(total: float, count: int) -> float:
            return total / count if count else float("nan")

        losses = {
            "kl_div_with_sae": pooled(one.saebench_kl, n_kl),
            "kl_div_with_ablation": pooled(ablated.saebench_kl, n_kl),
            "ce_loss_without_sae": pooled(self._clean.saebench_ce, n_ce),
            "ce_loss_with_sae": pooled(one.saebench_ce, n_ce),
            "ce_loss_with_ablation": pooled(ablated.saebench_ce, n_ce),
        }
        sae = self._saes[at]
        featurewise = {
            **self._features[at].figures(),
            **saebench.weight_figures(sae.W_enc.cpu(), sae.b_enc.cpu(), sae.W_dec.cpu()),
        }
        figures = {
            **saebench.scores(losses),
            **self._reconstruction[at].figures(),
            **saebench.misc_metrics(featurewise),
        }
        return figures, featurewise


def store_part(
    sae: SAE, held_out: HeldOut, *, n_bootstrap: int, seed: int
) -> tuple[dict[str, Estimate], dict[str, Draws], dict[str, Any]]:
    """Estimates, draws and facts from the stored activations alone."""
    units = held_out.units(MAX_UNITS)
    centre = torch.from_numpy(held_out.store.statistics(held_out.hook).mean)
    found = reconstruction.store_sums(sae, held_out.blocks(), units, centre)
    boot = bootstrap(
        found.sums,
        lambda sums: reconstruction.figures(sums, sae.d_in),
        resample_counts(len(found.sums), n_bootstrap, seed),
    )
    estimates, draws = estimates_of(reconstruction.METRICS, boot, held_out.n_documents)
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
        share = float(members.mean()) if len(members) else None
        estimates[name] = Estimate.count(
            name, "fraction of features", share, held_out.n_documents, NO_INTERVAL
        )
    facts = {
        "n_documents": held_out.n_documents,
        "n_tokens": held_out.n_tokens,
        "n_kept": found.n_kept,
        "n_outliers_left_out": found.n_outliers,
        "outlier_norm": held_out.outlier_norm,
        "density_of_all_features": {
            "mean": float(found.firings.mean() / max(found.n_kept, 1)),
            "over_1_percent": float(np.mean(found.firings > 0.01 * found.n_kept)),
            "over_10_percent": float(np.mean(found.firings > 0.1 * found.n_kept)),
        },
    }
    return estimates, draws, facts


@dataclass(frozen=True, slots=True)
class CoreResult:
    """The suite's result for one SAE and what SAEBench's file holds beside it."""

    result: SuiteResult
    """repaired figures"""
    metrics: dict[str, dict[str, float]]
    """``eval_result_metrics``"""
    details: list[dict[str, Any]]
    """``eval_result_details``"""


def core_results(
    saes: Sequence[SAE],
    prints: Sequence[str],
    held_out: HeldOut,
    model: ReplayModel,
    *,
    max_tokens: int,
    batch_size: int,
    n_bootstrap: int,
    seed: int,
    advance: Callable[[int], None],
) -> list[CoreResult]:
    """The core suite for several SAEs at one hook, which share every pass that does not depend on them.

    ``advance`` is told the tokens of each finished batch; ``prints`` are the fingerprints to carry.
    """
    batches = held_out.batches(max_tokens, batch_size, seed)
    n_documents = 1 + max(document for batch in batches for document in batch.document)
    mean = torch.from_numpy(held_out.store.statistics(held_out.hook).mean).float()
    replay = Replay(model, held_out.hook, mean, saes, n_documents)
    for batch in batches:
        replay.add(batch)
        advance(sum(batch.length))
    counts = resample_counts(n_documents, n_bootstrap, seed)
    context = held_out.store.provenance.context_length
    n_positions = context * len(batches) * batch_size
    results = []
    for at, (sae, print_) in enumerate(zip(saes, prints, strict=True)):
        estimates, draws, from_store = store_part(sae, held_out, n_bootstrap=n_bootstrap, seed=seed)
        more, more_draws = estimates_of(
            METRICS, bootstrap(replay.sums(at), replay_figures, counts), n_documents
        )
        figures, featurewise = replay.saebench_figures(at)
        figures["total_tokens_eval_reconstruction"] = n_positions
        figures["total_tokens_eval_sparsity_variance"] = n_positions
        metrics, undefined = saebench.by_category(figures)
        facts = {
            "conditions": {
                "store": held_out.store.id,
                "split": held_out.split,
                "max_tokens": max_tokens,
                "n_bootstrap": n_bootstrap,
                "seed": seed,
            },
            "store": {"metrics": list(estimates), **from_store},
            "replay": {
                "metrics": list(more),
                "n_documents": n_documents,
                "n_contexts": sum(len(batch.length) for batch in batches),
                "n_batches": len(batches),
                "n_kept": int(replay.n_kl.sum()),
                "n_predictions": int(replay.n_ce.sum()),
            },
            "undefined": undefined,
        }
        results.append(
            CoreResult(
                SuiteResult(print_, {**estimates, **more}, {**draws, **more_draws}, facts),
                metrics,
                saebench.details(featurewise),
            )
        )
    return results
