"""The temporal term in training: what it sees, what it does to block H, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError
from tcsae.tests.train.objectives import OBJECTIVES
from tcsae.train import ArmConfig, TrainConfig
from tcsae.train.losses import Codes
from tcsae.train.pair_losses import difference, in_batch
from tcsae.train.pairs import asked_pairs
from tcsae.train.precision import bfloat16_linear, float32_linear
from tcsae.train.temporal import LANES, temporal_term
from tcsae.train.training import Training

CPU = torch.device("cpu")
ConfigFactory = Callable[..., TrainConfig]


def arms_of(config: TrainConfig, *names: str, **changes: Any) -> TrainConfig:
    """The run of ``config`` with its control and the arms ``names`` of OBJECTIVES."""
    control, contrast = config.arms
    arms = (replace(contrast, **{"name": name, **OBJECTIVES[name], **changes}) for name in names)
    return replace(config, arms=(control, *arms))


def trained(store: ActivationStore, config: TrainConfig) -> tuple[Training, dict[str, dict[str, float]]]:
    """After the last step; means of each arm's terms over every second of the last 40 steps."""
    training, last = Training(store, config, CPU), []
    for step in range(config.steps):
        detailed = config.steps - step <= 40 and step % 2 == 1
        terms = training.step(detailed=detailed)
        if detailed:
            last.append(terms)
    return training, {
        arm.config.name: {
            field: float(np.mean([terms[arm.name][field] for terms in last])) for field in last[0][arm.name]
        }
        for arm in training.arms
    }


def lag_of_block(training: Training, store: ActivationStore, lag: int = 4) -> dict[str, float]:
    """Autocorrelation of block H's code on held-out documents, of each arm."""
    x = torch.cat([store.document(int(i)) for i in store.documents_in("test")]).float()
    found = {}
    for arm in training.arms:
        sae = arm.sae.to_inference(training.loader.scaler, name=arm.name, metadata={})
        code = sae.encode(x)[:, : sae.block_size]
        code = code - code.mean(dim=0)
        found[arm.config.name] = float((code[:-lag] * code[lag:]).sum() / code.square().sum())
    return found


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "float32") for name in OBJECTIVES), ("info_nce", "bfloat16"), ("info_nce-kept", "bfloat16")],
)
def test_what_is_learnt_from_falls_below_what_is_only_measured(
    sticky_store: ActivationStore, small_config: ConfigFactory, name: str, precision: str
) -> None:
    # After top-k six of ten pairs have an empty code, so there have to be many for a mean that tells.
    arm = {"learning_rate": 5e-3, "anchors": 64}
    config = arms_of(small_config(tokens=160 * 128, arm=arm, precision=precision), name)
    measured = replace(config.arms[1], name="measured", alpha=0.0)
    _, found = trained(sticky_store, replace(config, arms=(measured, config.arms[1])))
    assert found[name]["contrast"] < 0.95 * found["measured"]["contrast"]
    assert found[name]["fvu"] < 0.5
    has_accuracy = config.arms[1].objective != "difference"
    assert math.isfinite(found[name]["accuracy"]) == has_accuracy


def test_true_positives_make_the_block_last_and_the_placebo_does_not(
    sticky_store: ActivationStore, small_config: ConfigFactory
) -> None:
    config = arms_of(small_config(tokens=200 * 128, arm={"learning_rate": 5e-3}), "info_nce", "placebo")
    lag = lag_of_block(trained(sticky_store, config)[0], sticky_store)
    assert lag["info_nce"] > lag["block"] + 0.1
    assert lag["placebo"] < lag["block"]


def test_the_squared_difference_shrinks_the_block(
    sticky_store: ActivationStore, small_config: ConfigFactory
) -> None:
    # Its documented failure: z_H -> 0. BatchTopK still keeps k_H entries, but there is ever less in them.
    config = arms_of(small_config(tokens=120 * 128, arm={"learning_rate": 5e-3}), "difference", alpha=3.0)
    _, found = trained(sticky_store, config)
    assert found["difference"]["l0_h"] == found["block"]["l0_h"] == 1
    assert found["difference"]["energy_h"] < found["block"]["energy_h"] / 2


