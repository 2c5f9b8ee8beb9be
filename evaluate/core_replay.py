"""One pass of the model over batches of contexts, for any number of SAEs at one hook.

What does not depend on an SAE (the clean pass and the ablations) is run once for all of them. The pass can be
stopped between two batches: what it has gathered is a dictionary of small arrays (`Replay.state`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tcsae.evaluate import saebench
from tcsae.evaluate.heldout import Batch
from tcsae.evaluate.intervals import MAX_UNITS, Array
from tcsae.evaluate.language import kl_divergences, next_token_loss, saebench_kl
from tcsae.evaluate.reconstruction import Gathered
from tcsae.evaluate.splice import Ablation, ReplayModel, Splicer
from tcsae.train.sae.inference import SAE

COLUMNS = ("n_kl", "n_ce", "ce_clean", "ce_zero", "ce_mean", "kl_zero", "kl_mean", "ce_sae", "kl_sae")
"""Sums per document; the last two belong to one SAE, the others to all."""

State = dict[str, np.ndarray]
"""What has been gathered so far, by name: the content of a checkpoint."""


@dataclass(slots=True)
class _Losses:
    """Sums of one variant's losses: per unit for the repaired figures, in all for SAEBench's."""

    ce: Array
    kl: Array
    saebench: Array
    """cross-entropy, KL"""

    @classmethod
    def none(cls, n_units: int) -> _Losses:
        return cls(np.zeros(n_units), np.zeros(n_units), np.zeros(2))


class Replay:
    """One pass over the batches for any number of SAEs at one hook; everything but the SAEs is shared.

    Parameters
    ----------
    model, hook
        what is run and where it is cut
    mean
        what the mean ablation puts there
    saes
        what is spliced
    n_documents
        documents that the batches come from; more than `MAX_UNITS` are dealt out in turn to that many units
        of resampling
    reconstructs
        whether the activations are gathered for `tcsae.evaluate.reconstruction` as well, which a store makes
        unnecessary
    """

    def __init__(
        self,
        model: ReplayModel,
        hook: str,
        mean: Float[Tensor, " d_model"],
        saes: Sequence[SAE],
        n_documents: int,
        *,
        reconstructs: bool = False,
    ) -> None:
        self._splicer = Splicer(model, hook)
        self._saes = saes
        zero = torch.zeros_like(mean)
        self._ablations = {
            "zero": Ablation(self._splicer, zero, everywhere=False),
            "mean": Ablation(self._splicer, mean, everywhere=False),
            "saebench": Ablation(self._splicer, zero, everywhere=True),
        }
        self._shared_from = dict.fromkeys(self._ablations, -1)
        """number of the batch that an ablation's row for all comes from, -1 if there is none"""
        n_units = min(n_documents, MAX_UNITS)
        self.n_kl = np.zeros(n_units)
        self.n_ce = np.zeros(n_units)
        self._n_saebench_ce = np.zeros(1)
        self.n_batches = 0
        """finished ones"""
        self._clean = _Losses.none(n_units)
        self._ablated = {name: _Losses.none(n_units) for name in self._ablations}
        self._spliced = [_Losses.none(n_units) for _ in saes]
        self._figures = [saebench.ReconstructionFigures() for _ in saes]
        self._features = [saebench.FeatureFigures(sae.d_sae) for sae in saes]
        self.gathered = [Gathered(sae, n_units, mean.double()) for sae in saes] if reconstructs else None
        """sums for the repaired reconstruction figures, one an SAE"""

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the model on one batch: once as it is, once per SAE, and the ablations as far as they need."""
        x = self._splicer.activations(batch)
        keep = batch.keep.to(x.device)
        unit = np.array(batch.document) % len(self.n_kl)
        clean = self._splicer.log_probs(batch, x)
        has_target, predicts = _predictors(batch)
        np.add.at(self.n_kl, unit, batch.keep.sum(dim=1).numpy())
        np.add.at(self.n_ce, unit, has_target.sum(dim=1).numpy())
        self._n_saebench_ce += int(predicts.sum())
        self._add_cross_entropy(self._clean, batch, unit, clean)
        self._add_ablations(batch, unit, clean, x)
        kept = x[keep]
        for at, sae in enumerate(self._saes):
            own = kept.to(sae.device)
            f = sae.encode(own)
            xh = sae.decode(f)
            row = saebench.rows_of(batch.keep)
            self._figures[at].add(own, f, xh)
            self._features[at].add(f, row, len(batch.length))
            if self.gathered is not None:
                self.gathered[at].add(own, f, xh, unit[row.numpy()])
            replacement = x.clone()
            replacement[keep] = xh.to(x)
            spliced = self._splicer.log_probs(batch, replacement)
            self._add_losses([self._spliced[at]], batch, unit, clean, [spliced])
        self.n_batches += 1

    def _add_ablations(
        self,
        batch: Batch,
        unit: np.ndarray,
        clean: Float[Tensor, "batch position vocab"],
        x: Float[Tensor, "batch position d_model"],
    ) -> None:
        """Those that one row serves are gone through together; of the others only one is held at a time."""
        shared: dict[str, Tensor] = {}
        for name, ablation in self._ablations.items():
            before = ablation.shared
            log_probs = ablation.log_probs(batch, x)
            if ablation.shared is not before:
                self._shared_from[name] = self.n_batches
            if log_probs.stride(0) == 0:
                shared[name] = log_probs
            else:
                self._add_losses([self._ablated[name]], batch, unit, clean, [log_probs])
            del log_probs
        self._add_losses([self._ablated[name] for name in shared], batch, unit, clean, list(shared.values()))

    def _add_losses(
        self,
        variants: Sequence[_Losses],
        batch: Batch,
        unit: np.ndarray,
        clean: Float[Tensor, "batch position vocab"],
        others: Sequence[Float[Tensor, "batch position vocab"]],
    ) -> None:
        """Add the losses of some variants on one batch; ``others`` are their log-probabilities."""
        for losses, other in zip(variants, others, strict=True):
            self._add_cross_entropy(losses, batch, unit, other)
        for row, length in enumerate(batch.length):
            kept = batch.keep[row, :length].to(clean.device)
            p, qs = clean[row, :length], [other[row, :length] for other in others]
            for losses, q, kl in zip(variants, qs, kl_divergences(p, qs)[:, kept], strict=True):
                theirs = saebench_kl(p, q, kl=kl, kept=kept)
                losses.kl[unit[row]] += kl.sum(dtype=torch.float64).item()
                losses.saebench[1] += theirs.sum(dtype=torch.float64).item()

    def _add_cross_entropy(
        self,
        losses: _Losses,
        batch: Batch,
        unit: np.ndarray,
        log_probs: Float[Tensor, "batch position vocab"],
    ) -> None:
        ce = next_token_loss(log_probs, batch.input_ids.to(log_probs.device)).double().cpu()
        has_target, predicts = _predictors(batch)
        np.add.at(losses.ce, unit, torch.where(has_target, ce, 0.0).sum(dim=1).numpy())
        losses.saebench[0] += torch.where(predicts, ce, 0.0).sum().item()

    def sums(self, at: int) -> Float[np.ndarray, "unit sum"]:
        """`COLUMNS` of SAE number ``at``."""
        zero, mean = self._ablated["zero"], self._ablated["mean"]
        one = self._spliced[at]
        columns = (self.n_kl, self.n_ce, self._clean.ce, zero.ce, mean.ce, zero.kl, mean.kl, one.ce, one.kl)
        return np.stack(columns, axis=1)

    def saebench_figures(self, at: int) -> tuple[dict[str, float], dict[str, Float[Tensor, " feature"]]]:
        """SAEBench's figures of SAE number ``at`` (without ``token_stats``), and the featurewise ones."""
        n_kl, n_ce = int(self.n_kl.sum()), int(self._n_saebench_ce[0])
        one, ablated = self._spliced[at].saebench, self._ablated["saebench"].saebench

        def pooled(total: float, count: int) -> float:
            return total / count if count else float("nan")

        losses = {
            "kl_div_with_sae": pooled(one[1], n_kl),
            "kl_div_with_ablation": pooled(ablated[1], n_kl),
            "ce_loss_without_sae": pooled(self._clean.saebench[0], n_ce),
            "ce_loss_with_sae": pooled(one[0], n_ce),
            "ce_loss_with_ablation": pooled(ablated[0], n_ce),
        }
        sae = self._saes[at]
        featurewise = {
            **self._features[at].figures(),
            **saebench.weight_figures(sae.W_enc.cpu(), sae.b_enc.cpu(), sae.W_dec.cpu()),
        }
        figures = {
            **saebench.scores(losses),
            **self._figures[at].figures(),
            **saebench.misc_metrics(featurewise),
        }
        return figures, featurewise

    def state(self) -> State:
        """Everything gathered so far; with `restore` the pass goes on as if it had not been stopped."""
        shared = {"n_kl": self.n_kl, "n_ce": self.n_ce, "n_saebench_ce": self._n_saebench_ce}
        state: State = {**shared, "n_batches": np.array(self.n_batches)}
        for name, losses in {"clean": self._clean, **self._ablated}.items():
            state |= _of(losses, name)
        state |= {f"{name}/shared_from": np.array(number) for name, number in self._shared_from.items()}
        for at in range(len(self._saes)):
            state |= self.state_of(at)
        return state

    def state_of(self, at: int) -> State:
        """The part of `state` that belongs to SAE number ``at``."""
        parts = [self._figures[at].state(), self._features[at].state()]
        if self.gathered is not None:
            parts.append(self.gathered[at].state())
        named = {f"sae{at}/{name}": array for part in parts for name, array in part.items()}
        return {**named, **_of(self._spliced[at], f"sae{at}")}

    def restore(self, state: Mapping[str, np.ndarray], numbers: Sequence[int]) -> None:
        """Take over a `state`, of which SAE ``numbers[at]`` is number ``at`` here."""
        self.n_kl, self.n_ce, self._n_saebench_ce = state["n_kl"], state["n_ce"], state["n_saebench_ce"]
        self.n_batches = int(state["n_batches"])
        self._clean = _losses(state, "clean")
        self._ablated = {name: _losses(state, name) for name in self._ablated}
        self._shared_from = {name: int(state[f"{name}/shared_from"]) for name in self._ablated}
        for at, number in enumerate(numbers):
            start = f"sae{number}/"
            own = {name.removeprefix(start): array for name, array in state.items() if name.startswith(start)}
            self._spliced[at] = _losses(state, f"sae{number}")
            self._figures[at].restore(own)
            self._features[at].restore(own)
            if self.gathered is not None:
                self.gathered[at].restore(own)

    @torch.no_grad()
    def share_again(self, batches: Sequence[Batch]) -> None:
        """After `restore`: run again what batches to come share with one of ``batches`` that is done.

        Another batch's row would do, but for its last bits, which depend on the batch's shape.
        """
        for number in sorted(set(self._shared_from.values()) - {-1}):
            x = self._splicer.activations(batches[number])
            for name, ablation in self._ablations.items():
                if self._shared_from[name] == number:
                    ablation.log_probs(batches[number], x)


def _of(losses: _Losses, name: str) -> State:
    return {
        f"{name}/ce": losses.ce,
        f"{name}/kl": losses.kl,
        f"{name}/saebench": losses.saebench,
    }


def _losses(state: Mapping[str, np.ndarray], name: str) -> _Losses:
    return _Losses(state[f"{name}/ce"], state[f"{name}/kl"], state[f"{name}/saebench"])


def _predictors(batch: Batch) -> tuple[Bool[Tensor, "batch target"], Bool[Tensor, "batch target"]]:
    """Positions whose cross-entropy counts, in the repaired figures (kept, with a kept target) and in SAEBench's.

    SAEBench looks at the predictor alone; padding, which it does not know, is no target for it either.
    """
    keep = batch.keep
    inside = torch.arange(1, keep.shape[1]) < torch.tensor(batch.length)[:, None]
    return keep[:, :-1] & keep[:, 1:], keep[:, :-1] & inside
