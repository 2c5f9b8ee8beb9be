"""Configurations: nothing is lost on the way to a file and back, and nothing wrong gets in."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tcsae.store.errors import ConfigError, UnknownName
from tcsae.train import ArmConfig, TrainConfig, load_config, load_recipe, recipe_names, with_settings
from tcsae.train.settings import differences, to_toml

ARM: dict[str, Any] = {
    "name": "other",
    "explanation": 'has "quotes", a back\\slash,\na new line and µ',
    "expansion": 2.5,
    "k": 40,
    "block_share": 0.3,
    "block_k_share": 0.5,
    "window": 8,
    "alpha": 0.123456789012345,
    "ramp_share": 0.2,
    "temperature": 0.2,
    "anchors": 77,
    "aux_k": 5,
    "aux_weight": 1e-7,
    "dead_after": 9,
    "learning_rate": 1e-5,
    "warmup_steps": 3,
    "decay_share": 0.1,
    "architecture": "jumprelu",
    "sparsity_weight": 0.5,
    "sparsity_warmup_share": 0.3,
    "bandwidth": 0.2,
    "initial_threshold": 0.3,
    "initialisation": "xavier",
    "decoder_bias": "geometric_median",
    "unit_norm_decoder": False,
    "objective": "in_batch",
    "positives": "earlier",
    "similarity": "dot",
    "contrasted_code": "after_top_k",
    "mask_documents": False,
    "resample_every": 20,
    "l2_weight": 1e-5,
    "clip_norm": 1.5,
    "average_decay": 0.99,
}
# What an arm of ARM's architecture cannot have.
OTHERS: tuple[dict[str, Any], ...] = (
    {"name": "nested", "architecture": "matryoshka", "prefix_shares": (0.1, 0.5)},
    {"name": "normalised", "architecture": "standard", "sparsity_weight": 0.1, "batch_norm": True},
)
RUN: dict[str, Any] = {
    "seeds": (3, 1),
    "tokens": 12345,
    "batch_tokens": 1024,
    "hook": "blocks.1.hook_out",
    "data_seed": 8,
    "ring_size": 4096,
    "ring_feed": 100,
    "min_position": 4,
    "precision": "float32",
    "compile": True,
    "log_every": 3,
    "checkpoint_every": 17,
    "collapse_steps": 12,
}


def test_every_field_turned_away_from_its_default_survives_the_file(tmp_path: Path) -> None:
    assert ARM.keys() | OTHERS[0].keys() | OTHERS[1].keys() == {f.name for f in fields(ArmConfig)}
    assert RUN.keys() | {"arms"} == {f.name for f in fields(TrainConfig)}
    defaults = ArmConfig(name="default")
    for values in (ARM, *OTHERS):
        assert all(getattr(defaults, name) != value for name, value in values.items())
    run_defaults = TrainConfig(arms=(defaults,))
    assert all(getattr(run_defaults, name) != value for name, value in RUN.items())
    config = TrainConfig(
        arms=(ArmConfig(**ARM), *(ArmConfig(**o) for o in OTHERS), defaults),
        **(RUN | {"batch_tokens": 2048 + 16}),
    )
    (tmp_path / "config.toml").write_text(to_toml(config), "utf-8")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tokens = 'many'\n[[arms]]\nname='a'", ConfigError, "tokens: expected int, got 'many'"),
        ("[[arms]]\nname='a'\nalfa=0.1", UnknownName, "unknown field 'alfa'; did you mean: alpha"),
        ("[[arms]]\nk=3", ConfigError, "field 'name' is missing"),
        ("tokens = 5", ConfigError, "arms: none given"),
        ("tokens = ", ConfigError, "not TOML"),
        ("arms = 3", ConfigError, r"expected \[\[arms\]\] tables"),
        ("precision = 'int8'\n[[arms]]\nname='a'", ConfigError, "precision: expected one of auto"),
        ("tokens = true\n[[arms]]\nname='a'", ConfigError, "tokens: expected int, got True"),
    ],
    ids=[
        "text for a number",
        "misspelt",
        "no name",
        "no arms",
        "not TOML",
        "arms a number",
        "literal",
        "bool",
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, text: str, error: type[ConfigError], message: str
) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_config(tmp_path / "c.toml")
    assert "\n" not in str(caught.value)
    assert "c.toml" in str(caught.value)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); expected a TOML file$"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "letters, digits"),
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"alpha": -0.1}, "alpha: expected at least 0"),
        ({"alpha": float("nan")}, "alpha: expected at least 0, got nan"),
        ({"alpha": 0.1, "block_share": 0.0}, "alpha is 0.1 without a block"),
        ({"alpha": 0.1, "window": 1}, "a positive needs at least 2 tokens"),
        ({"k": 2, "block_k_share": 0.1}, "gives block H 0 of them"),
        ({"block_share": 1.0}, "block_share: expected less than 1, got 1.0"),
        ({"ramp_share": 1.5}, "ramp_share: expected 0 to 1, got 1.5"),
        ({"temperature": 0.001}, "temperature: expected 0.02 to 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_arm_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArmConfig(**({"name": "a"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": (ArmConfig(name="a"), ArmConfig(name="a"))}, "two have the same name"),
        ({"arms": (ArmConfig(name="a", window=16), ArmConfig(name="b", window=24))}, "same tokens"),
        ({"batch_tokens": 1000}, "same tokens"),
        ({"seeds": (1, 1)}, "seeds: expected different"),
        ({"ring_feed": 20000}, "ring_feed: 20000 is more than ring_size = 16384"),
        ({"batch_tokens": 128}, "anchors = 256 is more than batch_tokens = 128"),
    ],
    ids=["same name", "windows that do not divide", "batch not of windows", "same seed", "feed", "anchors"],
)
def test_a_run_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**({"arms": (ArmConfig(name="a"),)} | changes))


def test_every_recipe_loads_and_explains_itself() -> None:
    arms = [load_recipe(name) for name in recipe_names()]
    assert [arm.name for arm in arms] == recipe_names()
    assert all(len(arm.explanation) > 20 for arm in arms)


def test_the_control_differs_from_the_contrastive_arm_only_in_alpha() -> None:
    block, tc16 = load_recipe("block"), load_recipe("tc16")
    differing = {f.name for f in fields(ArmConfig) if getattr(block, f.name) != getattr(tc16, f.name)}
    assert differing == {"name", "explanation", "alpha"}


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown recipe 'tc61'; did you mean: .*tc16"):
        load_recipe("tc61")


@pytest.mark.parametrize("key", ["alfa", "tc9.alpha", "arms", "name", "tc16.tokens"])
def test_an_unknown_setting_is_refused(key: str) -> None:
    with pytest.raises(UnknownName):
        with_settings(TrainConfig(arms=(load_recipe("tc16"),)), {key: "1"})


def test_differences_name_the_field_and_both_values() -> None:
    begun = TrainConfig(arms=(load_recipe("tc16"),))
    asked = with_settings(begun, {"tc16.alpha": "0.5", "data_seed": "3"})
    alpha = begun.arms[0].alpha
    assert differences(begun, asked) == [
        "data_seed: begun with 0, now 3",
        f"tc16.alpha: begun with {alpha}, now 0.5",
    ]


def test_another_explanation_is_no_difference() -> None:
    tc16 = load_recipe("tc16")
    begun, asked = (TrainConfig(arms=(replace(tc16, explanation=text),)) for text in ("old", "new"))
    assert differences(begun, asked) == []
