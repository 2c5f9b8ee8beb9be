"""Our core suite against SAEBench's own code: same model, rows, batches and SAEs, every field.

python -P benchmarks/parity.py --peers-python PYTHON [--smollm2 SAE_FOLDER] [--rows 32] [--folder DIR]

PYTHON is that of an environment where sae-bench 0.6.0 is installed. The model has Pythia-70m's shape and vocabulary and
random weights; its SAEs are a ReLU, a TopK and a JumpReLU with random directions about the mean activation. With
--smollm2 an SAE of SmolLM2-135M is compared as well, on rows of real text. Then every figure is computed once more from
the activations that SAEBench saw, which tells rounding in the model from another definition. Printed as Markdown.

A deviation is relative to SAEBench's figure; of ce_loss_score, which may be near 0, it is absolute. A featurewise one
is relative to SAEBench's figure or to a hundredth of the largest of its column, where that is more.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tcsae.benchmarks.parity_inputs import CONTEXT, random_rows, random_saes, text_rows
from tcsae.benchmarks.parity_peer import OTHER_PRODUCTS, as_a_result, saebench_figures
from tcsae.benchmarks.rounding import (
    Activations,
    Thresholds,
    body_from_activations,
    double_activations,
    hold_activations,
    hold_firings,
    our_activations,
)
from tcsae.evaluate import EvaluateConfig, evaluate
from tcsae.evaluate.token_rows import read_token_rows
from tcsae.harvest.locate import locate
from tcsae.harvest.model import load_model
from tcsae.tests.fixtures import save_neox
from tcsae.train.saelens import load_sae, save_sae

BATCH_SIZE = 16
HOOK = "blocks.3.hook_resid_post"

RELATIVE, ABSOLUTE = 1e-4, 1e-3
"""bars: of every figure, and of ce_loss_score"""


class Deviation(NamedTuple):
    """One figure of one SAE, or a featurewise column of it."""

    field: str
    """SAEBench's name"""
    ours: float | None
    """our figure; None for a column"""
    theirs: float | None
    """SAEBench's; None for a column"""
    size: float | None
    """largest deviation; None where SAEBench's figure is not finite"""
    n_compared: int
    """figures"""
    n_beyond: int
    """figures beyond the bar"""


class Firings(NamedTuple):
    """How far the counts behind feature_density differ, which are whole numbers."""

    n_features: int
    """features whose count differs"""
    most: int
    """firings by which one does, at most"""
    n_kept: int
    """tokens that are counted"""


class Handed(NamedTuple):
    """One SAE on the activations that SAEBench saw."""

    thresholds: Thresholds
    """firings there against those on our activations"""
    deviations: list[Deviation]
    """of our figures from SAEBench's, both of those activations"""
    firings: Firings
    """the counts behind feature_density"""


class Compared(NamedTuple):
    """Some SAEs here and in SAEBench."""

    deviations: dict[str, list[Deviation]]
    """by SAE"""
    firings: dict[str, Firings]
    """by SAE"""
    activations: Activations
    """ours against SAEBench's"""
    handed: dict[str, Handed]
    """by SAE"""
    itself: dict[str, list[Deviation]]
    """by SAE: of SAEBench with `OTHER_PRODUCTS` from SAEBench"""
    versions: dict[str, str]
    """of SAEBench and what it computes with"""


def firings_that_differ(ours: dict[str, Any], theirs: dict[str, Any], n_kept: int) -> Firings:
    """Where rounding puts an activation on the other side of a threshold, or ties of a top-k, a count differs."""
    mine = np.array([one["feature_density"] for one in ours["eval_result_details"]])
    differ = np.rint(np.abs(mine - np.array(theirs["features"]["feature_density"])) * n_kept)
    return Firings(int((differ > 0).sum()), int(differ.max()), n_kept)


