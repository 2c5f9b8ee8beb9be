"""Options of an arm, each against an independent computation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from tcsae.store import ActivationStore
from tcsae.train import ArmConfig, TrainConfig, load_sae, train
from tcsae.train.arm import Arm
from tcsae.train.average import WeightAverage
from tcsae.train.median import geometric_median
from tcsae.train.precision import float32_linear
from tcsae.train.resample import feature_parameters, resample, resampling_is_due
from tcsae.train.sae.base import TrainableSAE
from tcsae.train.sae.build import build
from tcsae.train.sae.initial import initial_weights
from tcsae.train.training import Training

CPU = torch.device("cpu")
ConfigFactory = Callable[..., TrainConfig]


def _one_arm(make: ConfigFactory, arm: dict[str, Any], **run: Any) -> TrainConfig:
    config = make(arm=arm, **run)
    return replace(config, arms=config.arms[:1])


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "standard", "sparsity_weight": 0.1, "batch_norm": True},
        {"architecture": "gated", "sparsity_weight": 0.1, "unit_norm_decoder": False},
        {"unit_norm_decoder": False},
        {},
    ],
    ids=["batch norm", "free rows", "free rows, selected", "unit rows"],
)
def test_the_logged_size_of_the_code_is_that_of_the_saved_sae(
    sticky_store: ActivationStore, small_config: ConfigFactory, options: dict[str, Any]
) -> None:
    training = Training(sticky_store, _one_arm(small_config, options), CPU)
    (arm,) = training.arms
    if not arm.config.unit_norm_decoder:
        scale = torch.rand(len(arm.sae.b_enc), 1, generator=torch.Generator().manual_seed(0))
        arm.sae.W_dec.data *= 0.2 + 3 * scale
    sae, batch = copy.deepcopy(arm.sae), Training(sticky_store, training.config, CPU).loader.next()
    logged = training.step(detailed=True)[arm.name]
    coded = sae(batch.x, batch.valid)  # batch normalisation's running statistics become this batch's
    if coded.thresholds:
        sae.calibrate([batch.x[batch.valid]], float32_linear)
    saved = sae.to_inference(training.loader.scaler, name="a", metadata={})
    code = saved.encode(batch.raw[batch.valid]).double()
    assert logged["l0"] == pytest.approx(float((code > 0).sum(dim=1).double().mean()), rel=0.01)
    assert logged["l1"] == pytest.approx(float(code.sum(dim=1).mean()), rel=0.01)
    share = code[:, : sae.block_size].square().sum() / code.square().sum()
    assert logged["energy_h"] == pytest.approx(float(share), rel=0.01)


def _state(sae: TrainableSAE) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


# ---------------------------------------------------------------------------------------------------------
# Decoder bias at the geometric median
# ---------------------------------------------------------------------------------------------------------


def test_the_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    # From the Fermat point of an equilateral triangle, its centre, the corners are 120 degrees apart.
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    assert torch.allclose(geometric_median(corners), torch.tensor([0.5, math.sqrt(0.75) / 3]), atol=1e-6)
    # With an angle of 120 degrees or more at a corner, that corner.
    flat = torch.tensor([[0.0, 0.0], [10.0, 0.5], [-10.0, 0.5]])
    assert torch.allclose(geometric_median(flat), flat[0], atol=1e-4)


def test_the_geometric_median_is_where_the_directions_to_all_rows_cancel() -> None:
    x = torch.randn(301, 7, generator=torch.Generator().manual_seed(0)) ** 3
    away = x - geometric_median(x)
    assert torch.linalg.vector_norm((away / away.norm(dim=1, keepdim=True)).sum(dim=0)) < 1e-3
    assert geometric_median(torch.ones(5, 3)).tolist() == [1.0, 1.0, 1.0]


def test_the_decoder_bias_begins_at_the_median_of_train_rows(
    make_store: Callable[..., ActivationStore], small_config: ConfigFactory
) -> None:
    # Of a skewed distribution, so that the mean, 0 in normalised units, is far from the median.
    draw = torch.Generator().manual_seed(3)
    store = make_store((1.5 * torch.randn(3000, 16, generator=draw)).exp(), [100] * 30)
    training = Training(store, small_config(arm={"decoder_bias": "geometric_median"}), CPU)
    b_dec = training.arms[0].sae.b_dec.detach()
    assert torch.equal(b_dec, training.arms[1].sae.b_dec)
    contexts = store.contexts_in("train")
    rows = np.concatenate([np.arange(*store.context_offsets[c : c + 2]) for c in contexts])
    x = training.loader.scaler.normalise(store.gather(rows, None))
    x = x[store.gather(rows, None).float().norm(dim=1) <= store.statistics(None).outlier_norm]
    expected = geometric_median(x)
    assert expected.norm() > 0.3
    # Of windows drawn with repetition, so not quite the split's.
    assert (b_dec - expected).norm() < 0.15 * expected.norm()
    assert torch.equal(training.loader.sample(64).x, training.loader.sample(64).x)


# ---------------------------------------------------------------------------------------------------------
# Initial weights
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["tied", "kaiming", "xavier"])
def test_initial_weights_have_the_variance_of_their_source(scheme: str) -> None:
    arm = ArmConfig(name="a", expansion=8.0, initialisation=scheme, unit_norm_decoder=False)  # type: ignore[arg-type]
    W_enc, W_dec = initial_weights(arm, 64, torch.Generator().manual_seed(1))
    assert W_enc.shape == W_dec.shape == (512, 64)
    variance = {"tied": 1 / 64, "kaiming": 2 / 64, "xavier": 2 / (64 + 512)}[scheme]
    # 32,768 entries: the variance's standard error is about one in a hundred.
    assert W_enc.var().item() == pytest.approx(variance, rel=0.05)
    assert abs(W_enc.mean().item()) < 5 * math.sqrt(variance / W_enc.numel())
    if scheme == "xavier":
        assert W_dec.var().item() == pytest.approx(variance, rel=0.05)
        assert W_enc.abs().max() <= math.sqrt(3 * variance)
        assert abs((W_enc * W_dec).mean().item()) < 5 * variance / math.sqrt(W_enc.numel())
    else:
        assert torch.allclose(W_dec, W_enc / W_enc.norm(dim=1, keepdim=True), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# L2 penalty and clipping
# ---------------------------------------------------------------------------------------------------------


def _gradients_of_first_step(
    store: ActivationStore, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, what the optimiser is given, and the logged terms."""
    training = Training(store, config, CPU)
    arm, given = training.arms[0], {}
    before = _state(arm.sae)
    arm.sae.remove_parallel_gradient = lambda: None  # type: ignore[method-assign]

    def record() -> None:
        given.update({n: p.grad.clone() for n, p in arm.sae.named_parameters() if p.grad is not None})

    monkeypatch.setattr(arm.optimizer, "step", record)
    terms = training.step(detailed=True)[arm.name]
    return before, given, terms


