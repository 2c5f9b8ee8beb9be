"""Two processes that train one run under torchrun give the run of one process, but for rounding."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError
from tcsae.train import TrainConfig, train
from tcsae.train.batches import WindowLoader
from tcsae.train.checkpoint import checkpoints, load_checkpoint
from tcsae.train.run import Run, writing
from tcsae.train.settings import to_toml
from tcsae.train.training import Training
from tcsae.train.world import ALONE, Processes, joined

TIMEOUT = 240
"""seconds; far more than needed, for machines that are busy with something else"""

METHODS = """
import json, os, sys, torch
from tcsae.store.errors import ConfigError
from tcsae.train.world import joined
with joined(torch.device("cpu")) as (world, _):
    rank = world.rank
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    x.requires_grad_()
    whole = world.sum(x)
    # this rank's addend of the loss: (rank + 1) * sum of squares of the whole
    ((rank + 1) * whole.square().sum()).backward()
    found = {
        "slice": list(range(10))[world.slice(10)],
        "sum": whole.tolist(),
        "gradient": x.grad.tolist(),
        "totals": world.totals(rank, 0.5),
        "any": world.any(torch.tensor([rank == 0, False, rank == 1])).tolist(),
        "gather": world.gather(torch.full((rank, 2), rank, dtype=torch.bfloat16)).tolist(),
        "nothing": list(world.gather(torch.zeros(0, 3, dtype=torch.bool)).shape),
    }
    parameter = torch.zeros(2)
    parameter.grad = torch.ones(2) if rank else None
    world.sum_gradients([parameter])
    found["gradients"] = parameter.grad.tolist()
    try:
        with world.together():
            if rank == 1:
                raise ConfigError("of rank 1")
    except ConfigError as error:
        found["error"] = str(error)
    open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(found))
"""

UNREADABLE = """
import sys, torch
from tcsae.store import ActivationStore
from tcsae.store.errors import StoreCorrupt
from tcsae.train.settings import load_config
from tcsae.train.training import Training
from tcsae.train.world import joined
store, config, folder = sys.argv[1:]
def fail():
    raise StoreCorrupt("of rank 1")
with joined(torch.device("cpu")) as (world, device):
    training = Training(ActivationStore.open(store), load_config(config), device, world)
    if world.rank == 1:
        training.loader.next = fail
    try:
        training.finish(folder)
    except StoreCorrupt as error:
        open(f"{folder}/{world.rank}.txt", "w").write(str(error))
"""


def torchrun(arguments: list[str], **options: object) -> subprocess.Popen[str]:
    """Two processes of ``arguments`` on this machine; the launcher's own process is returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--master-addr", "127.0.0.1", "--master-port", str(port), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def train_on_two(store: ActivationStore, run: Path, config: TrainConfig, *more: str) -> subprocess.Popen[str]:
    """``tcsae train`` on two processes, begun."""
    asked = run.with_name(f"{run.name}.toml")
    asked.write_text(to_toml(config))
    return torchrun(["-m", "tcsae.cli", "train", str(store.path), str(run), "--config", str(asked), *more])


def wait_for_checkpoint(process: subprocess.Popen[str], run: Path, after: int = 0) -> None:
    """Until there is one of more than ``after`` steps."""
    deadline = time.monotonic() + TIMEOUT
    while not any(int(path.stem.split("-")[1]) > after for path in checkpoints(run)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_run(one: Path, two: Path, rtol: float, atol: float = 1e-4) -> None:
    """Metrics of two finished runs agree within ``rtol``, weights, which are near 0.5, also within ``atol``.

    Adam makes a step of the learning rate even of a gradient that is nothing but rounding.
    """
    mine, theirs = (pq.read_table(path / "metrics.parquet") for path in (one, two))
    assert mine.column_names == theirs.column_names
    for name in mine.column_names:
        expected, got = mine[name].to_numpy(), theirs[name].to_numpy()
        if expected.dtype == object:
            assert expected.tolist() == got.tolist()
        else:
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-6, err_msg=name)
    last, expected_last = (load_checkpoint(checkpoints(path)[-1]).tensors for path in (two, one))
    assert last.keys() == expected_last.keys()
    for name, tensor in expected_last.items():
        if "/sae/" in name or name.startswith("ring/"):
            torch.testing.assert_close(last[name], tensor, rtol=rtol, atol=atol, msg=name)
    for a, b in zip(Run.open(one).saes, Run.open(two).saes, strict=True):
        saved, expected_saved = (load_file(path / "sae_weights.safetensors") for path in (b, a))
        torch.testing.assert_close(saved, expected_saved, rtol=rtol, atol=atol, msg=a.name)


