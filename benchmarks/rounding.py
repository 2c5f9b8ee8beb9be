"""Why a count of ours may differ from SAEBench's: the activations, not what is made of them.

SAEBench runs TransformerLens' own copy of a model, we run the model of transformers, whose sums are taken in another
order. So activations differ in their last bits, and one that stands at a threshold falls on the other side of it.
Here the two are held against each other and against a pass in float64, and our figures are computed from the very
activations that SAEBench saw: what still differs then is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.evaluate import saebench
from tcsae.evaluate.core_replay import Replay
from tcsae.evaluate.heldout import Batch
from tcsae.evaluate.splice import ReplayModel
from tcsae.train.sae.inference import SAE


class Activations(NamedTuple):
    """Ours at the hook, at the kept tokens, against SAEBench's."""

    n_values: int
    """tokens times width"""
    n_differ: int
    """values that are not the same to the last bit"""
    largest: float
    """norm of a token's difference over the token's norm, at most"""
    ours_from_double: float
    """root mean square of the difference from a float64 pass"""
    theirs_from_double: float
    """the same of SAEBench's"""
    size: float
    """root mean square of the values themselves"""


class Thresholds(NamedTuple):
    """One SAE's firings (a feature at a token) on our activations against those on SAEBench's."""

    n_firings: int
    """on SAEBench's"""
    n_differ: int
    """one of the two fires"""
    margin: float
    """how far the pre-activations of these are from the threshold, at most; 0 where there are none"""
    shift: float
    """how far any feature's pre-activation is from that on SAEBench's activations, at most"""
    ours_from_double: int
    """firings that differ from those of a float64 pass"""
    theirs_from_double: int
    """the same of SAEBench's"""


class Handed:
    """A language model whose activations at the hook are given; above the hook it is itself.

    Batches must come in the order of the rows, each once.
    """

    def __init__(self, model: ReplayModel, x: Float[Tensor, "row position d_model"]) -> None:
        self._model = model
        self._x = x
        self._at = 0

    @property
    def vocab_size(self) -> int:
        """The model's own."""
        return self._model.vocab_size

    def residuals(
        self, input_ids: Int64[Tensor, "batch position"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch position d_model"]]:
        """The next rows of what was given."""
        (hook,) = hooks
        self._at += len(input_ids)
        return {hook: self._x[self._at - len(input_ids) : self._at]}

    def logits_from(
        self,
        input_ids: Int64[Tensor, "batch position"],
        hook: str,
        x: Float[Tensor, "batch position d_model"],
    ) -> Float[Tensor, "batch position vocab"]:
        """The model's own."""
        return self._model.logits_from(input_ids, hook, x)


def body_from_activations(
    model: ReplayModel,
    hook: str,
    sae: SAE,
    batches: Sequence[Batch],
    x: Float[Tensor, "row position d_model"],
) -> dict[str, Any]:
    """``eval_result_metrics`` and ``eval_result_details`` as the core suite has them, with ``x`` at the hook."""
    replay = Replay(Handed(model, x), hook, x.mean(dim=(0, 1)), [sae], len(x))
    for batch in batches:
        replay.add(batch)
    figures, featurewise = replay.saebench_figures(0)
    n_positions = sum(batch.input_ids.numel() for batch in batches)
    figures |= dict.fromkeys(saebench.CATEGORIES["token_stats"], n_positions)
    return {
        "eval_result_metrics": saebench.by_category(figures)[0],
        "eval_result_details": saebench.details(featurewise),
    }


def our_activations(
    model: ReplayModel, hook: str, batches: Sequence[Batch]
) -> Float[Tensor, "row position d_model"]:
    """What the core suite encodes."""
    return torch.cat([model.residuals(batch.input_ids, [hook])[hook].float() for batch in batches])


@torch.no_grad()
def double_activations(
    folder: Path, hook: str, batches: Sequence[Batch]
) -> Float[Tensor, "row position d_model"]:
    """Those of the same weights in float64, by transformers; ``hook`` is ``blocks.N.hook_resid_post``."""
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(folder, dtype=torch.float64)
    layer = int(hook.removeprefix("blocks.").removesuffix(".hook_resid_post"))
    found = []
    for batch in batches:
        passed = loaded(batch.input_ids, output_hidden_states=True, use_cache=False)
        # the embedding stands first
        found.append(passed.hidden_states[layer + 1])
    return torch.cat(found)


def hold_activations(
    ours: Float[Tensor, "kept d_model"],
    theirs: Float[Tensor, "kept d_model"],
    double: Float[Tensor, "kept d_model"],
) -> Activations:
    """How far the two are from each other and from float64."""
    difference = ours.double() - theirs.double()
    share = difference.norm(dim=-1) / theirs.double().norm(dim=-1)
    return Activations(
        n_values=difference.numel(),
        n_differ=int((difference != 0).sum()),
        largest=share.max().item(),
        ours_from_double=_rms(ours.double() - double),
        theirs_from_double=_rms(theirs.double() - double),
        size=_rms(double),
    )


def _rms(values: Float[Tensor, "kept d_model"]) -> float:
    return values.square().mean().sqrt().item()


def hold_firings(
    sae: SAE,
    ours: Float[Tensor, "kept d_model"],
    theirs: Float[Tensor, "kept d_model"],
    double: Float[Tensor, "kept d_model"],
    rows: int = 1024,
) -> Thresholds:
    """How many features fire on one of the two alone, and how near the threshold they stand."""
    exact = SAE(
        architecture=sae.architecture,
        W_enc=sae.W_enc.double(),
        b_enc=sae.b_enc.double(),
        W_dec=sae.W_dec.double(),
        b_dec=sae.b_dec.double(),
        threshold=None if sae.threshold is None else sae.threshold.double(),
        k=sae.k,
    )
    found = Thresholds(0, 0, 0.0, 0.0, 0, 0)
    for mine, other, double_x in zip(ours.split(rows), theirs.split(rows), double.split(rows), strict=True):
        on, other_on, double_on = sae.encode(mine) > 0, sae.encode(other) > 0, exact.encode(double_x) > 0
        pre, other_pre = (_pre(exact, x.double()) for x in (mine, other))
        differs: Bool[Tensor, "kept feature"] = on != other_on
        margin = (pre - _threshold(exact, pre)).abs()[differs]
        found = Thresholds(
            found.n_firings + int(other_on.sum()),
            found.n_differ + int(differs.sum()),
            max(found.margin, margin.max().item() if len(margin) else 0.0),
            max(found.shift, (pre - other_pre).abs().max().item()),
            found.ours_from_double + int((on != double_on).sum()),
            found.theirs_from_double + int((other_on != double_on).sum()),
        )
    return found


def _pre(sae: SAE, x: Float[Tensor, "kept d_model"]) -> Float[Tensor, "kept feature"]:
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def _threshold(sae: SAE, pre: Float[Tensor, "kept feature"]) -> Float[Tensor, "*kept feature"]:
    """What a pre-activation must exceed to fire; of a top-k midway between the last that does and the next."""
    if sae.k is not None:
        largest = pre.topk(sae.k + 1, dim=-1).values
        return largest[:, -2:].mean(dim=-1, keepdim=True).expand_as(pre).clamp(min=0)
    if sae.threshold is not None:
        return sae.threshold.clamp(min=0)
    return torch.zeros_like(sae.b_enc)
