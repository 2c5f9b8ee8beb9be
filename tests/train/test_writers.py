"""TensorBoard and Weights & Biases get the lines of metrics.parquet, each once."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, Interrupted, UnknownName
from tcsae.train import Run, TrainConfig, train
from tcsae.train.arm import Arm
from tcsae.train.writers import WeightsAndBiases, check_writers

ConfigFactory = Callable[..., TrainConfig]


def _stop_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    original = Arm.step

    def step(self: Arm, batch: Any, pairs: Any, around: Any, number: int, **more: Any) -> dict[str, Any]:
        if number == at and self.name == "tc8-s0":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, pairs, around, number, **more)

    monkeypatch.setattr(Arm, "step", step)


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder)).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        lines = [(event.step, event.value) for event in events.Scalars(tag)]
        assert len({step for step, _ in lines}) == len(lines), f"{tag}: a step is there twice"
        found[tag] = dict(lines)
    return found


def _check_against_metrics(run: Run, read: Callable[[str], dict[str, dict[int, float]]]) -> None:
    table = pq.read_table(run.metrics).to_pylist()
    for name in ("block", "tc8"):
        lines = [line for line in table if line["arm"] == name]
        found = read(f"{name}-s0")
        for term in ("loss", "fvu", "l0", "accuracy", "resampled", "learning_rate"):
            expected = {line["step"]: line[term] for line in lines if math.isfinite(line[term])}
            assert found[term] == pytest.approx(expected, rel=1e-6), term
        assert "gradient_ratio" not in found or name == "tc8"


def test_tensorboard_shows_the_lines_of_an_interrupted_and_resumed_run_once(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    config = small_config(checkpoint_every=100)
    with monkeypatch.context() as patch:
        _stop_at(patch, 21)
        with pytest.raises(Interrupted):
            train(sticky_store, tmp_path / "run", config, log_to=["tensorboard"])
    run = train(sticky_store, tmp_path / "run", resume=True, log_to=["tensorboard"])
    folder = run.path / "tensorboard"
    assert sorted(p.name for p in folder.iterdir()) == ["block-s0", "machine", "tc8-s0"]
    _check_against_metrics(run, lambda sae: _scalars(folder / sae))
    machine = _scalars(folder / "machine")
    assert set(machine) == {"tokens_per_second", "memory_bytes"}
    assert set(machine["memory_bytes"]) == {1, *range(5, 41, 5)}


@pytest.mark.parametrize("done", [1, 0], ids=["after a step", "before any"])
def test_what_a_killed_process_wrote_after_its_checkpoint_is_forgotten(
    small_config: ConfigFactory, tmp_path: Path, done: int
) -> None:
    pytest.importorskip("tensorboard")
    from tcsae.train.writers import TensorBoard

    machine = {"tokens_per_second": 1.0, "memory_bytes": 2.0}
    killed = TensorBoard(tmp_path, small_config(), 0)
    for step in (1, 2, 3):
        killed.write(step, {"tc8-s0": {"loss": -1.0}}, machine)  # never closed
    time.sleep(1.1)  # event files are read in the order of the second in their names
    resumed = TensorBoard(tmp_path, small_config(), done)
    for step in range(done + 1, 5):
        resumed.write(step, {"tc8-s0": {"loss": float(step), "contrast": math.nan}}, machine)
    resumed.close()
    expected = {1: -1.0 if done else 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert _scalars(tmp_path / "tensorboard" / "tc8-s0") == {"loss": expected}


def test_weights_and_biases_go_on_offline_under_one_id(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    written: list[int] = []
    original = WeightsAndBiases.write

    def write(self: WeightsAndBiases, step: int, *rest: Any) -> None:
        before = self._newest
        original(self, step, *rest)
        if self._newest > before:
            written.append(step)

    monkeypatch.setattr(WeightsAndBiases, "write", write)
    with monkeypatch.context() as patch:
        _stop_at(patch, 21)
        with pytest.raises(Interrupted):
            train(sticky_store, tmp_path / "run", small_config(), log_to=["wandb"])
    begun = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert begun["step"] == 20
    # As if the process had been killed after it had logged a step that its last checkpoint does not have.
    (tmp_path / "run" / "wandb.json").write_text(json.dumps({**begun, "step": 25}))
    run = train(sticky_store, tmp_path / "run", resume=True, log_to=["wandb"])
    assert json.loads((run.path / "wandb.json").read_text()) == {"id": begun["id"], "step": 40}
    assert written == [1, 5, 10, 15, 20, 30, 35, 40]
    folders = list((run.path / "wandb").glob(f"offline-run-*-{begun['id']}"))
    assert folders
    assert all(list(folder.glob("*.wandb")) for folder in folders)


def test_weights_and_biases_go_on_under_one_id_also_after_a_process_killed_before_its_first_checkpoint(
    small_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    path, found = tmp_path / "wandb.json", []
    for last in (2, 3):
        writer = WeightsAndBiases(tmp_path, small_config(), 0)
        for step in range(1, last + 1):
            writer.write(step, {"tc8-s0": {"loss": 1.0}}, {"memory_bytes": 2.0})
            found.append(json.loads(path.read_text()))
        writer.close()
    assert len({one["id"] for one in found}) == 1
    assert [one["step"] for one in found] == [1, 2, 2, 2, 3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_writer_that_is_not_installed_is_refused_before_anything_is_written(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    # None makes `import` raise what a missing package does.
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name], None)
    with pytest.raises(ConfigError, match=rf"--log {name}: .* pip install 'tcsae\[{name}\]'") as caught:
        train(sticky_store, tmp_path / "run", small_config(), log_to=[name])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnknownName, match="did you mean: wandb"):
        check_writers(["wandbb"])
