"""Whole runs on a small store: what they write, what they refuse, when they stop."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.atomic import exclusive
from tcsae.store.errors import (
    ConfigError,
    Interrupted,
    RunBusy,
    RunExists,
    RunMismatch,
    RunNotFound,
    TrainingCollapsed,
)
from tcsae.train import ArmConfig, Run, TrainConfig, dry_run, load_config, load_sae, train
from tcsae.train import loop as training_loop
from tcsae.train import training as training_module
from tcsae.train.arm import Arm
from tcsae.train.batches import Rows, WindowLoader
from tcsae.train.checkpoint import checkpoints, load_checkpoint
from tcsae.train.collapse import CollapseWatch, Watched
from tcsae.train.pairs import Pairs
from tcsae.train.plots import plot_training
from tcsae.train.precision import Linear, float32_linear
from tcsae.train.ring import Ring
from tcsae.train.sae.batch_topk import BatchTopK
from tcsae.train.training import Training

CPU = torch.device("cpu")
ConfigFactory = Callable[..., TrainConfig]


def test_a_run_folder_holds_what_is_promised(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    config = small_config(seeds=(0, 1))
    run = train(sticky_store, tmp_path / "run", config)
    assert (run.status, run.step, run.steps) == ("finished", 40, 40)
    assert [folder.name for folder in run.saes] == ["block-s0", "block-s1", "tc8-s0", "tc8-s1"]
    assert load_config(run.path / "config.toml") == config
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["store"]["id"] == sticky_store.id
    assert facts["seeds"] == [0, 1]
    assert run.figure.read_bytes().startswith(b"\x89PNG")
    assert len(list((run.path / "checkpoints").iterdir())) == 2
    table = pq.read_table(run.metrics)
    # Steps 1, 5, 10, ... 40 for two arms and two seeds.
    assert table["step"].to_pylist()[::4] == [1, *range(5, 41, 5)]
    assert set(zip(table["arm"].to_pylist(), table["seed"].to_pylist(), strict=True)) == {
        (arm, seed) for arm in ("block", "tc8") for seed in (0, 1)
    }
    assert np.allclose(table["l0"].to_numpy(), 4)
    assert np.allclose(table["l0_h"].to_numpy(), 1)
    ratio = table["gradient_ratio"].to_numpy()
    of_tc8 = np.array(table["arm"].to_pylist()) == "tc8"
    assert np.isnan(ratio[~of_tc8]).all()
    assert (ratio[of_tc8][4:] > 0).all()


def test_the_saved_sae_says_what_it_is(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    run = train(sticky_store, tmp_path / "run", small_config(tokens=8 * 128, arm={"warmup_steps": 2}))
    sae = load_sae(run.saes[1])
    assert (sae.name, sae.block_size, sae.d_sae, sae.architecture) == ("tc8-s0", 16, 64, "jumprelu")
    assert sae.metadata["hook_name"] == sticky_store.hooks[0]
    ours = sae.metadata["tcsae"]
    assert (ours["arm"], ours["seed"], ours["store"]) == ("tc8", 0, sticky_store.id)
    assert ours["recipe"]["alpha"] == 0.1


def test_training_learns_and_the_contrast_makes_the_block_last(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    config = small_config(tokens=600 * 128, arm={"learning_rate": 5e-3}, checkpoint_every=600)
    run = train(sticky_store, tmp_path / "run", config)
    test = sticky_store.documents_in("test")
    x = torch.cat([sticky_store.document(int(i)) for i in test]).float()
    lag = []
    for folder in run.saes:
        sae = load_sae(folder)
        f = sae.encode(x)
        explained = 1 - (x - sae.decode(f)).square().sum() / (x - x.mean(dim=0)).square().sum()
        assert explained > 0.7
        assert (f > 0).sum(dim=1).double().mean().item() == pytest.approx(4, rel=0.1)
        centred = f[:, : sae.block_size] - f[:, : sae.block_size].mean(dim=0)
        lag.append(float((centred[:-4] * centred[4:]).sum() / centred.square().sum()))
    assert lag[1] > lag[0] + 0.1


def _fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_all_arms_see_the_same_tokens_pairs_and_initial_weights(
    sticky_store: ActivationStore, small_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    narrow = ArmConfig(**{**_fields(config.arms[1]), "name": "tc4", "window": 4})
    training = Training(sticky_store, TrainConfig(**{**_fields(config), "arms": (*config.arms, narrow)}), CPU)
    weights = [arm.sae.W_enc.clone() for arm in training.arms]
    assert all(torch.equal(weights[0], other) for other in weights[1:])
    seen: dict[str, list[Any]] = {arm.name: [] for arm in training.arms}
    pairs: dict[str, list[Any]] = {arm.name: [] for arm in training.arms}
    original = Arm.step

    def record(self: Arm, batch: Rows, found: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        seen[self.name].append(batch.token.tolist())
        pairs[self.name].append((found.anchor.tolist(), found.positive.tolist()))
        return original(self, batch, found, *rest, **more)

    monkeypatch.setattr(Arm, "step", record)
    for _ in range(5):
        training.step(detailed=False)
    assert seen["block-s0"] == seen["tc8-s0"] == seen["tc4-s0"]
    assert pairs["block-s0"] == pairs["tc8-s0"]


def test_an_arm_learns_the_same_alone_as_beside_others(
    sticky_store: ActivationStore, small_config: ConfigFactory
) -> None:
    config = small_config()
    both = Training(sticky_store, config, CPU)
    alone = Training(sticky_store, TrainConfig(**{**_fields(config), "arms": config.arms[1:]}), CPU)
    for _ in range(10):
        both.step(detailed=False)
        alone.step(detailed=True)  # what is logged changes nothing either
    assert torch.equal(both.arms[1].sae.W_enc, alone.arms[0].sae.W_enc)


def test_positives_are_not_among_the_keys_of_their_own_step(
    sticky_store: ActivationStore, small_config: ConfigFactory
) -> None:
    training = Training(sticky_store, small_config(), CPU)
    assert training.ring.filled == 0
    terms = training.step(detailed=True)
    assert terms["tc8-s0"]["ring_filled"] == 0
    assert training.ring.filled == 32
    assert (training.ring.position[:32] >= 2).all()


def test_what_no_arm_looks_at_is_neither_read_nor_drawn(
    sticky_store: ActivationStore, small_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, drawn = [], []
    originals = WindowLoader.begin_ring_rows, training_module.sample_pairs

    def begin(self: WindowLoader, step: int, n: int) -> None:
        read.append(step)
        originals[0](self, step, n)

    def sample(*given: Any) -> Pairs:
        drawn.append(given)
        return originals[1](*given)

    monkeypatch.setattr(WindowLoader, "begin_ring_rows", begin)
    monkeypatch.setattr(training_module, "sample_pairs", sample)
    control, contrast = small_config().arms

    def found(*arms: ArmConfig) -> tuple[int, int, int]:
        """Steps that read for the ring, draws of pairs, and items in the ring after a logged and four other steps."""
        read.clear()
        drawn.clear()
        training = Training(sticky_store, small_config(arms=arms), CPU)
        for step in range(5):
            training.step(detailed=step == 0)
        return len(read), len(drawn), training.ring.filled

    plain = replace(control, block_share=0.0)
    in_batch = replace(contrast, objective="in_batch")
    assert found(in_batch)[::2] == (0, 0)
    assert found(plain) == (0, 0, 0)
    assert found(control) == (5, 1, 5 * 32)  # measures what it does not learn from where that is logged
    assert found(plain, contrast) == (5, 5, 5 * 32)
    assert found(replace(contrast, objective="in_batch")) == (0, 5, 0)


# ---------------------------------------------------------------------------------------------------------
# Guard rails before the first step
# ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"arm": {"warmup_steps": 2000}}, "warm-up of 2000 and decay of 12 steps .* run of 40 steps"),
    ({"arm": {"decay_share": 1.0}}, "warm-up of 4 and decay of 40 steps"),
    ({"tokens": 100}, "tokens: 100 is less than one batch of 128"),
    ({"batch_tokens": 8000, "tokens": 800_000}, "8000 tokens are 1000 windows of 8"),
    ({"arm": {"window": 32}}, "window: 32 tokens, but the longest context .* has 25"),
    ({"hook": "blocks.7.hook_resid_post"}, "did you mean: blocks.0.hook_resid_post"),
    # F = round(4 * 16) = 64, block H int(0.25 * 64) = 16.
    (
        {"arm": {"k": 80, "block_k_share": 0.5}},
        r"block H has 16 of the 64 features .*d_model 16, block_share 0.25\) and keeps 40 per token; expected "
        "1 to 16",
    ),
    ({"arm": {"k": 66, "block_k_share": 0.1}}, "block L has 48 of the 64 .* and keeps 59 per token"),
    ({"arm": {"block_share": 0.01}}, "block H has 0 of the 64 features .* and keeps 1 per token"),
    (
        {
            "arms": (
                ArmConfig(name="a", expansion=0.01, block_share=0.0, window=8, anchors=8, warmup_steps=4),
            )
        },
        "the SAE has 0 of",
    ),
    (
        {"ring_size": 10**12},
        "ring_size: this run needs at least 32,000,000 MB of memory, 32,000,000 MB of them",
    ),
    ({"min_position": 24}, "tc8: alpha is 0.1, but no context .* two positions from min_position = 24 on"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    REFUSED,
    ids=[
        "warm-up longer than the run",
        "warm-up and decay longer than the run",
        "fewer tokens than a batch",
        "batch larger than the split",
        "window longer than every context",
        "unknown hook",
        "block H smaller than its k",
        "block L smaller than its k",
        "block H without a feature",
        "no feature at all",
        "a ring larger than the machine's memory",
        "a contrast without two eligible positions",
    ],
)
def test_a_run_that_cannot_succeed_is_refused_before_anything_is_written(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = small_config(**changes)
    for refuse in (
        lambda: train(sticky_store, tmp_path / "run", config),
        lambda: dry_run(sticky_store, config),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            refuse()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_ring_that_no_arm_looks_at_takes_no_memory_however_large(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    other = {"objective": "in_batch"}
    arms = small_config(arm=other).arms
    run = train(sticky_store, tmp_path / "run", small_config(arms=arms, ring_size=10**12))
    small = train(sticky_store, tmp_path / "small", small_config(arms=arms))
    for sae in ("block-s0", "tc8-s0"):
        weights = Path("sae") / sae / "sae_weights.safetensors"
        assert (run.path / weights).read_bytes() == (small.path / weights).read_bytes()
    with pytest.raises(ConfigError, match="ring_size: this run needs"):
        train(
            sticky_store,
            tmp_path / "no",
            small_config(arms=(*arms[:1], small_config().arms[1]), ring_size=10**12),
        )


def test_a_checkpoint_with_a_ring_that_no_arm_looks_at_is_gone_on_with(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    config = small_config(arm={"objective": "in_batch"})
    begun, going_on = (Training(sticky_store, config, CPU) for _ in range(2))
    begun.ring = Ring(config.ring_size, 16, torch.float16, CPU)  # as an older version's
    begun.step(detailed=False)
    begun.save(tmp_path)
    going_on.restore(load_checkpoint(checkpoints(tmp_path)[-1]))
    assert (going_on.done, going_on.ring.size) == (1, 0)


def test_the_failure_of_the_source_experiment_is_refused(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    # 100,000 tokens in batches of 2,048 are 48 steps; its warm-up was 2,000.
    config = small_config(tokens=100_000, batch_tokens=2048, arm={"warmup_steps": 2000})
    assert config.steps == 48
    with pytest.raises(ConfigError, match="warm-up of 2000 .* the run of 48 steps"):
        train(sticky_store, tmp_path / "run", config)


# ---------------------------------------------------------------------------------------------------------
# Collapse
# ---------------------------------------------------------------------------------------------------------


def _poison(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[Arm], None]) -> None:
    original = Arm.step

    def step(self: Arm, batch: Rows, pairs: Any, around: Any, number: int, **more: Any) -> dict[str, Any]:
        if number == at and self.name == "tc8-s0":
            change(self)
        return original(self, batch, pairs, around, number, **more)

    monkeypatch.setattr(Arm, "step", step)


def _nan(arm: Arm) -> None:
    with torch.no_grad():
        arm.sae.W_dec[0] = torch.nan


def _silence(arm: Arm) -> None:
    with torch.no_grad():
        arm.sae.b_enc.fill_(-1e6)


def _age(arm: Arm) -> None:
    # 192 features of block L, one of which fires: 99.5 % are dead. Block H is as before.
    arm.sae.silent.fill_(10**9)
    with torch.no_grad():
        arm.sae.b_enc[65:] = -1e6


def _silence_h(arm: Arm) -> None:
    with torch.no_grad():
        arm.sae.b_enc[:64] = -1e6


@pytest.mark.parametrize(
    ("change", "dead_after", "message"),
    [
        (_nan, 640, r"tc8-s0 collapsed at step 10: the loss is not finite \(fvu, fit\); loss nan, fvu nan"),
        (_silence, 640, r"tc8-s0 collapsed at step 10: no feature is active \(L0 = 0\)"),
        (
            _silence_h,
            640,
            r"at step 10: no feature of block H is active \(L0 = 0\); .* l0_h 0, dead_h \d+ of 64",
        ),
        (
            _age,
            1,
            "tc8-s0 collapsed at step 1[0-9]: more than 99% of the features of block L have been dead for 3 "
            "steps; .* dead_l 191 of 192",
        ),
    ],
    ids=["NaN", "L0 of 0", "L0 of 0 in block H", "nearly all dead"],
)
def test_a_collapsed_sae_stops_the_run_with_step_and_figures(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Arm], None],
    dead_after: int,
    message: str,
) -> None:
    config = small_config(
        arm={"dead_after": dead_after, "aux_k": 0, "expansion": 16.0}, collapse_steps=3, ring_size=64
    )
    _poison(monkeypatch, 9, change)
    with pytest.raises(TrainingCollapsed, match=message) as caught:
        train(sticky_store, tmp_path / "run", config)
    assert "step-00000007.safetensors" in str(caught.value)
    assert "dead_share" in str(caught.value)
    assert Run.open(tmp_path / "run").status == "collapsed"


@pytest.mark.parametrize(
    ("term", "named"),
    [
        ("fvu", "fvu"),
        ("auxiliary", "auxiliary"),
        ("sparsity", "sparsity"),
        ("l2_penalty", "contrast or l2_penalty"),
    ],
)
def test_a_loss_that_is_not_finite_is_laid_to_its_term(term: str, named: str) -> None:
    found: dict[str, float] = dict.fromkeys(("fvu", "fit", "sparsity", "auxiliary", "dead_share"), 0.1)
    found |= {"l0": 1.0, "l0_l": 1.0, "dead_l": 0, "loss": math.inf, term: math.inf}
    problem = CollapseWatch({"a-s0": Watched({"l": 8}, contrasts=False)}, 3).problem({"a-s0": found}, 4)
    assert problem is not None
    assert problem.startswith(f"a-s0 collapsed at step 4: the loss is not finite ({named}); loss inf")


def test_next_to_no_active_features_are_a_collapse_when_they_last() -> None:
    watch = CollapseWatch({"a-s0": Watched({"l": 8}, contrasts=False)}, 3)
    found = dict.fromkeys(("loss", "fvu", "dead_share"), 0.9) | {"dead_l": 0}
    problems = [
        watch.problem({"a-s0": {**found, "l0": l0, "l0_l": l0}}, step)
        for step, l0 in enumerate([0.05, 0.05, 0.2, 0.05, 0.05, 0.05])
    ]
    assert problems[:5] == [None] * 5
    assert problems[5] is not None
    assert "at step 5: fewer than 0.1 features per token have been active for 3 steps; " in problems[5]


def test_a_run_that_ends_worse_than_the_mean_says_so(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small_config(tokens=8 * 128, arm={"warmup_steps": 2, "learning_rate": 5e-3})
    dense = replace(
        config.arms[0], name="dense", architecture="standard", sparsity_weight=1e-3, learning_rate=1e-6
    )
    run = train(sticky_store, tmp_path / "run", replace(config, arms=(*config.arms, dense)))
    last = {line["arm"]: line for line in pq.read_table(run.metrics).to_pylist()}
    assert last["dense"]["fvu"] > 1 > last["tc8"]["fvu"]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith(
        f"dense-s0: explained variance {1 - last['dense']['fvu']:.3f} with "
    )


def test_a_contrast_that_stays_without_pairs_stops_the_run(
    make_store: Callable[..., ActivationStore], small_config: ConfigFactory, tmp_path: Path
) -> None:
    # The two tokens of a pair differ in their ids; here there is one id alone.
    x = torch.randn(900, 16, generator=torch.Generator().manual_seed(3))
    store = make_store(x, [90] * 10, tokens=np.full(900, 7))
    with pytest.raises(TrainingCollapsed, match="tc8-s0 .* step 6: the contrast has had no pair for 6 steps"):
        train(store, tmp_path / "run", small_config(collapse_steps=6, log_every=40))


# ---------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    short = small_config(tokens=8 * 128, arm={"warmup_steps": 2})
    run = train(sticky_store, tmp_path / "run", short)
    before = run.metrics.read_bytes()
    with pytest.raises(RunExists, match="already holds a run; add --resume"):
        train(sticky_store, tmp_path / "run", short)
    again = train(sticky_store, tmp_path / "run", short, resume=True)
    assert (again.status, again.metrics.read_bytes()) == ("finished", before)
    assert train(sticky_store, tmp_path / "run", resume=True).status == "finished"


def test_a_folder_with_something_else_is_left_alone(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunExists, match="already holds something else; choose another path"):
        train(sticky_store, tmp_path, small_config())


def test_a_path_that_cannot_be_written_to_is_named(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    path = tmp_path / "thesis.txt" / "run"
    with pytest.raises(
        ConfigError, match=rf"^{path}: cannot be written to \(Not a directory\); choose another"
    ):
        train(sticky_store, path, small_config())


def test_resuming_nothing_or_something_else_is_refused_by_name(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    make_store: Callable[..., ActivationStore],
    tmp_path: Path,
) -> None:
    with pytest.raises(RunNotFound, match="no training run there"):
        train(sticky_store, tmp_path / "run", small_config(), resume=True)
    short = {"tokens": 8 * 128, "arm": {"warmup_steps": 2}}
    train(sticky_store, tmp_path / "run", small_config(**short))
    with pytest.raises(RunMismatch, match="data_seed: begun with 0, now 5"):
        train(sticky_store, tmp_path / "run", small_config(**short, data_seed=5), resume=True)
    draw = torch.Generator().manual_seed(3)
    other = make_store(torch.randn(900, 16, generator=draw), [90] * 10, name="other.zarr")
    with pytest.raises(RunMismatch, match=f"begun with store {sticky_store.id}"):
        train(other, tmp_path / "run", small_config(**short), resume=True)


def test_two_writers_are_refused(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    with (
        exclusive(tmp_path / "run" / ".lock", RunBusy("first")),
        pytest.raises(RunBusy, match="another process is writing to this run"),
    ):
        train(sticky_store, tmp_path / "run", small_config())


def test_a_signal_saves_the_state_and_says_how_to_resume(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train(sticky_store, tmp_path / "whole", small_config())
    with monkeypatch.context() as patch:
        _poison(patch, 11, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(
            Interrupted, match=r"SIGTERM after step 12 of 40; .* go on with `tcsae train .*--resume`"
        ):
            train(sticky_store, tmp_path / "run", small_config())
    assert Run.open(tmp_path / "run").status == "interrupted"
    resumed = train(sticky_store, tmp_path / "run", resume=True)
    for mine, theirs in zip(resumed.saes, whole.saes, strict=True):
        name = "sae_weights.safetensors"
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()


def test_a_second_ctrl_c_names_the_newest_checkpoint(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def twice(_: Arm) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    _poison(monkeypatch, 11, twice)
    # a shell starts what it runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    message = r"during step 12; the newest checkpoint is .*step-00000007.safetensors, go on with `tcsae train"
    try:
        with pytest.raises(Interrupted, match=message):
            train(sticky_store, tmp_path / "run", small_config())
    finally:
        signal.signal(signal.SIGINT, before)
    assert Run.open(tmp_path / "run").status == "interrupted"


def test_a_ctrl_c_before_the_first_step_leaves_a_run_to_resume_and_says_how(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    short = small_config(tokens=8 * 128, arm={"warmup_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(
            training_loop, "_say_what_is_unusual", interrupted
        )  # run.json is there, no step was taken
        with pytest.raises(
            Interrupted, match=r"step 1; there is no checkpoint yet, go on with `tcsae train .*--resume`"
        ):
            train(sticky_store, tmp_path / "run", short)
    assert Run.open(tmp_path / "run").status == "interrupted"
    assert train(sticky_store, tmp_path / "run", resume=True).status == "finished"


def test_thresholds_are_calibrated_in_the_precision_of_inference(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []
    original = BatchTopK.calibrate

    def record(self: BatchTopK, batches: list[torch.Tensor], linear: Linear) -> None:
        used.append(linear)
        original(self, batches, linear)

    monkeypatch.setattr(BatchTopK, "calibrate", record)
    short = small_config(tokens=8 * 128, arm={"warmup_steps": 2}, precision="bfloat16")
    train(sticky_store, tmp_path / "run", short)
    assert used == [float32_linear, float32_linear]


def test_more_tokens_than_the_store_holds_are_whole_epochs_and_said_so(
    sticky_store: ActivationStore,
    small_config: ConfigFactory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    run = train(sticky_store, tmp_path / "run", small_config(tokens=60 * 128))
    assert (run.step, run.steps) == (60, 60)
    assert "epochs of" in caplog.text
    assert "epoch 2 begins, in a new order" in caplog.text


def test_a_dry_run_counts_and_writes_nothing(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    before = sorted(p for p in tmp_path.rglob("*"))
    found = dry_run(sticky_store, small_config(seeds=(0, 1)))
    assert sorted(p for p in tmp_path.rglob("*")) == before
    # Four SAEs: encoder and decoder 64 x 16 each, biases 64 and 16.
    assert found.parameters == 4 * (2 * 64 * 16 + 64 + 16)
    assert (found.steps, found.tokens) == (40, 5120)
    assert found.seconds == pytest.approx(40 * found.seconds_per_step)
    assert found.memory_bytes > 1e6
    assert found.notes == []


def test_a_dry_run_says_whose_time_is_an_upper_bound(
    sticky_store: ActivationStore, small_config: ConfigFactory
) -> None:
    config = small_config()
    standard = replace(config.arms[0], name="relu", architecture="standard", sparsity_weight=0.1)
    (note,) = dry_run(sticky_store, replace(config, arms=(*config.arms, standard))).notes
    assert note.startswith("relu: ")
    assert "upper bounds" in note


def test_the_figure_is_drawn_for_many_arms_and_for_none_with_a_block(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    plain = ArmConfig(name="plain", k=4, block_share=0.0, window=8, anchors=16, warmup_steps=2)
    run = train(sticky_store, tmp_path / "run", small_config(arms=(plain,), tokens=8 * 128))
    assert np.isnan(pq.read_table(run.metrics)["contrast"].to_numpy()).all()
    run.figure.unlink()
    plot_training(run.metrics, run.figure, load_config(run.path / "config.toml"))
    assert run.figure.stat().st_size > 10_000


def test_weights_that_the_last_update_made_useless_are_not_saved(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    config = small_config(tokens=128, arm={"learning_rate": 1e4, "warmup_steps": 0, "decay_share": 0.0})
    training = Training(sticky_store, config, CPU)
    training.step(detailed=False)
    with torch.no_grad():
        training.arms[1].sae.W_enc[3, 3] = torch.inf
    with pytest.raises(TrainingCollapsed, match="tc8-s0 collapsed at step 1: W_enc holds NaN or Inf"):
        training.save(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"alpha": float("inf")}, "alpha: expected at most"),
        ({"learning_rate": float("inf")}, "learning_rate: expected more than 0 and at most 10,000, got inf"),
        ({"clip_norm": float("nan")}, "clip_norm: expected at least 0, got nan"),
        ({"expansion": 1e12}, "expansion: expected more than 0 and at most 10,000"),
        ({"dead_after": 10**20}, "dead_after: expected at most"),
    ],
)
def test_values_that_no_run_can_have_are_refused(arm: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArmConfig(name="a", **arm)
