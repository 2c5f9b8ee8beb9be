"""SAEBench's core metrics, by its names and to its definitions (0.6.0), faults included.

These are for comparison with published figures; `reconstruction` and `core` hold the repaired ones, which
our own tables and plots quote. Where SAEBench runs its model in float32, the figures agree to 1e-4; in
bfloat16, as for Gemma, its sums round more coarsely than that. Departures, in float32 all of them below 1e-4
or outside what SAEBench can be given:

- sums are taken in float64, not in the model's dtype;
- both halves of the evaluation use the same batches (SAEBench's reset does not reset, so its sparsity and
  variance come from other text than its losses);
- a row shorter than the context is padded, which SAEBench never sees: padding is treated as a special token
  is (not kept), and it is no target of the cross-entropy either. ``token_stats`` counts it, as it counts all
  masked positions;
- an infinite figure is written as -1 like NaN (SAEBench writes the invalid JSON ``Infinity``), and every -1
  that stands for one of them is listed, with its reason, in ``eval_result_unstructured.tcsae.undefined``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

CATEGORIES: dict[str, tuple[str, ...]] = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}
"""All seven categories of ``eval_result_metrics`` and their fields."""

_POOLED = (
    "mse",
    "cossim",
    "explained_variance_legacy",
    "l2_norm_in",
    "l2_norm_out",
    "l2_ratio",
    "l0",
    "l1",
)
_BATCH_MEANS = ("r", "x_square", "bias")

SMALL_NORM = 1e-4
"""Below this the norm in ``l2_ratio``'s denominator is replaced by 1."""