# ---------------------------------------------------------------------------------------------------------
# What the term sees
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "gated"])
def test_after_top_k_a_key_is_coded_as_the_saved_sae_codes_it(
    sticky_store: ActivationStore, small_config: ConfigFactory, architecture: str
) -> None:
    arm: dict[str, Any] = {"architecture": architecture, "expansion": 4.2, "block_share": 0.3}
    if architecture in ("jumprelu", "gated"):
        arm["sparsity_weight"] = 0.1
    config = arms_of(small_config(arm=arm), "info_nce-kept")
    training = Training(sticky_store, config, CPU)
    for _ in range(12):
        training.step(detailed=False)
    keys, around, sae = [], training.around, training.arms[1].sae
    assert sae.block_size % LANES  # 20 of 67: features that are always 0 have to be added
    batch = training.loader.next()
    pairs = training._pairs(batch, 12)[asked_pairs(config.arms[1])]
    coded = sae(batch.x, batch.valid, around.linear, around.buffer[: 128 * 67].view(128, 67))
    original = training.ring.keys

    def record(encode: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Codes]:
        for piece in original(encode):
            keys.append(piece.code.clone())
            yield piece

    training.ring.keys = record  # type: ignore[method-assign]
    temporal_term(
        config.arms[1], sae, coded, batch, pairs, training.ring, around.scaler, float32_linear,
        torch.float32, detailed=False, learn=True,
    )  # fmt: skip
    saved = sae.to_inference(around.scaler, name="a", metadata={})
    expected = saved.encode(training.ring.activations.float())[:, : sae.block_size] * around.scaler.scale
    found = torch.cat(keys)
    assert not found[:, sae.block_size :].any()
    if architecture in ("jumprelu", "gated"):  # rows of the saved decoder have unit norm; these stay at it
        assert torch.allclose(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(67), atol=1e-5)
    torch.testing.assert_close(found[:, : sae.block_size], expected, rtol=1e-3, atol=1e-3)
    assert 0 < (expected > 0).float().mean() < 0.6


@pytest.mark.parametrize("code", ["before_top_k", "after_top_k"])
@pytest.mark.parametrize("objective", ["in_batch", "difference"])
def test_the_term_is_the_loss_of_the_block_of_the_pairs_with_its_gradient(
    sticky_store: ActivationStore, small_config: ConfigFactory, objective: str, code: str
) -> None:
    arm = {"objective": objective, "contrasted_code": code, "mask_documents": True}
    config = small_config(arm=arm)
    training = Training(sticky_store, config, CPU)
    for _ in range(3):
        training.step(detailed=False)
    around, sae, asked = training.around, training.arms[1].sae, config.arms[1]
    batch = training.loader.next()
    pairs = training._pairs(batch, 3)[asked_pairs(asked)]
    coded = sae(batch.x, batch.valid, around.linear, around.buffer.view(128, 64))
    found = temporal_term(
        asked, sae, coded, batch, pairs, training.ring, around.scaler, around.linear,
        around.dtype, detailed=True, learn=True,
    )  # fmt: skip
    # By hand: the dense code of the whole batch, before or after what was kept.
    pre = (batch.x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    block = pre.relu()[:, :16]
    if code == "after_top_k":
        smallest = coded.thresholds[0]
        block = block * (block >= smallest - 1e-6)
    tokens = Codes(block, torch.from_numpy(batch.document), torch.from_numpy(batch.source))
    anchor, positive = torch.from_numpy(pairs.anchor), torch.from_numpy(pairs.positive)
    expected = (
        in_batch(tokens, anchor, positive, asked.temperature, detailed=True)
        if objective == "in_batch"
        else difference(tokens, anchor, positive, 16)
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-6)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-6, nan_ok=True)
    slopes = [
        torch.autograd.grad(loss, [sae.W_enc, sae.b_enc, sae.b_dec], retain_graph=True)
        for loss in (found.loss, expected.loss)
    ]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("code", ["before_top_k", "after_top_k"])
