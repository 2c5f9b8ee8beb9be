"""Arms on a store with a known answer: who finds the slow features, and which temporal metric says so.

    python benchmarks/synthetic.py FOLDER [--seeds 0,1,2] [--tokens N] [--report FILE.md]

Harvests a synthetic store into FOLDER, trains every arm once per seed on the same tokens in the same order, evaluates
the suites temporal, truth and core (its figures of the store alone), and prints three tables. Figures of arms are
means over seeds with Student's 95 % interval over seeds; differences are paired with `block` by seed. Agreement over
SAEs is Spearman's rho over all arms and seeds, with an interval over documents; agreement over features is the mean
over SAEs of rho over matched features, with Student's interval over SAEs. A run that was interrupted goes on when the
command is repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate
from tcsae.evaluate.truth_ranking import FILE
from tcsae.harvest import HarvestConfig, harvest
from tcsae.store import ActivationStore
from tcsae.store.spec import KINDS
from tcsae.train import ArmConfig, TrainConfig, train

CORPUS = "synthetic:features=256,d_model=64,coherence=0.6,rate=0.005:0.1,documents=1500,length=256,topics=4"
"""small enough for a minute of two quiet cores"""

CONTROL = ArmConfig(name="block", k=8)
"""a quarter of k in block H; as many features as there are true ones (`arms_of`)"""

ARMS = (
    replace(CONTROL, name="batchtopk", block_share=0.0),
    CONTROL,
    replace(CONTROL, name="placebo", alpha=0.02, positives="other_document"),
    replace(CONTROL, name="tc16-a005", alpha=0.005),
    replace(CONTROL, name="tc16-a02", alpha=0.02),
    replace(CONTROL, name="tc16-a1", alpha=0.1),
)

FIGURES = {
    "EV": ("explained_variance", ".3f"),
    "L0": ("l0", ".1f"),
    "dead": ("dead_fraction", ".1%"),
    "dead in H": ("dead_fraction_H", ".1%"),
    "recovered": ("recovered", ".3f"),
    "slow": ("recovered_slow", ".3f"),
    "fast": ("recovered_fast", ".3f"),
    "F1": ("f1", ".3f"),
}
"""of the first table"""

BLOCK_FIGURES = {
    "slow in H": ("slow_in_H", ".3f"),
    "fast in H": ("fast_in_H", ".3f"),
    "chance": ("share_of_H", ".3f"),
    "purity H": ("purity_H", ".3f"),
    "of all": ("purity_whole", ".3f"),
    "run H": ("true_run_length_H", ".1f"),
    "run L": ("true_run_length_L", ".1f"),
}
"""of the second"""

SHOWN_LAGS = (1, 8, 32)


def main() -> None:
    """Harvest, train, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", default=CORPUS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=400 * 2048)
    parser.add_argument("--k", type=int, default=CONTROL.k, help="active features per token")
    parser.add_argument("--ring-size", type=int, default=4096, help="activations that negatives come from")
    parser.add_argument("--report", type=Path, help="Markdown file for the tables")
    asked = parser.parse_args()
    seeds = tuple(map(int, asked.seeds.split(",")))
    path = asked.folder / "store.zarr"
    harvest(HarvestConfig(store=path, corpus=asked.corpus, resume=True))
    store = ActivationStore.open(path)
    arms = arms_of(store, asked.k)
    config = TrainConfig(arms=arms, seeds=seeds, tokens=asked.tokens, ring_size=asked.ring_size)
    run = asked.folder / "run"
    train(store, run, config, resume=(run / "run.json").exists())
    out = asked.folder / "results"
    found = evaluate(EvaluateConfig(saes=(run,), out=out, store=path, n_bootstrap=1000))
    text = report(found, store, config, seeds, json.loads((out / FILE).read_text()))
    print(text)
    if asked.report:
        asked.report.write_text(text + "\n")


def arms_of(store: ActivationStore, k: int) -> tuple[ArmConfig, ...]:
    """The arms with as many features as there are true ones."""
    truth = store.truth()
    assert truth is not None
    return tuple(replace(arm, k=k, expansion=truth.n_features / store.d_model) for arm in ARMS)