class ReconstructionFigures:
    """Reconstruction, shrinkage and sparsity, gathered batch by batch over the kept positions.

    N kept positions in a batch, r = ||x - xh||^2. Pooled figures are one mean over the positions of all
    batches, the others unweighted means of batch means, as SAEBench has each.
    """

    def __init__(self) -> None:
        self._pooled = dict.fromkeys(_POOLED, 0.0)
        self._n_pooled = 0
        self._means: dict[str, list[float]] = {name: [] for name in _BATCH_MEANS}
        self._d_model = 0

    def add(
        self,
        x: Float[Tensor, "kept d_model"],
        f: Float[Tensor, "kept feature"],
        xh: Float[Tensor, "kept d_model"],
    ) -> None:
        """Add one batch's kept positions; a batch without any is left out."""
        if not len(x):
            return
        x, xh, l1 = x.double(), xh.double(), f.sum(dim=-1, dtype=torch.float64)
        r = (x - xh).square().sum(dim=-1)
        norm_x, norm_xh = x.norm(dim=-1), xh.norm(dim=-1)
        dot = (x * xh).sum(dim=-1)
        per_token = {
            "mse": r / len(x),  # divided by the batch's N: the figure depends on the batch size
            "cossim": dot / (norm_x * norm_xh),
            "explained_variance_legacy": 1 - r / (x - x.mean(dim=0)).square().sum(dim=-1),
            "l2_norm_in": norm_x,
            "l2_norm_out": norm_xh,
            "l2_ratio": norm_xh / torch.where(norm_x < SMALL_NORM, 1.0, norm_x),
            "l0": (f != 0).sum(dim=-1).double(),
            "l1": l1,
        }
        for name, values in per_token.items():
            self._pooled[name] += values.sum().item()
        self._n_pooled += len(x)
        self._means["r"].append(r.mean().item())
        self._means["x_square"].append(x.square().sum(dim=-1).mean().item())
        square, inner = xh.square().sum(dim=-1).mean().item(), dot.mean().item()
        self._means["bias"].append(square / inner if inner else math.nan)
        self._d_model = x.shape[1]

    def figures(self) -> dict[str, float]:
        """By SAEBench's names; NaN without a kept position."""
        if not self._n_pooled:
            return dict.fromkeys(
                (*CATEGORIES["reconstruction_quality"], *CATEGORIES["shrinkage"], *CATEGORIES["sparsity"]),
                math.nan,
            )
        pooled = {name: total / self._n_pooled for name, total in self._pooled.items()}
        mean = {name: math.fsum(values) / len(values) for name, values in self._means.items()}
        # not centred: the square of the scalar mean of x_i^2 stands where ||mean x||^2 belongs
        total = mean["x_square"] - (mean["x_square"] / self._d_model) ** 2
        return {
            **pooled,
            "explained_variance": 1 - mean["r"] / total if total else math.nan,
            "relative_reconstruction_bias": mean["bias"],
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything gathered so far, for `restore`."""
        return {
            "pooled": np.array([*self._pooled.values()]),
            "counts": np.array([self._n_pooled, self._d_model]),
            "means": np.array([*self._means.values()]).reshape(len(_BATCH_MEANS), -1),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._pooled = dict(zip(_POOLED, state["pooled"].tolist(), strict=True))
        self._n_pooled, self._d_model = state["counts"].tolist()
        self._means = dict(zip(_BATCH_MEANS, state["means"].tolist(), strict=True))


class FeatureFigures:
    """How often each feature fires at kept positions, and in how many rows."""

    def __init__(self, d_sae: int) -> None:
        self._firings = torch.zeros(d_sae, dtype=torch.int64)
        self._rows = torch.zeros(d_sae, dtype=torch.int64)
        self._n_kept = 0

    def add(self, f: Float[Tensor, "kept feature"], row: Int64[Tensor, " kept"], n_rows: int) -> None:
        """Add one batch's kept positions; ``row`` is each one's row in the batch."""
        on = f > 0
        in_row = torch.zeros(n_rows, f.shape[1], device=f.device).index_add_(0, row.to(f.device), on.float())
        self._firings += in_row.sum(dim=0).to(torch.int64).cpu()
        self._rows += (in_row > 0).sum(dim=0).cpu()
        self._n_kept += len(f)

    def figures(self) -> dict[str, Float[Tensor, " feature"]]:
        """``feature_density`` and ``consistent_activation_heuristic`` (NaN for a dead feature)."""
        firings = self._firings.double()
        return {
            "feature_density": firings / self._n_kept,
            "consistent_activation_heuristic": firings / self._rows,
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything gathered so far, for `restore`."""
        return {
            "firings": self._firings.numpy(),
            "rows": self._rows.numpy(),
            "n_kept": np.array(self._n_kept),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._firings, self._rows = torch.from_numpy(state["firings"]), torch.from_numpy(state["rows"])
        self._n_kept = int(state["n_kept"])


def weight_figures(
    W_enc: Float[Tensor, "d_model feature"],
    b_enc: Float[Tensor, " feature"],
    W_dec: Float[Tensor, "feature d_model"],
) -> dict[str, Float[Tensor, " feature"]]:
    """The featurewise figures that need weights only."""
    columns, rows = W_enc.double(), W_dec.double()
    unit_columns = columns / columns.norm(dim=0)
    unit_rows = rows / rows.norm(dim=1, keepdim=True)
    return {
        "encoder_bias": b_enc.double(),
        "encoder_norm": columns.norm(dim=0),
        "encoder_decoder_cosine_sim": (unit_columns.T * unit_rows).sum(dim=1),
        "max_encoder_cosine_sim": largest_cosine(W_enc.T),
        "max_decoder_cosine_sim": largest_cosine(W_dec),
    }


def largest_cosine(
    vectors: Float[Tensor, "feature d_model"], at_once: int = 512
) -> Float[Tensor, " feature"]:
    """The largest cosine of each vector with any other; -inf if there is no other, 0 for a zero vector."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=1, eps=1e-12)
    largest = []
    for start in range(0, len(unit), at_once):
        cosines = unit[start : start + at_once] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        largest.append(cosines.amax(dim=1))
    return torch.cat(largest).double()


def misc_metrics(featurewise: dict[str, Float[Tensor, " feature"]]) -> dict[str, float]:
    """SAEBench's ``misc_metrics`` of the featurewise figures; all are fractions of features or densities."""
    density = featurewise["feature_density"]
    total = density.sum().item()
    figures = {
        "frac_alive": (density > 0).double().mean().item(),
        "average_max_encoder_cosine_sim": featurewise["max_encoder_cosine_sim"].mean().item(),
        "average_max_decoder_cosine_sim": featurewise["max_decoder_cosine_sim"].mean().item(),
    }
    for percent, bound in ((1, 0.01), (10, 0.1)):
        over = density > bound
        figures[f"freq_over_{percent}_percent"] = over.double().mean().item()
        figures[f"normalized_freq_over_{percent}_percent"] = (
            density[over].sum().item() / total if total > 0 else 0.0
        )
    return figures


def scores(losses: dict[str, float]) -> dict[str, float]:
    """``losses`` (pooled KL and cross-entropy) with ``kl_div_score`` and ``ce_loss_score``."""
    kl_ablated = losses["kl_div_with_ablation"]
    span = losses["ce_loss_with_ablation"] - losses["ce_loss_without_sae"]
    return {
        **losses,
        "kl_div_score": (kl_ablated - losses["kl_div_with_sae"]) / kl_ablated if kl_ablated else math.nan,
        "ce_loss_score": (
            (losses["ce_loss_with_ablation"] - losses["ce_loss_with_sae"]) / span if span else math.nan
        ),
    }


def by_category(figures: dict[str, float]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """``eval_result_metrics`` with -1 for every undefined figure, and the reason for each such -1."""
    metrics: dict[str, dict[str, float]] = {}
    undefined: dict[str, str] = {}
    for category, names in CATEGORIES.items():
        metrics[category] = {}
        for name in names:
            value = figures[name]
            if not math.isfinite(value):
                undefined[name] = f"{value} by SAEBench's definition; SAEBench would write " + (
                    "-1" if math.isnan(value) else "the invalid JSON Infinity"
                )
                value = -1.0
            metrics[category][name] = value
    return metrics, undefined


FEATUREWISE = {
    "consistent_activation_heuristic": "the feature never fires",
    "encoder_bias": "the bias is not finite",
    "encoder_decoder_cosine_sim": "the feature's encoder or decoder is zero",
    "encoder_norm": "the encoder is not finite",
    "feature_density": "no token is kept",
    "max_decoder_cosine_sim": "there is no other feature",
    "max_encoder_cosine_sim": "there is no other feature",
}
"""Fields of ``eval_result_details``, and when each is undefined."""


def details(featurewise: dict[str, Float[Tensor, " feature"]]) -> list[dict[str, Any]]:
    """``eval_result_details``: one object a feature, rounded to 10 decimals, -1 for what is not finite."""
    columns = {name: featurewise[name].tolist() for name in FEATUREWISE}
    return [
        {
            "index": at,
            **{
                name: round(values[at], 10) if math.isfinite(values[at]) else -1.0
                for name, values in columns.items()
            },
        }
        for at in range(len(featurewise["feature_density"]))
    ]


def undefined_details(featurewise: dict[str, Float[Tensor, " feature"]]) -> dict[str, dict[str, Any]]:
    """For each field of `details` with a -1 that stands for no figure: of how many features, and why."""
    n_undefined = {name: int((~torch.isfinite(featurewise[name])).sum()) for name in FEATUREWISE}
    return {
        name: {"n_features": n, "reason": f"undefined, because {FEATUREWISE[name]}"}
        for name, n in n_undefined.items()
        if n
    }


def rows_of(keep: Bool[Tensor, "batch position"]) -> Int64[Tensor, " kept"]:
    """The row of each kept position, in the order in which ``tensor[keep]`` lists them."""
    return torch.nonzero(keep)[:, 0]