def compare(
    python: str,
    model: Path | str,
    folders: Sequence[Path],
    rows: Path,
    out: Path,
    *,
    reuses: bool = False,
) -> Compared:
    """Evaluate the SAEs of ``folders`` here and by SAEBench; with ``reuses`` its figures may be an earlier call's.

    Raises RuntimeError with its last lines if SAEBench fails.
    """
    ours = evaluate(
        EvaluateConfig(
            saes=tuple(folders),
            out=out,
            tokens=rows,
            model=str(model),
            suites=("core",),
            batch_size=BATCH_SIZE,
            device="cpu",
        )
    )
    asked = {
        "model": str(locate(str(model)).folder),
        "saes": [str(folder) for folder in folders],
        "rows": str(rows),
        "batch_size": BATCH_SIZE,
        "threads": torch.get_num_threads(),
        "out": str(out / "saebench.json"),
        "seen": str(out / "seen"),
    }
    theirs = saebench_figures(python, asked, {}, reuses=reuses)
    again = {"out": str(out / "saebench-again.json"), "seen": str(out / "seen-again")}
    theirs_again = saebench_figures(python, asked | again, OTHER_PRODUCTS, reuses=reuses)
    language_model = load_model(str(model), device="cpu")
    batches = read_token_rows(rows).batches(BATCH_SIZE, language_model.special_token_ids)
    keep = torch.cat([batch.keep for batch in batches])
    hook = load_sae(folders[0]).metadata["hook_name"]
    mine = our_activations(language_model, hook, batches)[keep]
    double = double_activations(locate(str(model)).folder, hook, batches)[keep]
    found, firings, handed, itself = {}, {}, {}, {}
    for folder, row in zip(folders, ours.rows, strict=True):
        body = json.loads((out / "core" / f"{row.sae}.json").read_text())
        other = theirs["saes"][folder.name]
        found[row.sae] = deviations(body, other)
        firings[row.sae] = firings_that_differ(body, other, int(keep.sum()))
        itself[row.sae] = deviations(as_a_result(theirs_again["saes"][folder.name]), other)
        seen = torch.from_numpy(np.load(out / "seen" / f"{folder.name}.npy"))
        sae = load_sae(folder)
        body = body_from_activations(language_model, hook, sae, batches, seen)
        handed[row.sae] = Handed(
            hold_firings(sae, mine, seen[keep], double),
            deviations(body, other),
            firings_that_differ(body, other, int(keep.sum())),
        )
        activations = hold_activations(mine, seen[keep], double)
    return Compared(found, firings, activations, handed, itself, theirs["versions"])


def deviations(ours: dict[str, Any], theirs: dict[str, Any]) -> list[Deviation]:
    """Every figure of our result's file against SAEBench's; raises if either has one that the other has not."""
    found = []
    for category, figures in theirs["metrics"].items():
        if figures.keys() != ours["eval_result_metrics"][category].keys():
            raise AssertionError(f"{category}: fields differ")
        for name, value in figures.items():
            mine = ours["eval_result_metrics"][category][name]
            bar = ABSOLUTE if name == "ce_loss_score" else RELATIVE
            size = None
            if math.isfinite(value):
                scale = 1.0 if name == "ce_loss_score" or value == 0 else abs(value)
                size = abs(mine - value) / scale
            found.append(Deviation(name, mine, value, size, 1, int(size is not None and size > bar)))
    for name, values in theirs["features"].items():
        column = np.array(values, dtype=np.float64)
        mine = np.array([one[name] for one in ours["eval_result_details"]])
        finite = np.isfinite(column)
        if (mine[~finite] != -1).any():
            raise AssertionError(f"{name}: a figure that SAEBench has not")
        largest = np.abs(column[finite]).max(initial=0.0)
        sizes = np.abs(mine - column)[finite] / np.maximum(np.abs(column[finite]), max(0.01 * largest, 1e-9))
        beyond = int((sizes > RELATIVE).sum())
        found.append(Deviation(name, None, None, float(sizes.max(initial=0.0)), int(finite.sum()), beyond))
    return found


def report(title: str, compared: Compared) -> None:
    """One Markdown table: a line a field, a column an SAE."""
    found = compared.deviations
    print(f"\n### {title}\n")
    print("| field | " + " | ".join(f"{name}: SAEBench | deviation" for name in found) + " |")
    print("|---|" + "---:|---:|" * len(found))
    for at, first in enumerate(next(iter(found.values()))):
        cells = []
        for columns in found.values():
            one = columns[at]
            value = f"{one.n_compared} features" if one.theirs is None else f"{one.theirs:.6g}"
            size = "none to compare" if one.size is None else f"{one.size:.1e}"
            cells += [value, f"{size}{f' ({one.n_beyond} beyond)' if one.n_beyond else ''}"]
        print(f"| {first.field} | " + " | ".join(cells) + " |")
    print(f"\n{in_words([one for columns in found.values() for one in columns])}")
    for name, firings in compared.firings.items():
        print(
            f"{name}: {firings.n_features} of the counts behind feature_density differ, by at most {firings.most} of "
            f"{firings.n_kept:,} tokens."
        )
    report_rounding(compared)


