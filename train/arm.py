"""One SAE in training: its weights, its optimiser and one step of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcsae.train.average import WeightAverage
from tcsae.train.batches import Rows
from tcsae.train.config import ArmConfig
from tcsae.train.losses import Contrast, auxiliary
from tcsae.train.optimizer import adam
from tcsae.train.pairs import Pairs
from tcsae.train.precision import Linear
from tcsae.train.resample import resample, resampling_is_due
from tcsae.train.ring import Ring
from tcsae.train.sae.build import build
from tcsae.train.sae.code import Coded, Sizes
from tcsae.train.scaler import Scaler
from tcsae.train.schedule import contrast_weight, learning_rate, sparsity_weight
from tcsae.train.slices import auxiliary_addend, losses_addend, temporal_addend, whole_code
from tcsae.train.temporal import temporal_term
from tcsae.train.window_reader import RESAMPLE, random_stream
from tcsae.train.world import ALONE, World


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all arms share."""

    scaler: Scaler
    ring: Ring
    linear: Linear
    dtype: torch.dtype
    """in which ``linear`` multiplies"""
    buffer: Tensor
    """[B * F of the widest arm], for pre-activations; each arm overwrites it"""
    steps: int
    """of the whole run"""


class Arm:
    """The SAE of one arm and seed, with its optimiser."""

    def __init__(
        self, config: ArmConfig, seed: int, d_model: int, device: torch.device, world: World = ALONE
    ) -> None:
        self.config, self.seed, self.world = config, seed, world
        self.sae = build(d_model, config, seed).to(device)
        self.sae.world = world
        self.optimizer = adam(list(self.sae.parameters()), config.learning_rate)
        self.average = WeightAverage(self.sae, config.average_decay) if config.average_decay > 0 else None
        self.resampled = torch.zeros((), dtype=torch.int64)
        """features that have begun anew so far, each time counted"""

    @property
    def name(self) -> str:
        """Of the SAE's folder: ``<arm>-s<seed>``."""
        return f"{self.config.name}-s{self.seed}"

    @property
    def takes_keys(self) -> bool:
        """Whether its temporal term, learnt from or only measured, is against the ring."""
        return bool(self.sae.block_size) and self.config.objective == "info_nce"

    def takes_pairs(self, *, detailed: bool) -> bool:
        """Whether a step has a temporal term: one to learn from, or to measure where all is logged."""
        return bool(self.sae.block_size) and (self.config.alpha > 0 or detailed)

    @torch.no_grad()
    def begin_at(self, centre: Tensor) -> None:
        """Before the first step: let the decoder's bias begin at ``centre`` [D]."""
        self.sae.b_dec.copy_(centre)
        if self.average is not None:
            self.average = WeightAverage(self.sae, self.config.average_decay)

    def own_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the SAE and its optimiser, by name."""
        averaged = self.average.tensors if self.average is not None else {}
        return {"resampled": self.resampled, **{f"average/{name}": t for name, t in averaged.items()}}

    def take_average(self) -> None:
        """Before the SAE is calibrated and saved: give it the averaged weights, if it has any."""
        if self.average is not None:
            self.average.give_to(self.sae)

    def step(
        self, batch: Rows, pairs: Pairs, around: Surroundings, step: int, *, detailed: bool
    ) -> dict[str, Any]:
        """One optimiser step; the terms of the loss, with everything that is logged if ``detailed``.

        Arms without a temporal term measure it too where that is logged, without learning from it. ``batch``
        is this process's slice, ``pairs`` and the terms are of the whole batch.
        """
        config, sae, world = self.config, self.sae, self.world
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, around.steps)

        weight = batch.valid.float()
        # A batch of outliers alone has a loss of nan, which stops the run; counts must not fail before that.
        n_tokens = max(int(world.totals(int(batch.valid.sum()))[0]), 1)
        out = around.buffer[: len(batch.x) * len(sae.b_enc)].view(len(batch.x), -1)
        coded = sae(batch.x, batch.valid, around.linear, out)
        # The optimiser's step changes the rows that this code is a code for.
        sizes = sae.sizes() if detailed else None
        losses = losses_addend(sae.losses(batch.x, coded, weight), batch.x, coded, weight, world)
        dead = sae.dead(config.dead_after)
        aux = self._auxiliary(batch, coded, dead, weight)
        sparsity = sparsity_weight(config, step, around.steps)
        objective = losses.fit + config.aux_weight * aux
        if sparsity > 0:
            objective = objective + sparsity * losses.sparsity
        l2 = math.nan
        if config.l2_weight > 0:
            penalty = sae.W_enc.square().sum() + sae.W_dec.square().sum()
            objective, l2 = objective + config.l2_weight / world.size * penalty, penalty.item()

        alpha = contrast_weight(config, step, around.steps)
        temporal, extra = None, None
        if self.takes_pairs(detailed=detailed):
            temporal = self._temporal(batch, coded, pairs, around, detailed, learn=alpha > 0)
        if temporal is not None and alpha > 0 and temporal.n_pairs:
            extra = self._gradient_of(alpha * temporal.loss)
        objective.backward()  # type: ignore[no-untyped-call]
        main_norm = math.nan
        if detailed:
            world.sum_gradients(list(sae.parameters()))
            main_norm = self._gradient_norm()
            if extra is not None:
                world.sum_(extra)
        if extra is not None:
            self._add_gradient(extra)
        if not detailed:
            world.sum_gradients(list(sae.parameters()))
        if config.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
        sae.remove_parallel_gradient()
        self.optimizer.step()
        # Now, not before the next step: the other arms' gradients come into this memory.
        self.optimizer.zero_grad(set_to_none=True)
        sae.after_step(coded, n_tokens)
        if resampling_is_due(config, step, around.steps):
            self._resample(batch, coded, step)
        if self.average is not None:
            self.average.update(sae, step + 1)

        main, explained, fit, penalised, auxiliary_loss, contrast = world.totals(
            objective.item(),
            losses.fvu.item(),
            losses.fit.item(),
            losses.sparsity.item(),
            aux.item(),
            temporal.loss.item() if temporal is not None else 0.0,
        )
        coded = coded._replace(code=whole_code(coded.code, len(batch.x), world))
        terms = {
            "loss": main + alpha * contrast,
            "fvu": explained,
            "fit": fit,
            "sparsity": penalised,
            "auxiliary": auxiliary_loss,
            "n_pairs": temporal.n_pairs if temporal is not None else 0,
            **self._counts(coded, dead, n_tokens),
        }
        if detailed:
            terms |= self._details(batch, coded, sizes, around, temporal, contrast, n_tokens)
            terms |= {
                "sparsity_weight": sparsity,
                "l2_penalty": l2,
                "resampled": int(self.resampled),
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
                total = total + auxiliary(error, code, sae.decoder_of(features), self.config.aux_k, weight)
        return auxiliary_addend(total, error, weight, self.world)

    def _temporal(
        self, batch: Rows, coded: Coded, pairs: Pairs, around: Surroundings, detailed: bool, learn: bool
    ) -> Contrast:
        def term(coded: Coded, batch: Rows, pairs: Pairs) -> Contrast:
            return temporal_term(
                self.config,
                self.sae,
                coded,
                batch,
                pairs,
                around.ring,
                around.scaler,
                around.linear,
                around.dtype,
                detailed=detailed,
                learn=learn,
            )

        return temporal_addend(self.config, term, coded, batch, pairs, self.world)

    def _resample(self, batch: Rows, coded: Coded, step: int) -> None:
        """Let the features that are dead after this step begin anew at tokens of its batch."""
        world, x = self.sae.world, batch.x[batch.valid]
        error = world.gather(x - coded.reconstruction[batch.valid])
        stream = random_stream(self.seed, RESAMPLE, step)
        dead = torch.cat(self.sae.dead(self.config.dead_after))
        changed = resample(self.sae, self.optimizer, dead, world.gather(x), error, stream)
        self.resampled += len(changed)
        if self.average is not None:
            self.average.begin_anew(self.sae, changed)

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
        sizes: Sizes,
        around: Surroundings,
        temporal: Contrast | None,
        contrast: float,
        n_tokens: int,
    ) -> dict[str, Any]:
        sae, code = self.sae, coded.code
        error = (batch.x - coded.reconstruction.detach())[batch.valid].double().square().sum(dim=1)
        squares, outliers, variance = self.world.totals(
            error.sum().item(), int((~batch.valid).sum()), batch.x.double().square().sum().item()
        )
        in_raw_units = around.scaler.scale**2
        energy, in_block = (code.energy(0, stop, sizes) for stop in (len(sae.b_enc), sae.block_size))
        # Without keys the loss is 0 for want of anything to tell apart, which would look like success.
        needs_keys = self.config.objective == "info_nce" and not around.ring.filled
        loss = math.nan if temporal is None or needs_keys else contrast
        found = {**(temporal._asdict() if temporal is not None else {}), "contrast": loss}
        details = {
            "l2": squares / n_tokens / in_raw_units,
            "l1": code.total(sizes) / n_tokens / around.scaler.scale,
            "energy_h": in_block / energy if energy > 0 else math.nan,
            "outliers": int(outliers),
            "batch_variance": variance / n_tokens / batch.x.shape[1],
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