def report(
    found: Evaluation,
    store: ActivationStore,
    config: TrainConfig,
    seeds: Sequence[int],
    ranking: dict[str, Any],
) -> str:
    """The tables as Markdown."""
    truth = store.truth()
    assert truth is not None
    control = config.arms[1]
    kinds = ", ".join(f"{int(truth.of_kind(kind).sum())} {kind}" for kind in KINDS)
    lines = [
        f"`{store.provenance.corpus}`: {truth.n_features} true features ({kinds}) in {store.d_model} dimensions, "
        f"{store.n_rows:,} tokens in {store.n_documents:,} documents; {config.steps * config.batch_tokens:,} training "
        f"tokens in {config.steps} steps; F = {control.features(store.d_model)}, k = {control.block_k} in block H "
        f"(20 % of F) + {control.k - control.block_k}; {len(seeds)} paired seeds; measured on "
        f"{found.conditions['n_documents']} test documents. Means over seeds, in brackets Student's 95 % intervals "
        "over seeds.",
        "",
        *arms_table(found, FIGURES, [arm.name for arm in ARMS]),
        "",
        "EV: explained variance; recovered: true features with a decoder row of cosine > 0.9, all, slow and fast; F1 "
        "of firing, mean over pairs matched one to one (cosine > 0.7).",
        "",
        *arms_table(found, BLOCK_FIGURES, [arm.name for arm in ARMS if arm.block_share]),
        "",
        "slow (fast) in H: of recovered slow (fast) features, those whose best match is in block H, and the chance of "
        "it; purity: share of matched features that are slow, in H and of all; run: mean true run length, in tokens, "
        "of what the features stand for.",
        "",
        *differences_table(found, seeds),
        "",
        *ranking_table(ranking),
        "",
        "Agreement with the true run length (Spearman, 1: as the truth ranks them; sign turned for smoothness and "
        f"total variation): over the {len(found.rows)} SAEs with an interval over documents; over the matched features "
        "of an SAE, mean over SAEs with Student's interval over them; over the true features' own codes, with Bonett "
        "and Wright's interval. Last three columns: means of the metric on the true codes of slow, medium and fast "
        "features.",
    ]
    return "\n".join(lines)


def arms_table(found: Evaluation, figures: dict[str, tuple[str, str]], arms: Sequence[str]) -> list[str]:
    """One line an arm."""
    lines = [_line(["arm", *figures]), _line(["---"] * (1 + len(figures)))]
    for arm in arms:
        cells = [arm]
        for metric, form in figures.values():
            values = [v for v in values_of(found, arm, metric).values() if v is not None]
            cells.append(_with_interval(values, form) if values else "-")
        lines.append(_line(cells))
    return lines


def differences_table(found: Evaluation, seeds: Sequence[int]) -> list[str]:
    """Paired differences from the control."""
    metrics = {"slow in H": "slow_in_H", "fast in H": "fast_in_H", "purity H": "purity_H"}
    metrics |= {"recovered": "recovered", "EV": "explained_variance", "F1": "f1"}
    lines = [_line(["arm - block", *metrics]), _line(["---"] * (1 + len(metrics)))]
    for arm in (arm.name for arm in ARMS if arm.name != CONTROL.name and arm.block_share):
        cells = [arm]
        for metric in metrics.values():
            treated, control = values_of(found, arm, metric), values_of(found, CONTROL.name, metric)
            apart = [
                a - b
                for seed in seeds
                if (a := treated[seed]) is not None and (b := control[seed]) is not None
            ]
            cells.append(_with_interval(apart, "+.3f") if apart else "-")
        lines.append(_line(cells))
    return lines


def ranking_table(ranking: dict[str, Any]) -> list[str]:
    """Agreement with the truth of each temporal metric: over SAEs, whole and H, and over features."""
    over_saes = {one["metric"]: one for one in ranking["over_saes"]}
    by_column: dict[str, list[float]] = {}
    for found in ranking["over_features"].values():
        for one in found:
            if one["spearman"] is not None:
                by_column.setdefault(one["metric"], []).append(one["spearman"])
    of_truth = {one["metric"]: one for one in ranking["over_true_features"]}
    names = dict.fromkeys(re.sub(r"_(whole|H|L)(?=_lag|$)", "", name) for name in over_saes)
    lines = [
        _line(
            [
                "metric",
                "SAEs, whole",
                "SAEs, H",
                "SAEs, whole, energy-weighted",
                "features",
                "true codes",
                *KINDS,
            ]
        ),
        _line(["---"] * 9),
    ]
    for name in names:
        lag = re.search(r"_lag(\d+)$", name)
        if name.startswith("energy_weighted_") or (lag and int(lag[1]) not in SHOWN_LAGS):
            continue
        stem, tail = (name[: lag.start()], lag[0]) if lag else (name, "")
        cells = [name.replace("_", " ")]
        for full in (f"{stem}_whole{tail}", f"{stem}_H{tail}", f"energy_weighted_{stem}_whole{tail}"):
            one = over_saes.get(full)
            cells.append("-" if one is None or one["spearman"] is None else _agreement(one))
        values = by_column.get(name, [])
        cells.append(_with_interval(values, ".2f") if values else "-")
        own = of_truth.get(name)
        cells.append("-" if own is None or own["spearman"] is None else _agreement(own))
        by_kind = ranking["oracle"].get(name, {})
        for kind in KINDS:
            value = by_kind.get(kind)
            cells.append("-" if value is None else f"{value:.3g}")
        lines.append(_line(cells))
    return lines


def values_of(found: Evaluation, arm: str, metric: str) -> dict[int | None, float | None]:
    """A figure of an arm by seed."""
    return {
        row.seed: row.estimates[metric].value if metric in row.estimates else None
        for row in found.rows
        if row.arm == arm
    }


def _agreement(one: dict[str, Any]) -> str:
    ends = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}]"
    return f"{one['spearman']:.2f}{ends}"


def _with_interval(values: Sequence[float], form: str) -> str:
    """Mean and Student's interval."""
    centre = mean(values)
    if len(values) < 2:
        return format(centre, form)
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{format(centre, form)} [{format(centre - half, form)}, {format(centre + half, form)}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
