"""The sweep behind the contrastive recipes' defaults: arms x seeds in one pass, scored on held-out documents.

    python benchmarks/sweep.py STORE OUT [--seeds 0,1,2] [--tokens N] [--report FILE.md]

Every arm has a control with the same block split and alpha = 0, the same seed, tokens and order of data;
differences are paired by seed, their 95 % intervals are Student's over seeds. Excess mutual information is
METHOD.md's (section 5) at lag 8: the mean over live features of NMI minus its two nulls. A run that was
interrupted goes on when the command is repeated.
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
from tcsae.evaluate.temporal_features import figures
from tcsae.evaluate.temporal_pass import SAEEncoder, temporal_sums
from tcsae.store import ActivationStore
from tcsae.train import ArmConfig, Run, TrainConfig, load_sae, train
from tcsae.train.sae.inference import SAE

LAG = 8

CONTROL = ArmConfig(name="block")
ARMS: dict[str, Mapping[str, float]] = {
    "a0.01": {"alpha": 0.01},
    "a0.02": {"alpha": 0.02},
    "a0.03": {"alpha": 0.03},
    "a0.03-t0.2": {"alpha": 0.03, "temperature": 0.2},
    "a0.03-ramp0.3": {"alpha": 0.03, "ramp_share": 0.3},
    "a0.03-aux": {"alpha": 0.03, "aux_weight": 1 / 8, "dead_after": 50_000},
}
"""what each arm changes of `CONTROL`"""


class Score(NamedTuple):
    """One SAE on the store's test documents."""

    fvu: float
    l0: float
    dead_h: float
    """share of block H that never fires on them"""
    excess_h: float
    """mean over live features"""
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
    arms = (CONTROL, *(replace(CONTROL, name=name.replace(".", ""), **ARMS[name]) for name in names))
    config = TrainConfig(arms=arms, seeds=seeds, tokens=asked.tokens)
    store = ActivationStore.open(asked.store)
    run = train(store, asked.out, config, resume=(asked.out / "run.json").exists())
    scores = scored(run, store, arms, seeds)
    text = report(scores, [CONTROL.name, *names], seeds, config, store)
    print(text)
    if asked.report:
        asked.report.write_text(text + "\n")


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
    beyond = next(one for one in figures(sums) if one.metric.name == PRIMARY_METRIC).values[0]
    live = fired.numpy() & np.isfinite(beyond)
    in_h = live & (np.arange(sae.d_sae) < sae.block_size)
    return Score(
        error / total,
        active / n,
        1 - float(fired[: sae.block_size].float().mean()),
        float(beyond[in_h].mean()),
        float(beyond[live].mean()),
    )


def report(
    scores: list[list[Score]],
    names: Sequence[str],
    seeds: Sequence[int],
    config: TrainConfig,
    store: ActivationStore,
) -> str:
    """The table as Markdown."""
    made, held_out = store.provenance, HeldOut(store, store.hooks[0], "test")
    lines = [
        f"{made.model}, {store.hooks[0]}; {config.steps * config.batch_tokens:,} training tokens in "
        f"{config.steps} steps of {config.batch_tokens:,}; {len(seeds)} paired seeds; {held_out.n_documents} test "
        f"documents with {held_out.n_tokens:,} tokens; block H 20 % of F = {CONTROL.features(store.d_model)}, "
        f"k = {CONTROL.block_k} + {CONTROL.k - CONTROL.block_k}. Mean over seeds; in brackets the 95 % interval of "
        "the paired difference from the control.",
        "",
        f"| arm | FVU | ΔFVU | L0 | dead in H | excess MI lag {LAG}, H | whole | Δ whole |",
        "|---|---|---|---|---|---|---|---|",
    ]
    control = scores[0]
    for name, arm in zip(names, scores, strict=True):
        cells = [name, f"{mean(s.fvu for s in arm):.4f}"]
        is_control = arm is control
        cells.append(
            "-" if is_control else _paired([a.fvu - b.fvu for a, b in zip(arm, control, strict=True)])
        )
        cells += [f"{mean(s.l0 for s in arm):.1f}", f"{mean(s.dead_h for s in arm):.1%}"]
        cells += [f"{mean(s.excess_h for s in arm):.4f}", f"{mean(s.excess_whole for s in arm):.4f}"]
        apart = [a.excess_whole - b.excess_whole for a, b in zip(arm, control, strict=True)]
        cells.append("-" if is_control else _paired(apart))
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
