"""From a real run through a real evaluation to the report, by the real command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tcsae.evaluate import EvaluateConfig, compare, evaluate
from tcsae.evaluate.compare.folders import read_folders
from tcsae.store import ActivationStore
from tcsae.train import ArmConfig, TrainConfig, train

SMALL = {
    "expansion": 1.5,
    "k": 4,
    "block_share": 0.25,
    "block_k_share": 0.5,
    "anchors": 8,
    "warmup_steps": 2,
    "aux_k": 2,
}


@pytest.fixture
def out(neox_store: ActivationStore, tmp_path: Path) -> Path:
    """The evaluation folder of a trained run: the contrast and its control, two seeds."""
    arms = ArmConfig(name="block", **SMALL), ArmConfig(name="tc16", alpha=0.02, **SMALL)
    budget = {"tokens": 6 * 128, "batch_tokens": 128, "ring_size": 64, "ring_feed": 32, "min_position": 2}
    run = train(neox_store, tmp_path / "run", TrainConfig(arms=arms, seeds=(0, 1), **budget))
    config = EvaluateConfig(
        saes=(run.path,),
        out=tmp_path / "out",
        store=neox_store.path,
        split="all",
        suites=("temporal", "core"),
        max_tokens=200,
        batch_size=4,
        n_bootstrap=100,
        device="cpu",
    )
    evaluate(config)
    return config.out


def test_a_real_evaluation_holds_what_a_comparison_needs_and_the_command_writes_every_figure(
    out: Path,
) -> None:
    folders = read_folders([out])
    assert [(one.arm, one.seed) for one in folders.saes] == [
        ("block", 0),
        ("block", 1),
        ("tc16", 0),
        ("tc16", 1),
    ]
    assert len({one.origin["digest"] for one in folders.saes}) == 4
    for one in folders.saes:
        assert one.origin["tokens"] == 768
        assert one.origin["steps"] == 6
        assert one.settings["alpha"] == (0.02 if one.arm == "tc16" else 0.0)
        assert one.folder == out.parent / "run" / "sae" / one.sae
        assert one.features is not None
        assert (one.tokens["fvu"] or 0) > 500
        assert (one.tokens["loss_recovered"] or 0) <= 200

    report = out.parent / "report"
    command = [sys.executable, "-P", "-m", "tcsae.cli", "compare", str(out), "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("primary    tc16 - block: excess_information_whole_lag8")
    assert max(map(len, done.stdout.splitlines())) <= 120
    names = {path.name for path in report.iterdir()}
    figures = {"training_metrics.png", "final_metrics.png", "tradeoff.png", "autocorrelation.png"}
    tables = {"arms.parquet", "comparisons.parquet", "front.parquet", "matched_features.parquet"}
    assert names == figures | tables | {"report.html", "report.md", "compare.json"}
    found = json.loads((report / "compare.json").read_text())
    (features,) = found["matched_features"]
    assert set(features["rates"]) == {"0", "1"}
    assert features["changes"]


@pytest.mark.slow
def test_a_run_that_was_trained_anew_since_lends_no_curves(out: Path) -> None:
    saes = out.parent / "run" / "sae"
    for name in ("sae_weights.safetensors", "cfg.json"):
        shutil.copy(saes / "tc16-s1" / name, saes / "tc16-s0" / name)
    found = compare([out], out.parent / "report", n_resamples=1000)
    assert any("without tc16-s0: no run found, or not comparable" in line for line in found.not_computed)


@pytest.mark.slow
def test_without_its_run_an_evaluation_is_still_compared(out: Path) -> None:
    shutil.rmtree(out.parent / "run")
    found = compare([out], out.parent / "report", n_resamples=1000)
    assert found.primary is not None
    assert found.primary.difference.value is not None
    assert "training_metrics" not in found.images
    assert any(line.startswith("training_metrics.png") for line in found.not_computed)