def test_the_l2_penalty_adds_twice_its_weight_times_the_weights_to_the_gradient(
    sticky_store: ActivationStore, small_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, with_l2 = (_one_arm(small_config, {"l2_weight": weight}) for weight in (0.0, 0.01))
    before, without, terms = _gradients_of_first_step(sticky_store, plain, monkeypatch)
    _, found, penalised = _gradients_of_first_step(sticky_store, with_l2, monkeypatch)
    for name in ("W_enc", "W_dec"):
        assert torch.allclose(found[name] - without[name], 2 * 0.01 * before[name], atol=1e-6)
    for name in ("b_enc", "b_dec"):
        assert torch.equal(found[name], without[name])
    squares = float(before["W_enc"].square().sum() + before["W_dec"].square().sum())
    assert math.isnan(terms["l2_penalty"])
    assert penalised["l2_penalty"] == pytest.approx(squares)
    assert penalised["loss"] - terms["loss"] == pytest.approx(0.01 * squares, rel=1e-4)


def test_clipping_scales_the_whole_gradient_to_the_largest_norm_and_no_smaller_one(
    sticky_store: ActivationStore, small_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(limit: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        config = _one_arm(small_config, {"clip_norm": limit})
        _, found, terms = _gradients_of_first_step(sticky_store, config, monkeypatch)
        return found, terms

    free, terms = gradient(0.0)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in free.values()))
    assert terms["gradient_norm"] == pytest.approx(norm)  # logged before clipping
    clipped, terms = gradient(norm / 4)
    assert terms["gradient_norm"] == pytest.approx(norm)
    for name, expected in free.items():
        assert torch.allclose(clipped[name], expected / 4, rtol=1e-4, atol=1e-9)
    for name, same in gradient(2 * norm)[0].items():
        assert torch.equal(same, free[name])


# ---------------------------------------------------------------------------------------------------------
# Average of the weights
# ---------------------------------------------------------------------------------------------------------


def test_the_average_weighs_the_last_steps_geometrically(
    sticky_store: ActivationStore, small_config: ConfigFactory
) -> None:
    training = Training(sticky_store, _one_arm(small_config, {"average_decay": 0.8}), CPU)
    (arm,) = training.arms
    history = []
    for _ in range(6):
        training.step(detailed=False)
        history.append(_state(arm.sae))
    assert arm.average is not None
    weights = [0.8 ** (5 - i) for i in range(6)]
    for name, found in arm.average.tensors.items():
        expected = sum(w * past[name].double() for w, past in zip(weights, history, strict=True))
        assert torch.allclose(found.double(), expected / sum(weights), atol=1e-6)


def test_what_is_saved_is_the_average_with_decoder_rows_of_unit_norm(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    short: dict[str, Any] = {"tokens": 12 * 128}
    averaged = _one_arm(small_config, {"warmup_steps": 2, "average_decay": 0.9}, **short)
    plain = _one_arm(small_config, {"warmup_steps": 2}, **short)
    training = Training(sticky_store, averaged, CPU)
    for _ in range(12):
        training.step(detailed=False)
    average = training.arms[0].average
    assert average is not None
    W_dec = average.tensors["W_dec"]
    saved = load_sae(train(sticky_store, tmp_path / "averaged", averaged).saes[0])
    assert torch.allclose(saved.W_dec, W_dec / W_dec.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(saved.W_enc, average.tensors["W_enc"].T, atol=1e-6)
    # Averaging does not change what is trained.
    other = load_sae(train(sticky_store, tmp_path / "plain", plain).saes[0])
    assert torch.allclose(other.W_enc, training.arms[0].sae.W_enc.T, atol=1e-6)
    assert not torch.allclose(other.W_enc, saved.W_enc, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# Resampling
# ---------------------------------------------------------------------------------------------------------


def _with_moments(arm: ArmConfig) -> tuple[TrainableSAE, torch.optim.Adam]:
    sae = build(4, arm, 0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1, fused=True)
    sum(p.square().sum() + p.sum() for p in sae.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return sae, optimizer


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "gated", "standard"])
def test_a_dead_feature_begins_anew_at_the_token_with_all_of_the_loss(architecture: str) -> None:
    penalty = 0.0 if architecture == "batchtopk" else 0.1
    arm = ArmConfig(
        name="a",
        architecture=architecture,  # type: ignore[arg-type]
        sparsity_weight=penalty,
        batch_norm=architecture == "standard",
        k=2,
        expansion=1.0,  # as many features as dimensions: neither is taken for the other
        block_share=0.0,
    )
    sae, optimizer = _with_moments(arm)
    initial = _state(build(4, arm, 0))
    sae.silent += 7
    before = _state(sae)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    error = torch.zeros(5, 4)
    error[3] = 1.0
    dead = torch.tensor([2])
    changed = resample(sae, optimizer, dead, x, error, np.random.default_rng(0))
    assert changed.tolist() == [2]
    direction = x[3] - before["b_dec"]
    direction = direction / direction.norm()
    alive_norm = before["W_enc"][[0, 1, 3]].norm(dim=1).mean()
    assert torch.allclose(sae.W_dec[2], direction, atol=1e-6)
    assert torch.allclose(sae.W_enc[2], 0.2 * alive_norm * direction, atol=1e-6)
    assert sae.b_enc[2] == 0
    assert sae.silent.tolist() == [7, 7, 0, 7]
    assert torch.equal(sae.b_dec, before["b_dec"])
    assert {"W_enc", "b_enc", "W_dec"} <= set(feature_parameters(sae))
    for name, parameter in sae.named_parameters():
        moments = [optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")]
        if name not in feature_parameters(sae):
            assert torch.equal(parameter, before[name])
            assert all((m != 0).all() for m in moments)
            continue
        assert torch.equal(parameter[[0, 1, 3]], before[name][[0, 1, 3]])
        assert all((m[2] == 0).all() and (m[[0, 1, 3]] != 0).all() for m in moments)
        if name not in ("W_enc", "W_dec", "b_enc"):
            assert torch.equal(parameter[2], initial[name][2])


def test_tokens_are_drawn_in_proportion_to_the_square_of_their_loss_and_each_at_most_once() -> None:
    arm = ArmConfig(name="a", k=2, expansion=1.0, block_share=0.0)
    x = torch.eye(4)
    # Losses 1, 2, 3 and 0, so squares 1, 4, 9 of 14.
    error = torch.zeros(4, 4)
    error[:3, 0] = torch.tensor([1.0, 2.0, 3.0]).sqrt()
    counts = np.zeros(4)
    for seed in range(600):
        sae, optimizer = _with_moments(arm)
        sae.b_dec.data.zero_()
        resample(sae, optimizer, torch.tensor([1]), x, error, np.random.default_rng(seed))
        counts[int(sae.W_dec[1].argmax())] += 1
    expected = 600 * np.array([1, 4, 9, 0]) / 14
    assert counts[3] == 0
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()
    sae, optimizer = _with_moments(arm)
    sae.b_dec.data.zero_()
    changed = resample(sae, optimizer, torch.arange(4), x, error, np.random.default_rng(0))
    assert len(changed) == 3  # one for each token that has a loss
    assert sorted(sae.W_dec[changed].argmax(dim=1).tolist()) == [0, 1, 2]
    assert len(resample(sae, optimizer, torch.arange(0), x, error, np.random.default_rng(0))) == 0
    assert len(resample(sae, optimizer, torch.arange(4), x, torch.zeros(4, 4), np.random.default_rng(0))) == 0


def test_resampling_is_counted_reproducible_and_its_seed_is_the_arms(
    sticky_store: ActivationStore, small_config: ConfigFactory
) -> None:
    config = _one_arm(
        small_config,
        {
            "expansion": 16.0,
            "resample_every": 10,
            "dead_after": 128,
            "average_decay": 0.9,
            "aux_k": 0,
        },
        seeds=(0, 1),
    )
    assert [step for step in range(40) if resampling_is_due(config.arms[0], step, 40)] == [9, 19, 29]

    def resampled(config: TrainConfig) -> tuple[list[Arm], list[list[int]]]:
        training = Training(sticky_store, config, CPU)
        counts = [[found["resampled"] for found in training.step(detailed=True).values()] for _ in range(12)]
        return training.arms, counts

    arms, counts = resampled(config)
    again, _ = resampled(config)
    assert counts[8] == [0, 0]
    assert all(n > 0 for n in counts[9])
    assert counts[9] == counts[11]
    for arm, same in zip(arms, again, strict=True):
        assert torch.equal(arm.sae.W_enc, same.sae.W_enc)
        assert arm.average is not None
    without = Training(sticky_store, replace(config, arms=(replace(config.arms[0], resample_every=0),)), CPU)
    for _ in range(12):
        without.step(detailed=False)
    assert not torch.equal(arms[0].sae.W_enc, without.arms[0].sae.W_enc)


def test_the_average_forgets_what_a_resampled_feature_was() -> None:
    arm = ArmConfig(name="a", k=2, expansion=2.0, block_share=0.0)
    sae, optimizer = _with_moments(arm)
    average = WeightAverage(sae, 0.99)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    changed = resample(sae, optimizer, torch.tensor([1, 6]), x, x, np.random.default_rng(0))
    before = average.tensors["W_enc"].clone()
    average.begin_anew(sae, changed)
    assert torch.equal(average.tensors["W_enc"][changed], sae.W_enc[changed])
    others = [i for i in range(8) if i not in (1, 6)]
    assert torch.equal(average.tensors["W_enc"][others], before[others])


# ---------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# torch looks at this when it traces the type checks that are there in tests alone.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_learns_the_same(
    sticky_store: ActivationStore, small_config: ConfigFactory, tmp_path: Path
) -> None:
    run: dict[str, Any] = {"tokens": 12 * 128, "arm": {"warmup_steps": 2}}
    eager = train(sticky_store, tmp_path / "eager", small_config(**run))
    compiled = train(sticky_store, tmp_path / "compiled", small_config(**run, compile=True))
    for mine, theirs in zip(compiled.saes, eager.saes, strict=True):
        assert torch.allclose(load_sae(mine).W_enc, load_sae(theirs).W_enc, atol=1e-4)
    losses = [pq.read_table(one.metrics)["loss"].to_numpy() for one in (compiled, eager)]
    assert np.allclose(*losses, rtol=1e-4)