@pytest.fixture
def many_arms(small_config: Callable[..., TrainConfig]) -> TrainConfig:
    """Every architecture and objective, and the options that look at the whole batch, for a few steps."""
    config = small_config(arm={"expansion": 16.0, "dead_after": 256}, tokens=15 * 128, log_every=2)
    block, tc8 = config.arms
    return replace(
        config,
        arms=(
            block,
            tc8,
            replace(block, name="topk", architecture="topk"),
            replace(block, name="matryoshka", architecture="matryoshka", prefix_shares=(0.25,)),
            replace(
                block,
                name="l1",
                architecture="standard",
                sparsity_weight=0.1,
                batch_norm=True,
                l2_weight=1e-4,
            ),
            replace(block, name="jumprelu", architecture="jumprelu", sparsity_weight=0.1),
            replace(block, name="gated", architecture="gated", sparsity_weight=0.1),
            replace(
                tc8,
                name="tsae",
                objective="in_batch",
                contrasted_code="after_top_k",
                positives="previous",
            ),
            replace(tc8, name="placebo", positives="other_document"),
            replace(tc8, name="kept", contrasted_code="after_top_k"),
            replace(tc8, name="difference", objective="difference"),
            replace(block, name="renewed", resample_every=5, average_decay=0.9, clip_norm=0.5),
        ),
    )


def test_the_methods_of_two_processes_give_what_their_docstrings_say(tmp_path: Path) -> None:
    (tmp_path / "methods.py").write_text(METHODS)
    process = torchrun([str(tmp_path / "methods.py"), str(tmp_path)])
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0].pop("slice") == [0, 1, 2, 3, 4]
    assert found[1].pop("slice") == [5, 6, 7, 8, 9]
    assert found[0] == found[1]
    # sum s = (1, 2) * 3; d/ds of (1 + 2) * |s|^2 is 6 s
    assert found[0] == {
        "sum": [3.0, 6.0],
        "gradient": [18.0, 36.0],
        "totals": [1.0, 1.0],
        "any": [True, False, True],
        "gather": [[1.0, 1.0]],
        "nothing": [0, 3],
        "gradients": [1.0, 1.0],
        "error": "of rank 1",
    }


def test_what_one_process_cannot_read_for_the_calibration_is_raised_on_all(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "unreadable.py").write_text(UNREADABLE)
    (tmp_path / "asked.toml").write_text(to_toml(small_config()))
    asked = [str(sticky_store.path), str(tmp_path / "asked.toml"), str(tmp_path)]
    process = torchrun([str(tmp_path / "unreadable.py"), *asked])
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["of rank 1"] * 2


def test_one_process_is_alone_and_gets_back_what_it_gives() -> None:
    with joined(torch.device("cpu")) as (world, device):
        assert world is ALONE
        assert device == torch.device("cpu")
    x = torch.ones(3)
    assert world.sum(x) is x
    assert world.gather(x) is x
    assert world.slice(6) == slice(0, 6)
    assert world.totals(2, 0.5) == [2.0, 0.5]


def test_an_environment_with_half_of_what_torchrun_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(
            ConfigError, match="WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"
        ),
        joined(torch.device("cpu")),
    ):
        pass


def test_windows_that_do_not_divide_among_the_processes_are_refused(sticky_store: ActivationStore) -> None:
    with pytest.raises(
        ConfigError, match="120 tokens are 15 windows of 8, which 2 processes.*multiple of 16"
    ):
        WindowLoader(
            sticky_store,
            None,
            window=8,
            batch_tokens=120,
            seed=0,
            min_position=2,
            device=torch.device("cpu"),
            world=Processes(0, 2, torch.device("cpu")),
        )


def test_two_processes_read_the_halves_of_the_batch_that_one_reads(sticky_store: ActivationStore) -> None:
    cpu = torch.device("cpu")

    def loader(world: object) -> WindowLoader:
        return WindowLoader(
            sticky_store, None, window=8, batch_tokens=128, seed=0, min_position=2, device=cpu, world=world
        )

    whole, *halves = (loader(world) for world in (ALONE, Processes(0, 2, cpu), Processes(1, 2, cpu)))
    for _ in range(40):  # over the end of an epoch
        expected, first, second = whole.next(), *(half.next() for half in halves)
        assert torch.cat([first.x, second.x]).equal(expected.x)
        assert [*first.position, *second.position] == expected.position.tolist()


