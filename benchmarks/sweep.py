"""The sweep behind the contrastive recipes' defaults: arms x seeds in one pass, scored on held-out documents.

    python benchmarks/sweep.py STORE OUT [--arms A,B] [--seeds 0,1,2] [--tokens N] [--report FILE.md]

Every arm has a control with the same block split and alpha = 0, the same seed, tokens and order of data;
differences are paired by seed, their 95 % intervals are Student's over seeds. Mutual information is METHOD.md's
(section 5) at lag 8, a mean over live features: NMI minus its permutation null, of which the position-matched
null says how much is position; the excess is what both leave. A run that was interrupted goes on when the
command is repeated.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student

from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.temporal import PRIMARY_METRIC
from tcsae.evaluate.temporal_encoders import SAEEncoder
from tcsae.evaluate.temporal_features import figures
from tcsae.evaluate.temporal_pass import temporal_sums
from tcsae.store import ActivationStore
from tcsae.train import ArmConfig, Run, TrainConfig, load_sae, train
from tcsae.train.sae.inference import SAE

LAG = 8

CONTROL = ArmConfig(name="block")
DEFAULT = replace(CONTROL, alpha=0.02)
ARMS: dict[str, ArmConfig] = {
    arm.name: arm
    for arm in (
        *(replace(CONTROL, name=f"alpha-{percent}", alpha=percent / 100) for percent in (1, 2, 3, 4)),
        replace(CONTROL, name="alpha-3-ramp-30", alpha=0.03, ramp_share=0.3),
        *(replace(DEFAULT, name=f"tau-{percent}", temperature=percent / 100) for percent in (5, 20)),
        *(replace(DEFAULT, name=f"share-{percent}", block_share=percent / 100) for percent in (10, 30)),
        *(replace(DEFAULT, name=f"k-{k}", block_k_share=k / CONTROL.k) for k in (4, 12)),
        replace(DEFAULT, name="aux-4x", aux_weight=4 * CONTROL.aux_weight),
        replace(DEFAULT, name="aux-sooner", dead_after=25_000),
        replace(DEFAULT, name="anchors-512", anchors=512),
    )
}
"""alpha, ramp, tau and share in percent; k-4 and k-12: active features of block H; alpha-2 is the recipes' default"""


class Score(NamedTuple):
    """One SAE on the store's test documents."""

    fvu: float
    l0: float
    dead_h: float
    """share of block H that never fires on them"""
    shared_h: float
    """NMI minus its permutation null, mean over live features as all that follow"""
    position_h: float
    """the position-matched null"""
    excess_h: float
    excess_whole: float


