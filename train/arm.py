"""One SAE in training: its weights, its optimiser and one step of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcsae.train.batches import Rows
from tcsae.train.config import ArmConfig
from tcsae.train.losses import Contrast, auxiliary
from tcsae.train.pairs import Pairs
from tcsae.train.precision import Linear
from tcsae.train.ring import Ring
from tcsae.train.sae.build import build
from tcsae.train.sae.code import Coded
from tcsae.train.scaler import Scaler
from tcsae.train.schedule import contrast_weight, learning_rate, sparsity_weight
from tcsae.train.temporal import temporal_term

BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all arms share."""

    scaler: Scaler
    ring: Ring
    linear: Linear
    buffer: Tensor
    """[B * F of the widest arm], for pre-activations; each arm overwrites it"""
    steps: int
    """of the whole run"""


class Arm:
    """The SAE of one arm and seed, with its optimiser."""

    def __init__(self, config: ArmConfig, seed: int, d_model: int, device: torch.device) -> None:
        self.config, self.seed = config, seed
        self.sae = build(d_model, config, seed).to(device)
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(), lr=config.learning_rate, betas=BETAS, fused=True
        )

    @property
    def name(self) -> str:
        """Of the SAE's folder: ``<arm>-s<seed>``."""
        return f"{self.config.name}-s{self.seed}"

    def step(
        self, batch: Rows, pairs: Pairs, around: Surroundings, step: int, *, detailed: bool
    ) -> dict[str, Any]:
        """One optimiser step; the terms of the loss, with everything that is logged if ``detailed``.

        Arms without a temporal term measure it too where that is logged, without learning from it.
        """
        config, sae = self.config, self.sae
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, around.steps)
        self.optimizer.zero_grad(set_to_none=True)

        weight = batch.valid.float()
        # A batch of outliers alone has a loss of nan, which stops the run; counts must not fail before that.
        n_tokens = max(int(batch.valid.sum()), 1)
        out = around.buffer[: len(batch.x) * len(sae.b_enc)].view(len(batch.x), -1)
        coded = sae(batch.x, batch.valid, around.linear, out)
        losses = sae.losses(batch.x, coded, weight)
        dead = sae.dead(config.dead_after)
        aux = self._auxiliary(batch, coded, dead, weight)
        sparsity = sparsity_weight(config, step, around.steps)
        objective = losses.fit + config.aux_weight * aux
        if sparsity > 0:
            objective = objective + sparsity * losses.sparsity
        l2 = math.nan
        if config.l2_weight > 0:
            penalty = sae.W_enc.square().sum() + sae.W_dec.square().sum()
            objective, l2 = objective + config.l2_weight * penalty, penalty.item()

        alpha = contrast_weight(config, step, around.steps)
        temporal, extra = None, None
        if sae.block_size and (alpha > 0 or detailed):
            temporal = self._temporal(batch, coded, pairs, around, detailed, learn=alpha > 0)
        if temporal is not None and alpha > 0 and temporal.n_pairs:
            extra = self._gradient_of(alpha * temporal.loss)
        objective.backward()  # type: ignore[no-untyped-call]
        main_norm = self._gradient_norm() if detailed else math.nan
        if extra is not None:
            self._add_gradient(extra)
        if config.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
        sae.remove_parallel_gradient()
        self.optimizer.step()
        sae.after_step(coded, n_tokens)

        terms = {
            "loss": objective.item() + (alpha * temporal.loss.item() if temporal is not None else 0.0),
            "fvu": losses.fvu.item(),
            "n_pairs": temporal.n_pairs if temporal is not None else 0,
            **self._counts(coded, dead, n_tokens),
        }
        if detailed:
            terms |= self._details(batch, coded, around, temporal, n_tokens)
            terms |= {
                "fit": losses.fit.item(),
                "sparsity": losses.sparsity.item(),
                "sparsity_weight": sparsity,
                "l2_penalty": l2,
                "auxiliary": aux.item(),
                "alpha": alpha,
                "gradient_norm": main_norm,
                "gradient_ratio": _norm(extra) / main_norm if extra and main_norm > 0 else math.nan,
                "learning_rate": learning_rate(config, step, around.steps),
            }
        return terms

    def _auxiliary(self, batch: Rows, coded: Coded, dead: list[Tensor], weight: Tensor) -> Tensor:
        """AuxK of each block that has dead features, summed: neither's dead crowd out the other's."""
        total = batch.x.new_zeros(())
        if self.config.aux_k == 0 or self.config.aux_weight == 0:
            return total
        sae, error = self.sae, (batch.x - coded.reconstruction).detach()
        for features in dead:
            if len(features):
                code = torch.nn.functional.linear(batch.x, *sae.encoder_of(features))
                total = total + auxiliary(error, code, sae.W_dec[features], self.config.aux_k, weight)
        return total

    def _temporal(
        self, batch: Rows, coded: Coded, pairs: Pairs, around: Surroundings, detailed: bool, learn: bool
    ) -> Contrast:
        return temporal_term(
            self.config,
            self.sae,
            coded,
            batch,
            pairs,
            around.ring,
            around.scaler,
            around.linear,
            detailed=detailed,
            learn=learn,
        )

    def _gradient_norm(self) -> float:
        return _norm([p.grad for p in self.sae.parameters() if p.grad is not None])

    def _gradient_of(self, loss: Tensor) -> list[Tensor]:
        """Of the temporal term; what it does not reach has none."""
        grads = torch.autograd.grad(
            loss,
            list(self.sae.parameters()),
            allow_unused=True,
            # The code that decodes has the reconstruction's graph, which is gone through again after this.
            retain_graph=self.config.contrasted_code == "after_top_k",
        )
        return [
            p.new_zeros(()) if g is None else g for p, g in zip(self.sae.parameters(), grads, strict=True)
        ]

    def _add_gradient(self, extra: list[Tensor]) -> None:
        for parameter, grad in zip(self.sae.parameters(), extra, strict=True):
            if grad.ndim and parameter.grad is None:
                parameter.grad = grad
            elif parameter.grad is not None:
                parameter.grad.add_(grad)

    def _counts(self, coded: Coded, dead: list[Tensor], n_tokens: int) -> dict[str, Any]:
        """Active and dead features, all and of each block."""
        sae, code = self.sae, coded.code
        n_features = len(sae.b_enc)
        in_block, everywhere = code.count(0, sae.block_size), code.count(0, n_features)
        found: dict[str, Any] = {
            "l0": everywhere / n_tokens,
            "l0_h": in_block / n_tokens,
            "l0_l": (everywhere - in_block) / n_tokens,
            "dead_share": sum(len(features) for features in dead) / n_features,
            "dead_h": 0,
            "dead_l": 0,
        }
        return found | {
            f"dead_{block}": len(features) for block, features in zip(sae.block_names, dead, strict=True)
        }

    def _details(
        self,
        batch: Rows,
        coded: Coded,
        around: Surroundings,
        temporal: Contrast | None,
        n_tokens: int,
    ) -> dict[str, Any]:
        sae, code = self.sae, coded.code
        error = (batch.x - coded.reconstruction.detach())[batch.valid].double().square().sum(dim=1)
        in_raw_units = around.scaler.scale**2
        energy, in_block = code.energy(0, len(sae.b_enc)), code.energy(0, sae.block_size)
        # Without keys the loss is 0 for want of anything to tell apart, which would look like success.
        needs_keys = self.config.objective == "info_nce" and not around.ring.filled
        loss = math.nan if temporal is None or needs_keys else temporal.loss.item()
        found = {**(temporal._asdict() if temporal is not None else {}), "contrast": loss}
        details = {
            "l2": error.mean().item() / in_raw_units,
            "l1": code.total() / n_tokens / around.scaler.scale,
            "energy_h": in_block / energy if energy > 0 else math.nan,
            "outliers": int((~batch.valid).sum()),
            "ring_filled": around.ring.filled,
        }
        for block in ("h", "l"):
            details[f"threshold_{block}"] = math.nan
        for block, threshold in zip(sae.block_names, sae.running_thresholds, strict=False):
            details[f"threshold_{block}"] = threshold
        for field in ("contrast", "accuracy", "accuracy_within_source", "masked_share", "empty_share"):
            details[field] = found.get(field, math.nan)
        return details


def _norm(grads: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(grads)))
