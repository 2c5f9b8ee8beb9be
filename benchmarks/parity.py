"""Our core suite against SAEBench's own code: same model, rows, batches and SAEs, every field.

python -P benchmarks/parity.py --peers-python PYTHON [--smollm2 SAE_FOLDER] [--rows 32] [--folder DIR]

PYTHON is that of an environment where sae-bench 0.6.0 is installed. The model has Pythia-70m's shape and vocabulary and
random weights; its SAEs are a ReLU, a TopK and a JumpReLU with random directions about the mean activation. With
--smollm2 an SAE of SmolLM2-135M is compared as well, on rows of real text. Printed as Markdown.

A deviation is relative to SAEBench's figure; of ce_loss_score, which may be near 0, it is absolute. A featurewise one
is relative to SAEBench's figure or to a hundredth of the largest of its column, where that is more.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from tcsae.evaluate import EvaluateConfig, evaluate
from tcsae.harvest.locate import locate
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.tests.fixtures import save_neox, write_corpus
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import load_sae, save_sae

PEER = Path(__file__).parent / "peers" / "saebench_core.py"
BATCH_SIZE = 16
CONTEXT = 128
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


class Compared(NamedTuple):
    """Some SAEs here and in SAEBench."""

    deviations: dict[str, list[Deviation]]
    """by SAE"""
    firings: dict[str, Firings]
    """by SAE"""
    versions: dict[str, str]
    """of SAEBench and what it computes with"""


def random_saes(
    model: LanguageModel, hook: str, rows: Int64[np.ndarray, "row position"], d_sae: int
) -> list[SAE]:
    """A ReLU, a TopK and a JumpReLU SAE about the mean of the model's activations."""
    ids = torch.from_numpy(rows)
    x = model.residuals(ids, [hook])[hook][:, 1:].flatten(0, 1)
    draw = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], generator=draw), dim=1)
    W_enc = W_dec.T + 0.02 * torch.randn(W_dec.T.shape, generator=draw)
    pre = (x - x.mean(dim=0)) @ W_enc
    spread = pre.std().item()
    # biases of both signs: some features are dead, some dense
    bias = spread * (torch.randn(d_sae, generator=draw) - 2)
    metadata = {
        "model_name": model.name,
        "hook_name": hook,
        "prepend_bos": True,
        "context_size": rows.shape[1],
    }
    common: dict[str, Any] = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": x.mean(dim=0), "metadata": metadata}
    threshold = spread * (1 + torch.rand(d_sae, generator=draw))
    return [
        SAE(architecture="standard", name="relu", b_enc=bias, **common),
        SAE(architecture="topk", name="topk", b_enc=torch.zeros(d_sae), k=min(32, d_sae // 4), **common),
        SAE(architecture="jumprelu", name="jumprelu", b_enc=0.1 * bias, threshold=threshold, **common),
    ]


def firings_that_differ(ours: dict[str, Any], theirs: dict[str, Any]) -> Firings:
    """Where rounding puts an activation on the other side of a threshold, or ties of a top-k, a count differs."""
    n_kept = ours["eval_result_unstructured"]["tcsae"]["replay"]["n_kept"]
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
    }
    if not (reuses and (out / "saebench.json").is_file()):
        command = [python, "-P", str(PEER), json.dumps(asked)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError("SAEBench failed: " + "\n".join(ran.stderr.splitlines()[-15:]))
    theirs = json.loads((out / "saebench.json").read_text())
    found, firings = {}, {}
    for folder, row in zip(folders, ours.rows, strict=True):
        body = json.loads((out / "core" / f"{row.sae}.json").read_text())
        found[row.sae] = deviations(body, theirs["saes"][folder.name])
        firings[row.sae] = firings_that_differ(body, theirs["saes"][folder.name])
    return Compared(found, firings, theirs["versions"])


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
    everything = [one for columns in found.values() for one in columns]
    finite = [one for one in everything if one.size is not None]
    scalars = [one for one in finite if one.theirs is not None]
    worst = max(scalars, key=lambda one: one.size or 0.0)
    print(
        f"\n{len(scalars)} single figures compared, {sum(one.n_beyond for one in scalars)} beyond the bar; the largest "
        f"deviation is {worst.size:.1e} ({worst.field}); {sum(one.size is None for one in everything)} not finite in "
        f"SAEBench. {sum(one.n_compared for one in finite if one.theirs is None):,} featurewise ones, "
        f"{sum(one.n_beyond for one in finite if one.theirs is None)} beyond the bar."
    )
    for name, firings in compared.firings.items():
        print(
            f"{name}: {firings.n_features} of the counts behind feature_density differ, by at most {firings.most} of "
            f"{firings.n_kept:,} tokens."
        )


def random_rows(model: LanguageModel, n_rows: int) -> Int64[np.ndarray, "row position"]:
    """Rows of random tokens, BOS in front, a special token inside every fourth."""
    rows = np.random.default_rng(0).integers(10, 50_000, size=(n_rows, CONTEXT))
    assert model.bos_token_id is not None
    rows[:, 0] = model.bos_token_id
    rows[::4, CONTEXT // 2] = model.special_token_ids[0]
    return rows


def text_rows(model: LanguageModel, n_rows: int, folder: Path) -> Int64[np.ndarray, "row position"]:
    """Rows of real text: documents one after the other, BOS in front of each row."""
    write_corpus(folder / "corpus.jsonl", n_documents=400)
    lines = (folder / "corpus.jsonl").read_text("utf-8").splitlines()
    tokens: list[int] = []
    for line in lines:
        tokens += model.tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    cut = np.array(tokens[: n_rows * (CONTEXT - 1)]).reshape(n_rows, CONTEXT - 1)
    return np.concatenate([np.full((n_rows, 1), model.bos_token_id), cut], axis=1)


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