def test_two_processes_train_as_one_with_the_same_batch(
    sticky_store: ActivationStore, many_arms: TrainConfig, tmp_path: Path
) -> None:
    one = train(sticky_store, tmp_path / "one", many_arms)
    process = train_on_two(sticky_store, tmp_path / "two", many_arms, "--json")
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=1e-4)
    logged = pq.read_table(one.metrics).to_pandas().groupby("arm").max()
    assert (logged["auxiliary"] > 0)["block"]  # so features were dead
    assert (logged["resampled"] > 0)["renewed"]
    assert (logged["n_pairs"] > 0).all()
    assert json.loads(out)["status"] == "finished"  # printed by one alone
    assert len(re.findall("train: +100%", err)) == 1


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = small_config(tokens=100 * 128)
    train(sticky_store, tmp_path / "one", config)
    process = train_on_two(sticky_store, tmp_path / "two", config)
    wait_for_checkpoint(process, tmp_path / "two")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT)
    assert len(re.findall("^tcsae: .*stopped by .* after step .* state is saved", err, re.MULTILINE)) == 1, (
        err
    )
    interrupted = Run.open(tmp_path / "two")
    assert interrupted.status == "interrupted"
    assert 7 <= interrupted.step == load_checkpoint(checkpoints(tmp_path / "two")[-1]).step < 100
    train(sticky_store, tmp_path / "two", config, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=1e-3)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two_after_one_of_them_was_killed(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config, run = small_config(tokens=100 * 128), tmp_path / "two"
    train(sticky_store, tmp_path / "one", config)
    training = Training(sticky_store, config, torch.device("cpu"))
    with writing(run, sticky_store, config, resume=False):
        for step in range(7):
            training.step(detailed=(step + 1) % config.log_every == 0 or step == 0)
        training.save(run)

    process = train_on_two(sticky_store, run, config)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert re.findall("^tcsae: .*", err, re.MULTILINE) == [
        f"tcsae: {run}: already holds a run; add --resume to go on with it, or choose another path"
    ]

    process = train_on_two(sticky_store, run, config, "--resume")
    wait_for_checkpoint(process, run, after=7)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    of_rank_1 = [w for w in workers if b"\0RANK=1\0" in Path(f"/proc/{w}/environ").read_bytes()]
    os.kill(int(of_rank_1[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert len(re.findall("^tcsae: a process of this run has ended.*--resume", err, re.MULTILINE)) == 1, err
    assert Run.open(run).status == "running"

    process = train_on_two(sticky_store, run, config, "--resume")
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "one", run, rtol=1e-3)


@pytest.mark.slow
def test_a_process_whose_slice_is_all_outliers_adds_nothing(
    make_store: Callable[..., ActivationStore], many_arms: TrainConfig, tmp_path: Path
) -> None:
    lengths = [40] * 40
    activations = torch.randn(1600, 16, generator=torch.Generator().manual_seed(0))
    activations[:120] *= 1000  # three documents
    tokens = np.random.default_rng(1).integers(50, size=sum(lengths))
    store = make_store(activations, lengths, tokens=tokens)

    def valid_halves(seed: int) -> list[list[bool]]:
        loader = WindowLoader(
            store, None, window=8, batch_tokens=16, seed=seed, min_position=2, device=torch.device("cpu")
        )
        return [loader.next().valid.view(2, 8).any(dim=1).tolist() for _ in range(8)]

    # An order in which a slice, but no whole batch, is without a token that counts.
    seed = next(n for n in range(100) if {(True, False), (True, True)} == {*map(tuple, valid_halves(n))})
    # features are not resampled in the last resample_every steps, so half of them is the most that there can be
    arms = tuple(replace(arm, resample_every=min(arm.resample_every, 4)) for arm in many_arms.arms)
    config = replace(many_arms, arms=arms, batch_tokens=16, tokens=8 * 16, data_seed=seed)
    train(store, tmp_path / "one", config)
    process = train_on_two(store, tmp_path / "two", config)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=2e-3)