def test_keys_of_bfloat16_leave_the_loss_and_the_gradient_but_for_rounding(
    sticky_store: ActivationStore, small_config: ConfigFactory, code: str
) -> None:
    training = Training(sticky_store, small_config(arm={"contrasted_code": code}), CPU)
    for _ in range(40):
        training.step(detailed=False)
    around, sae, asked = training.around, training.arms[1].sae, training.arms[1].config
    batch = training.loader.next()
    pairs = training._pairs(batch, 40)[asked_pairs(asked)]
    coded = sae(batch.x, batch.valid, around.linear, around.buffer.view(128, 64))
    found = []
    for linear, dtype in ((float32_linear, torch.float32), (bfloat16_linear, torch.bfloat16)):
        term = temporal_term(
            asked, sae, coded, batch, pairs, training.ring, around.scaler, linear, dtype,
            detailed=False, learn=True,
        )  # fmt: skip
        (slope,) = torch.autograd.grad(term.loss, sae.W_enc, retain_graph=True)
        found.append((term.loss.item(), slope.flatten()))
    (exact, slope), (rounded, rounded_slope) = found
    assert rounded == pytest.approx(exact, rel=0.01)
    assert torch.nn.functional.cosine_similarity(slope, rounded_slope, dim=0) > 0.995
    assert rounded_slope.norm().item() == pytest.approx(slope.norm().item(), rel=0.03)


# ---------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"similarity": "dot"}, "similarity = dot, .* info_nce against the ring has the cosine"),
        ({"mask_documents": False}, "mask_documents = false: .*info_nce against the ring .* masks documents"),
        ({"objective": "difference", "similarity": "dot"}, "difference has no similarity and no negatives"),
        ({"objective": "in_batch", "anchors": 1}, "anchors = 1: in_batch .* expected at least 2"),
        ({"positives": "previous", "window": 1}, "window: a positive needs at least 2 tokens, got 1"),
        ({"block_share": 0.0}, "alpha is 0.1 without a block"),
        (
            {"contrasted_code": "after_top_k", "architecture": "standard", "sparsity_weight": 0.1},
            "standard selects nothing after ReLU; leave before_top_k",
        ),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^a: .*{message}") as caught:
        ArmConfig(name="a", alpha=0.1, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["objective", "positives", "similarity", "contrasted_code"])
def test_a_misspelt_choice_is_refused_and_never_taken_for_another(field: str) -> None:
    arm = ArmConfig(name="a")
    object.__setattr__(arm, field, "next")  # the tests' type checker refuses it in the constructor already
    with pytest.raises(ConfigError, match=f"^a: {field}: expected one of .*, got 'next'$"):
        arm.__post_init__()


ONE_DOCUMENT = (
    "from other documents, but .*'s train split has 1 with a context of 8 tokens; expected at least 2"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("info_nce", f"objective = info_nce takes its negatives {ONE_DOCUMENT}"),
        ("in_batch", f"objective = in_batch takes its negatives {ONE_DOCUMENT}"),
        ("placebo", f"positives = other_document takes its positives {ONE_DOCUMENT}"),
        ("in_batch-kept", None),
        ("difference", None),
    ],
)
def test_one_document_is_refused_by_what_needs_two(
    make_store: Callable[..., ActivationStore], small_config: ConfigFactory, name: str, message: str | None
) -> None:
    # One document of 900 rows to train on, and short ones that hold no window of 8.
    x = torch.randn(904, 16, generator=torch.Generator().manual_seed(3))
    store = make_store(x, [900, 4], tokens=np.arange(904) % 50)
    config = arms_of(small_config(), name)
    if message is None:
        assert Training(store, config, CPU).loader.n_documents == 1
        return
    with pytest.raises(ConfigError, match=f"^{name}: {message}"):
        Training(store, config, CPU)


@pytest.mark.parametrize("name", ["in_batch", "placebo"])
def test_a_batch_of_one_window_is_refused_by_what_needs_two_documents_in_it(
    sticky_store: ActivationStore, small_config: ConfigFactory, name: str
) -> None:
    small = small_config(batch_tokens=8, tokens=40 * 8, arm={"anchors": 4})
    with pytest.raises(ConfigError, match="batch_tokens = 8 is one window of 8 tokens; expected at least 16"):
        Training(sticky_store, arms_of(small, name), CPU)
    assert Training(sticky_store, arms_of(small, "info_nce"), CPU).config.steps == 40
