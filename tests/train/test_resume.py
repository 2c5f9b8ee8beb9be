"""A process killed with SIGKILL at a random step, resumed, ends as one that was never killed."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.device import choose_device
from tcsae.store.errors import RunError, RunMismatch
from tcsae.tests.train.architectures import every_architecture
from tcsae.tests.train.objectives import every_objective
from tcsae.train import TrainConfig, train
from tcsae.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tcsae.train.settings import to_toml
from tcsae.train.training import Training

TRAIN = """
import sys, torch
torch.set_num_threads(1)
from tcsae.store import ActivationStore
from tcsae.train import load_config, train
store, run, config = sys.argv[1:]
train(ActivationStore.open(store), run, load_config(config))
"""


CASES: dict[str, dict[str, Any]] = {
    "control and contrast": {"seeds": (0, 1)},
    "every architecture": {"arms": every_architecture(alpha=0.1)},
    "every objective": {"arms": every_objective()},
    "every objective in bfloat16": {"arms": every_objective(), "precision": "bfloat16"},
    "every option": {
        "seeds": (0, 1),
        "arm": {
            "expansion": 16.0,
            "decoder_bias": "geometric_median",
            "initialisation": "xavier",
            "unit_norm_decoder": False,
            "resample_every": 20,
            "dead_after": 128,
            "l2_weight": 1e-4,
            "clip_norm": 0.5,
            "average_decay": 0.95,
        },
    },
}
"""what of `small_config` a case changes; each is killed somewhere else"""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_bit_identical_to_uninterrupted(
    sticky_store: ActivationStore,
    small_config: Callable[..., TrainConfig],
    tmp_path: Path,
    seed: int,
    case: str,
) -> None:
    config = small_config(tokens=150 * 128, checkpoint_every=7, **CASES[case])
    whole = train(sticky_store, tmp_path / "whole", config)
    if case == "every option":
        assert min(pq.read_table(whole.metrics)["resampled"].to_pylist()[-4:]) > 0
    (tmp_path / "asked.toml").write_text(to_toml(config))
    killed = tmp_path / "killed"
    arguments = [str(sticky_store.path), str(killed), str(tmp_path / "asked.toml")]
    process = subprocess.Popen([sys.executable, "-P", "-c", TRAIN, *arguments], stderr=subprocess.DEVNULL)
    # Not at a checkpoint but somewhere after one: the delay is random, the checkpoint some way into the run.
    after = random.Random(f"{case} {seed}").randrange(1, 15)
    deadline = time.monotonic() + 600  # a hang, not a busy machine
    while not any(int(p.stem.split("-")[1]) >= 7 * after for p in checkpoints(killed)):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.Random(f"{case} {seed}").uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(killed.glob("sae/*"))

    resumed = train(sticky_store, killed, config, resume=True)
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    for mine, theirs in zip(resumed.saes, whole.saes, strict=True):
        for name in ("sae_weights.safetensors", "cfg.json"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    last, expected = (load_checkpoint(checkpoints(path)[-1]) for path in (killed, tmp_path / "whole"))
    assert last.facts == expected.facts
    assert last.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        if name != "machine":  # speed and memory
            assert last.tensors[name].equal(tensor), name


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_one_that_can_is_an_ordinary_file(
    tmp_path: Path,
) -> None:
    tensors = {"x": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, 1, {}, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / "ordinary").touch()
    assert save_checkpoint(tmp_path, 1, {}, tensors).stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_damaged_checkpoint_is_named(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(sticky_store, tmp_path / "run", small_config())
    newest = checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(RunError, match="step-00000040.safetensors: cannot be read"):
        load_checkpoint(newest)


def test_a_checkpoint_of_another_version_says_what_to_do(
    sticky_store: ActivationStore,
    small_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(sticky_store, tmp_path / "run", small_config())
    newest = checkpoints(tmp_path / "run")[-1]
    monkeypatch.setattr("tcsae.train.checkpoint.VERSION", 3)
    with pytest.raises(
        RunMismatch, match="version 2, this tcsae reads 3; finish the run with the tcsae that"
    ):
        load_checkpoint(newest)
    monkeypatch.setattr("tcsae.train.checkpoint.VERSION", 1)
    with pytest.raises(RunMismatch, match="version 2, this tcsae reads 1; upgrade tcsae"):
        load_checkpoint(newest)


def test_a_checkpoint_of_another_configuration_or_store_is_refused_by_name(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(sticky_store, tmp_path / "run", small_config())
    saved = load_checkpoint(checkpoints(tmp_path / "run")[-1])
    renamed = replace(small_config(), arms=tuple(replace(a, explanation="new") for a in small_config().arms))
    Training(sticky_store, renamed, choose_device("cpu")).restore(saved)  # decides nothing
    other = Training(sticky_store, small_config(data_seed=1), choose_device("cpu"))
    with pytest.raises(RunMismatch, match="made with another data_seed"):
        other.restore(saved)
    with pytest.raises(RunMismatch, match="of store elsewhere"):
        other.restore(saved._replace(facts={**saved.facts, "store": "elsewhere"}))
