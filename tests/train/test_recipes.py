"""The packaged recipes: what is shared, what they ask of the run, and the source experiment's runs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError
from tcsae.train import ArmConfig, TrainConfig, load_recipe, load_recipes, recipe_names, train
from tcsae.train.flop import flop_per_step
from tcsae.train.recipes import asked_config, recipe_run
from tcsae.train.training import Training

SOURCE_RUNS = [f"source-run{i}" for i in range(6)]


def _differing(one: str, other: str) -> set[str]:
    first, second = load_recipe(one), load_recipe(other)
    found = {f.name for f in fields(ArmConfig) if getattr(first, f.name) != getattr(second, f.name)}
    return found - {"name", "explanation"}


def test_every_arm_of_the_method_and_every_architecture_has_a_recipe() -> None:
    names = recipe_names()
    assert {"batchtopk", "block", "tc8", "tc16", "tc32", "placebo", "tsae", "tsae-paper"} <= set(names)
    assert {"matryoshka", "difference", "batchtopk-longer", "tc16-ring4k", "tc16-ring64k"} <= set(names)
    assert set(SOURCE_RUNS) <= set(names)
    every = {load_recipe(name).architecture for name in names}
    assert every == {"batchtopk", "topk", "matryoshka", "standard", "jumprelu", "gated"}


def test_controls_differ_from_the_contrast_in_what_they_control_alone() -> None:
    assert _differing("block", "tc16") == {"alpha"}
    assert _differing("placebo", "tc16") == {"positives"}
    assert _differing("tc8", "tc16") == {"window"}
    assert _differing("tc16-ring4k", "tc16") == _differing("tc16-ring64k", "tc16") == set()
    assert [recipe_run(name)["ring_size"] for name in ("tc16-ring4k", "tc16", "tc16-ring64k")] == [
        4096,
        16384,
        65536,
    ]
    assert _differing("tsae", "tsae-paper") == {"positives", "similarity", "alpha"}


def test_all_arms_compare_at_one_sparsity_and_train_side_by_side() -> None:
    own_run = {"batchtopk-longer", "tc16-ring4k", "tc16-ring64k", *SOURCE_RUNS}
    names = [name for name in recipe_names() if name not in own_run]
    config = load_recipes(names)
    assert {arm.k for arm in config.arms} == {32}
    assert (config.ring_size, config.tokens) == (16384, TrainConfig(arms=config.arms).tokens)


def test_the_longer_baseline_computes_as_much_as_the_contrast() -> None:
    contrast, longer = load_recipes(["tc16"]), load_recipes(["batchtopk-longer"])
    spent = [sum(flop_per_step(c.arms[0], c, 576)) * c.steps for c in (contrast, longer)]
    assert spent[1] == pytest.approx(spent[0], rel=0.01)
    assert _differing("batchtopk", "batchtopk-longer") == set()


def test_recipes_that_ask_for_different_runs_are_refused_by_name_unless_the_caller_decides() -> None:
    message = "recipes tc16 and tc16-ring4k ask for different ring_size: 16384 and 4096; .* --set ring_size="
    with pytest.raises(ConfigError, match=message):
        load_recipes(["batchtopk", "tc16", "tc16-ring4k"])
    both = load_recipes(["tc16", "tc16-ring4k"], given={"ring_size"})
    assert both.ring_size == TrainConfig(arms=both.arms).ring_size
    assert load_recipes(["batchtopk", "tc16-ring4k"]).ring_size == 4096


# ---------------------------------------------------------------------------------------------------------
# The source experiment's runs
# ---------------------------------------------------------------------------------------------------------


def test_the_source_runs_have_the_hyper_parameters_written_there() -> None:
    runs = [load_recipes([name]) for name in SOURCE_RUNS]
    arms = [run.arms[0] for run in runs]
    assert {arm.architecture for arm in arms} == {"standard"}
    # 0.04 and 0.2 where E||x||^2 = D = 576, as a share of the variance.
    for arm, penalty in zip(arms, (0.04, 0.04, 0.2, 0.2, 0.2, 0.2), strict=True):
        assert arm.sparsity_weight * 576**0.5 == pytest.approx(penalty, rel=0.01)
    assert [arm.learning_rate for arm in arms] == [3e-4, 3e-4, 1e-3, 1e-3, 1e-3, 1e-3]
    assert [arm.clip_norm for arm in arms] == [0, 0, 1, 1, 1, 1]
    assert [arm.warmup_steps for arm in arms] == [0, 0, 0, 2000, 2000, 2000]
    assert [arm.l2_weight for arm in arms] == [0, 0, 0, 1e-5, 1e-5, 1e-5]
    assert [arm.resample_every for arm in arms] == [0, 0, 0, 1000, 1000, 1000]
    assert [arm.initialisation for arm in arms] == ["tied"] * 4 + ["xavier"] * 2
    assert [arm.batch_norm for arm in arms] == [False] * 4 + [True] * 2
    assert [arm.alpha > 0 for arm in arms] == [False] + [True] * 5
    assert {arm.window for arm in arms} == {16}
    assert {run.ring_size for run in runs} == {16384}
    assert runs[5].batch_tokens < runs[4].batch_tokens
    assert (runs[5].log_every, runs[5].checkpoint_every) == (1, 250)


@pytest.mark.parametrize("name", ["source-run3", "source-run4", "source-run5"])
def test_a_source_run_with_its_budget_as_written_is_refused_with_the_numbers(
    sticky_store: ActivationStore, tmp_path: Path, name: str
) -> None:
    config = replace(load_recipes([name]), tokens=100_000, batch_tokens=2048)
    with pytest.raises(ConfigError, match=rf"{name}: warm-up of 2000 .* longer than the run of 48 steps"):
        train(sticky_store, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def _explained(store: ActivationStore, name: str, penalty: float, steps: int) -> tuple[list[float], float]:
    """Explained variance of every step of a recipe in batches of 128, and L0 of the last."""
    arm = replace(load_recipe(name), sparsity_weight=penalty / store.d_model**0.5, anchors=8)
    config = TrainConfig(arms=(arm,), tokens=steps * 128, batch_tokens=128, ring_size=256, ring_feed=32)
    training = Training(store, config, torch.device("cpu"))
    terms = [training.step(detailed=False)[f"{name}-s0"] for _ in range(steps)]
    return [1 - found["fvu"] for found in terms], terms[-1]["l0"]


def test_the_first_source_run_is_worse_than_the_mean_after_48_steps_and_good_at_the_end_of_a_longer_run(
    sticky_store: ActivationStore,
) -> None:
    as_written, _ = _explained(sticky_store, "source-run0", 0.04, 48)
    assert as_written[-1] < 0
    longer, l0 = _explained(sticky_store, "source-run0", 0.04, 1500)
    assert longer[-1] > 0.7
    assert l0 > 0


def test_the_third_source_run_is_far_worse_than_the_mean_after_48_steps_of_its_warm_up(
    sticky_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcsae.train.training.check_schedule", lambda *_: None)  # the guard off
    explained, _ = _explained(sticky_store, "source-run3", 0.2, 48)
    assert explained[-1] < -1


def test_a_recipe_with_its_own_tokens_is_not_trained_beside_one_without() -> None:
    # Side by side all arms see the same tokens: the longer arm's would be batchtopk's too.
    with pytest.raises(ConfigError, match="batchtopk and batchtopk-longer ask for different tokens"):
        load_recipes(["batchtopk", "batchtopk-longer"])
    assert load_recipes(["batchtopk", "batchtopk-longer"], given=["tokens"]).tokens == 700 * 2048


@pytest.mark.parametrize("seeds", ["", "a,b", "0,", "0 1", "-1", "0,1.5", "[0]"])
def test_seeds_that_are_no_numbers_are_refused_by_their_option(seeds: str) -> None:
    with pytest.raises(
        ConfigError, match="^--seeds: expected whole numbers from 0 with commas, such as 0,1,2"
    ):
        asked_config(["batchtopk"], None, [], None, seeds)
    assert asked_config(["batchtopk"], None, [], None, "2, 0").seeds == (2, 0)
