"""Harvest, train and evaluate as a user does: the real command, a GPT-NeoX folder, real text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tcsae.store import ActivationStore
from tcsae.tests.fixtures import save_neox, write_corpus

HOOK = "blocks.1.hook_resid_post"
SMALL = (
    "batch_tokens=512",
    "ring_size=1024",
    "ring_feed=256",
    "anchors=64",
    "warmup_steps=5",
    "k=8",
    "precision=float32",
)
TRAIN = [
    "--recipe",
    "block",
    "--recipe",
    "tc16",
    "--tokens",
    "30720",
    *(p for s in SMALL for p in ("--set", s)),
]


def tcsae(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "tcsae.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus and what the three commands made of them."""
    path = tmp_path_factory.mktemp("pipeline")
    save_neox(path / "model", n_layers=3, d_model=64, n_heads=4, seed=0)
    write_corpus(path / "corpus.jsonl", n_documents=120, parts="boolq,coqa")
    source = ["--model", "model", "--corpus", "corpus.jsonl", "--hook", HOOK, "--context-length", "64"]
    for arguments in (
        ["harvest", "acts.zarr", *source, "--rows-per-chunk", "4096", "--max-tokens", "30000"],
        ["train", "acts.zarr", "run", *TRAIN],
        ["evaluate", "run", "results", "--store", "acts.zarr", "--max-tokens", "500"],
    ):
        done = tcsae(*arguments, cwd=path)
        assert done.returncode == 0, done.stderr
        (path / f"{arguments[0]}.out").write_text(done.stdout)
    return path


def test_a_store_a_run_and_results_are_there(folder):
    store = ActivationStore.open(folder / "acts.zarr")
    assert 15_000 < store.n_rows <= 30_000
    for name in (
        "run/config.toml",
        "run/run.json",
        "run/metrics.parquet",
        "run/training_metrics.png",
        "run/sae/block-s0/cfg.json",
        "run/sae/tc16-s0/sae_weights.safetensors",
        "results/core/block-s0.json",
        "results/temporal/tc16-s0.json",
        "results/summary.json",
        "results/final_metrics.png",
    ):
        assert (folder / name).stat().st_size > 0, name


def test_the_table_names_both_arms_with_intervals(folder):
    printed = (folder / "evaluate.out").read_text()
    rows = {line.split()[0]: line for line in printed.splitlines() if line.split()[1:2] == ["0"]}
    assert set(rows) == {"block", "tc16"}, printed
    assert all("[" in row for row in rows.values())
    assert "tc16-s0 against block-s0" in printed


def test_every_figure_has_an_interval_or_a_reason(folder):
    summary = pq.read_table(folder / "results" / "summary.parquet").to_pylist()
    by_name = {(line["arm"], line["metric"]): line for line in summary}
    for metric in ("explained_variance", "l0", "loss_recovered", "kl_sae", "autocorrelation_H_lag8"):
        for arm in ("block", "tc16"):
            line = by_name[arm, metric]
            assert line["low"] <= line["value"] <= line["high"], line
            assert line["n_documents"] > 1


def test_a_dry_run_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    source = ["--model", "model", "--corpus", "corpus.jsonl", "--hook", HOOK]
    planned = tcsae("harvest", "other.zarr", *source, "--dry-run", "--json", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["rows"] > 1000
    trained = tcsae("train", "acts.zarr", "other", *TRAIN, "--dry-run", "--json", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 60
    assert sorted(folder.rglob("*")) == before


def test_ctrl_c_saves_and_says_how_to_go_on(folder):
    command = [sys.executable, "-P", "-m", "tcsae.cli", "train", "acts.zarr", "stopped", *TRAIN]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "stopped" / "run.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "tcsae train acts.zarr stopped --resume" in said
    again = tcsae("train", "acts.zarr", "stopped", "--resume", cwd=folder)
    assert again.returncode == 0, again.stderr
    for name in ("metrics.parquet", "sae/tc16-s0/sae_weights.safetensors"):
        assert (folder / "stopped" / name).read_bytes() == (folder / "run" / name).read_bytes(), name


def test_another_store_than_the_run_is_refused_with_both_named(folder):
    source = ["--model", "model", "--corpus", "corpus.jsonl", "--hook", "blocks.0.hook_resid_post"]
    made = tcsae("harvest", "below.zarr", *source, "--max-tokens", "9000", cwd=folder)
    assert made.returncode == 0, made.stderr
    done = tcsae("evaluate", "run", "wrong", "--store", "below.zarr", cwd=folder)
    assert done.returncode == 1
    assert HOOK in done.stderr
    assert "blocks.0.hook_resid_post" in done.stderr
    assert not (folder / "wrong").exists()
