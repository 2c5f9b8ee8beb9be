"""Which features are clamped: SAEBench's rule, and random features that fire as often, as a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.unlearning.domains import Indices
from tcsae.train.sae.inference import SAE

THRESHOLDS = (0.001, 0.01)
"""Density on the retain documents from which a feature is not selected (SAEBench's two)."""

NUMBERS = (10, 20)
"""Features that are clamped, at most (SAEBench's two)."""

NEIGHBOURS = 8
"""A control is one of so many features whose density on the forget documents is nearest."""


@dataclass(frozen=True, slots=True, eq=False)
class Activity:
    """How often features fire inside and outside a domain, on the documents that select."""

    forget_density: Float[np.ndarray, " feature"]
    """share of the domain's kept tokens with f > 0"""
    retain_density: Float[np.ndarray, " feature"]
    """share of the kept tokens outside"""
    mean_active: Float[np.ndarray, " feature"]
    """mean f over the domain's kept tokens with f > 0; 0 where there is none"""
    n_forget: int
    """kept tokens of the domain"""
    n_retain: int
    """kept tokens outside"""


def activities(sae: SAE, held_out: HeldOut, drawn: Sequence[tuple[Indices, Indices]]) -> list[Activity]:
    """`Activity` for each pair of (forget contexts, retain contexts), in one pass over the stored rows."""
    flat = [contexts for pair in drawn for contexts in pair]
    is_in = torch.zeros(len(flat), held_out.store.n_contexts)
    for at, contexts in enumerate(flat):
        is_in[at, torch.from_numpy(contexts)] = 1.0
    fired = np.zeros((len(flat), sae.d_sae))
    total = np.zeros((len(flat), sae.d_sae))
    tokens = np.zeros(len(flat))
    for block in held_out.only(np.unique(np.concatenate(flat))).blocks():
        f = sae.encode(block.x[block.kept].to(sae.device))
        # at most a block's rows are summed in float32, blocks in float64
        member = is_in[:, block.context[block.kept]]
        fired += (member.to(f) @ (f > 0).to(f)).double().cpu().numpy()
        total += (member.to(f) @ f).double().cpu().numpy()
        tokens += member.sum(dim=1).double().numpy()
    found = []
    for forget, retain in zip(range(0, len(flat), 2), range(1, len(flat), 2), strict=True):
        mean = np.divide(total[forget], fired[forget], out=np.zeros(sae.d_sae), where=fired[forget] > 0)
        found.append(
            Activity(
                forget_density=fired[forget] / max(tokens[forget], 1.0),
                retain_density=fired[retain] / max(tokens[retain], 1.0),
                mean_active=mean,
                n_forget=int(tokens[forget]),
                n_retain=int(tokens[retain]),
            )
        )
    return found


def select(activity: Activity, threshold: float, number: int) -> tuple[int, ...]:
    """SAEBench's rule: of the features below ``threshold`` on the retain documents, the ``number`` densest
    on the forget documents; fewer if fewer fire there. The first of several that are equally dense wins.
    """
    score = np.where(activity.retain_density >= threshold, 0.0, activity.forget_density)
    order = np.argsort(-score, kind="stable")[:number]
    return tuple(int(feature) for feature in order if score[feature] > 0)


def matched_controls(activity: Activity, selected: Sequence[int], seed: int) -> tuple[int, ...]:
    """One random live feature for each of ``selected``, about as dense on the forget documents.

    What it does to the retain documents is not looked at: the difference from the selected ones is what
    their selection is worth. Nothing is drawn twice, nor drawn of ``selected``; fewer come back if the
    live features run out.
    """
    generator = np.random.default_rng([seed, len(selected)])
    is_free = activity.forget_density > 0
    is_free[list(selected)] = False
    controls: list[int] = []
    for feature in selected:
        free = np.flatnonzero(is_free)
        if not len(free):
            break
        ratio = activity.forget_density[free] / activity.forget_density[feature]
        nearest = free[np.argsort(np.abs(np.log(ratio)), kind="stable")[:NEIGHBOURS]]
        control = int(generator.choice(nearest))
        is_free[control] = False
        controls.append(control)
    return tuple(controls)