def in_words(everything: Sequence[Deviation]) -> str:
    """How many figures were compared, how many are beyond the bar, and the largest deviation."""
    finite = [one for one in everything if one.size is not None]
    scalars = [one for one in finite if one.theirs is not None]
    worst = max(scalars, key=lambda one: one.size or 0.0)
    return (
        f"{len(scalars)} single figures compared, {sum(one.n_beyond for one in scalars)} beyond the bar; the largest "
        f"deviation is {worst.size:.1e} ({worst.field}); {sum(one.size is None for one in everything)} not finite in "
        f"SAEBench. {sum(one.n_compared for one in finite if one.theirs is None):,} featurewise ones, "
        f"{sum(one.n_beyond for one in finite if one.theirs is None)} beyond the bar."
    )


def report_rounding(compared: Compared) -> None:
    """What the activations' last bits do, and what is left without them."""
    x = compared.activations
    print(
        f"\n{x.n_differ:,} of the {x.n_values:,} activations differ from those that SAEBench saw in TransformerLens, "
        f"by at most {x.largest:.1e} of a token's norm. From a float64 pass of the same weights ours are "
        f"{x.ours_from_double:.2e} away and SAEBench's {x.theirs_from_double:.2e} (root mean square; that of the "
        f"activations is {x.size:.3g}).\n"
    )
    print(
        "| SAE | firings | differ | largest distance of these from the threshold | largest shift of a pre-activation "
        "| differ from float64: ours | SAEBench's | on SAEBench's activations: counts that differ |"
    )
    print("|---|" + "---:|" * 7)
    for name, handed in compared.handed.items():
        one = handed.thresholds
        margin = f"{one.margin:.1e}" if one.n_differ else "-"
        print(
            f"| {name} | {one.n_firings:,} | {one.n_differ} | {margin} | {one.shift:.1e} | {one.ours_from_double} | "
            f"{one.theirs_from_double} | {handed.firings.n_features} |"
        )
    print(
        "\nOur figures of the activations that SAEBench saw: "
        + in_words([one for handed in compared.handed.values() for one in handed.deviations])
    )
    print(
        "\nSAEBench against itself, its products computed with the instructions of another machine: "
        + in_words([one for columns in compared.itself.values() for one in columns])
    )


def main() -> None:
    """Make the examples, compare them and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers-python", required=True, help="Python of an environment with sae-bench")
    parser.add_argument("--smollm2", type=Path, help="an SAE of SmolLM2-135M to compare as well")
    parser.add_argument(
        "--rows", type=int, default=32, help=f"rows of {CONTEXT} tokens, in batches of {BATCH_SIZE}"
    )
    parser.add_argument("--folder", type=Path, help="where files are kept; a temporary folder if left out")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="take SAEBench's figures that an earlier call has left in --folder",
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shape = save_neox(folder / "neox-70m", n_layers=6, d_model=512, n_heads=8)
        model = load_model(str(shape), device="cpu")
        rows = random_rows(model, asked.rows)
        np.save(folder / "rows.npy", rows)
        folders = []
        for sae in random_saes(model, HOOK, rows, d_sae=2048):
            save_sae(sae, folder / sae.name)
            folders.append(folder / sae.name)
        rows_file, out = folder / "rows.npy", folder / "out"
        found = compare(asked.peers_python, shape, folders, rows_file, out, reuses=asked.reuse)
        print(", ".join(f"{name} {number}" for name, number in found.versions.items()))
        title = f"Pythia-70m's shape, random weights, {HOOK}, {len(rows)} rows of {CONTEXT}, batches of {BATCH_SIZE}"
        report(title, found)
        if asked.smollm2 is not None:
            model = load_model("smollm2", device="cpu")
            np.save(folder / "text.npy", text_rows(model, asked.rows, folder))
            hook = load_sae(asked.smollm2).metadata["hook_name"]
            rows_file, out = folder / "text.npy", folder / "smollm2-out"
            saes = [asked.smollm2]
            found = compare(asked.peers_python, "smollm2", saes, rows_file, out, reuses=asked.reuse)
            report(f"SmolLM2-135M, {hook}, {asked.rows} rows of text of {CONTEXT}", found)


if __name__ == "__main__":
    main()