def main() -> None:
    """Train, score, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=1_024_000)
    parser.add_argument("--arms", help="only these, separated by commas")
    parser.add_argument("--report", type=Path, help="Markdown file for the table")
    asked = parser.parse_args()
    seeds = tuple(map(int, asked.seeds.split(",")))
    names = asked.arms.split(",") if asked.arms else list(ARMS)
    arms: list[ArmConfig] = []
    for name in names:
        arms += [arm for arm in (control_of(ARMS[name]), ARMS[name]) if arm not in arms]
    config = TrainConfig(arms=tuple(arms), seeds=seeds, tokens=asked.tokens)
    store = ActivationStore.open(asked.store)
    run = train(store, asked.out, config, resume=(asked.out / "run.json").exists())
    scores = dict(zip(arms, scored(run, store, arms, seeds), strict=True))
    text = report(scores, seeds, config, store)
    print(text)
    if asked.report:
        asked.report.write_text(text + "\n")


def control_of(arm: ArmConfig) -> ArmConfig:
    """The arm with the same block split and no contrast."""
    found = replace(CONTROL, block_share=arm.block_share, block_k_share=arm.block_k_share)
    if found == CONTROL:
        return found
    return replace(found, name=f"block-{arm.name}")


def scored(
    run: Run, store: ActivationStore, arms: Sequence[ArmConfig], seeds: Sequence[int]
) -> list[list[Score]]:
    """Scores by arm and seed."""
    held_out = HeldOut(store, store.hooks[0], "test")
    every = iter(run.saes)
    return [[score(load_sae(next(every)), held_out) for _ in seeds] for _ in arms]


def score(sae: SAE, held_out: HeldOut) -> Score:
    """Every figure of one SAE."""
    centre = torch.from_numpy(held_out.store.statistics(held_out.hook).mean).float()
    error = total = n = active = 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for block in held_out.blocks():
        x = block.x[block.kept]
        f = sae.encode(x)
        error += float((x - sae.decode(f)).double().square().sum())
        total += float((x - centre).double().square().sum())
        n, active = n + len(x), active + float((f > 0).sum())
        fired |= (f > 0).any(dim=0)
    sums = temporal_sums(SAEEncoder(sae), held_out, seed=0, lags=(LAG,))
    found = {one.metric.name: one.values[0] for one in figures(sums)}
    beyond = found[PRIMARY_METRIC]
    shared, position = found["information"] - found["permuted_information"], found["matched_information"]
    live = fired.numpy() & np.isfinite(beyond)
    in_h = live & (np.arange(sae.d_sae) < sae.block_size)
    return Score(
        error / total,
        active / n,
        1 - float(fired[: sae.block_size].float().mean()),
        float(shared[in_h].mean()),
        float(position[in_h].mean()),
        float(beyond[in_h].mean()),
        float(beyond[live].mean()),
    )


def report(
    scores: Mapping[ArmConfig, Sequence[Score]],
    seeds: Sequence[int],
    config: TrainConfig,
    store: ActivationStore,
) -> str:
    """The table as Markdown."""
    made, held_out = store.provenance, HeldOut(store, store.hooks[0], "test")
    lines = [
        f"{made.model}, {store.hooks[0]}; {config.steps * config.batch_tokens:,} training tokens in "
        f"{config.steps} steps of {config.batch_tokens:,}; {len(seeds)} paired seeds; {held_out.n_documents} test "
        f"documents with {held_out.n_tokens:,} tokens; F = {CONTROL.features(store.d_model)}, k = {CONTROL.k}. Mean "
        f"over seeds; in brackets the 95 % interval of the paired difference from the control. MI at lag {LAG}: NMI "
        "minus the permutation null; excess: minus the position-matched null, too.",
        "",
        "| arm | H | k in H | FVU | ΔFVU | L0 | dead in H | MI, H | position null, H | excess, H | Δ excess, H | "
        "whole | Δ whole |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in scores.items():
        control = found if arm.alpha == 0 else scores[control_of(arm)]
        apart = {
            field: "-"
            if arm.alpha == 0
            else _paired([getattr(a, field) - getattr(b, field) for a, b in pairs])
            for pairs in [list(zip(found, control, strict=True))]
            for field in ("fvu", "excess_h", "excess_whole")
        }
        cells = [
            arm.name,
            str(arm.block_size(store.d_model)),
            str(arm.block_k),
            f"{mean(s.fvu for s in found):.4f}",
            apart["fvu"],
            f"{mean(s.l0 for s in found):.1f}",
            f"{mean(s.dead_h for s in found):.1%}",
            *(f"{mean(getattr(s, f) for s in found):.4f}" for f in ("shared_h", "position_h", "excess_h")),
            apart["excess_h"],
            f"{mean(s.excess_whole for s in found):.4f}",
            apart["excess_whole"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _paired(differences: Sequence[float]) -> str:
    """Mean and Student's interval over seeds."""
    centre = mean(differences)
    if len(differences) < 2:
        return f"{centre:+.4f}"
    n = len(differences)
    half = float(student.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return f"{centre:+.4f} [{centre - half:+.4f}, {centre + half:+.4f}]"


if __name__ == "__main__":
    main()
