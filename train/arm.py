"""One SAE in training: its weights, its optimiser and one step of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcsae.train.batches import Rows
from tcsae.train.config import ArmConfig
from tcsae.train.losses import Contrast, auxiliary, fvu, info_nce
from tcsae.train.pairs import Pairs
from tcsae.train.precision import Linear
from tcsae.train.ring import Ring
from tcsae.train.sae.batch_topk import BatchTopK, Coded, Scaler
from tcsae.train.schedule import contrast_weight, learning_rate

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
        self.sae = BatchTopK(
            d_model,
            config.features(d_model),
            k=config.k,
            block_size=config.block_size(d_model),
            block_k=config.block_k,
            generator=torch.Generator().manual_seed(seed),
        ).to(device)
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

        Arms without a contrastive term measure it too where that is logged, without learning from it.
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
        reconstruction = fvu(batch.x, coded.reconstruction, weight)
        dead = sae.dead(config.dead_after)
        aux = self._auxiliary(batch, coded, dead, weight)
        objective = reconstruction + config.aux_weight * aux
        objective.backward()  # type: ignore[no-untyped-call]
        main_norm = self._gradient_norm() if detailed else math.nan

        alpha = contrast_weight(config, step, around.steps)
        contrast, ratio = None, math.nan
        if sae.block_size and (alpha > 0 or detailed):
            contrast = self._contrast(batch, pairs, around, detailed, learn=alpha > 0)
        if contrast is not None and alpha > 0 and contrast.n_pairs:
            ratio = self._add_gradient(alpha * contrast.loss, main_norm)

        sae.remove_parallel_gradient()
        self.optimizer.step()
        sae.after_step(coded, n_tokens)

        terms = {
            "loss": objective.item() + (alpha * contrast.loss.item() if contrast is not None else 0.0),
            "fvu": reconstruction.item(),
            "l0": len(coded.values) / n_tokens,
            "dead_share": sum(len(features) for features in dead) / len(sae.b_enc),
            "n_pairs": contrast.n_pairs if contrast is not None else 0,
        }
        in_block = int((coded.active.feature < sae.block_size).sum())
        terms |= {"l0_h": in_block / n_tokens, "l0_l": (len(coded.values) - in_block) / n_tokens}
        terms |= {f"dead_{block}": 0 for block in ("h", "l")}
        terms |= {
            f"dead_{block}": len(features) for block, features in zip(sae.block_names, dead, strict=True)
        }
        if detailed:
            terms |= self._details(batch, coded, around, contrast, n_tokens)
            terms |= {
                "auxiliary": aux.item(),
                "alpha": alpha,
                "gradient_norm": main_norm,
                "gradient_ratio": ratio,
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
                W, b = sae.W_enc[features], sae.b_enc[features]
                code = torch.nn.functional.linear(batch.x, W, b - W @ sae.b_dec)
                total = total + auxiliary(error, code, sae.W_dec[features], self.config.aux_k, weight)
        return total

    def _contrast(
        self, batch: Rows, pairs: Pairs, around: Surroundings, detailed: bool, learn: bool
    ) -> Contrast:
        sae, device = self.sae, batch.x.device
        anchor = torch.from_numpy(pairs.anchor).to(device)
        positive = torch.from_numpy(pairs.positive).to(device)
        with torch.set_grad_enabled(learn):
            W, bias = sae.block_encoder()
            frozen_W, frozen_bias = W.detach(), bias.detach()

            def encode(raw: Tensor) -> Tensor:
                return around.linear(around.scaler.normalise(raw), frozen_W, frozen_bias).relu_()

            return info_nce(
                around.linear(batch.x[anchor], W, bias).relu(),
                around.linear(batch.x[positive], W, bias).relu(),
                torch.from_numpy(batch.document[pairs.anchor]).to(device),
                torch.from_numpy(batch.source[pairs.anchor]).to(device),
                around.ring.keys(encode),
                self.config.temperature,
                within_source=detailed,
            )

    def _gradient_norm(self) -> float:
        grads = [p.grad for p in self.sae.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _add_gradient(self, loss: Tensor, main_norm: float) -> float:
        """Add the gradient of ``loss``; return its norm relative to ``main_norm``."""
        parameters = [self.sae.W_enc, self.sae.b_enc, self.sae.b_dec]
        grads = torch.autograd.grad(loss, parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(grad)
        return float(torch.nn.utils.get_total_norm(grads)) / main_norm if main_norm > 0 else math.nan

    def _details(
        self,
        batch: Rows,
        coded: Coded,
        around: Surroundings,
        contrast: Contrast | None,
        n_tokens: int,
    ) -> dict[str, Any]:
        values = coded.values.detach()
        in_block = coded.active.feature < self.sae.block_size
        energy = values.double().square()
        error = (batch.x - coded.reconstruction.detach())[batch.valid].double().square().sum(dim=1)
        in_raw_units = around.scaler.scale**2
        # Without keys the loss is 0 for want of anything to tell apart, which would look like success.
        loss = contrast.loss.item() if contrast is not None and around.ring.filled else math.nan
        found = {**(contrast._asdict() if contrast is not None else {}), "contrast": loss}
        details = {
            "l2": error.mean().item() / in_raw_units,
            "l1": values.double().sum().item() / n_tokens / around.scaler.scale,
            "energy_h": (energy[in_block].sum() / energy.sum()).item(),
            "outliers": int((~batch.valid).sum()),
            "ring_filled": around.ring.filled,
        }
        for block in ("h", "l"):
            details[f"threshold_{block}"] = math.nan
        for block, threshold in zip(self.sae.block_names, self.sae.thresholds.tolist(), strict=True):
            details[f"threshold_{block}"] = threshold
        for field in ("contrast", "accuracy", "accuracy_within_source", "masked_share", "empty_share"):
            details[field] = found.get(field, math.nan)
        return details
