"""Who belongs together and who is compared with whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcsae.evaluate.compare.arms import Design, Family, arms_of, design_of, families_of
from tcsae.evaluate.compare.folders import read_folders

from .conftest import planted

WriteFolder = Callable[..., Path]


def families(folder: WriteFolder, *arms: tuple[str, dict[str, Any]]) -> list[Family]:
    saes = [planted(name, seed, {"l0": 30.0}, **settings) for name, settings in arms for seed in (0, 1)]
    return families_of(arms_of(read_folders([folder(saes)]).saes))


def pairs(design: Design) -> list[tuple[str, str, str]]:
    return [(one.treated.name, one.control.name, one.role) for one in design.pairs]


TC16 = {"alpha": 0.02}


def test_arms_that_differ_in_k_alone_are_one_family_by_rising_k(folder: WriteFolder) -> None:
    found = families(
        folder,
        ("tc16-k32", TC16 | {"k": 32}),
        ("block-k32", {"k": 32}),
        ("tc16-k16", TC16 | {"k": 16}),
        ("tc16-hot-k16", {"alpha": 0.05, "k": 16}),
    )
    assert [(one.name, [arm.k for arm in one.arms]) for one in found] == [
        ("tc16", [16, 32]),
        ("block-k32", [32]),
        ("tc16-hot-k16", [16]),
    ]
    assert found[0].seeds == [0, 1]


def test_families_whose_names_differ_in_k_alone_keep_all_their_arms_names(folder: WriteFolder) -> None:
    arms = [(f"a{share}-k{k}", {"block_share": share / 10, "k": k}) for share in (1, 2) for k in (8, 16)]
    renamed = [(name.replace("a1", "a").replace("a2", "a_"), settings) for name, settings in arms]
    assert [one.name for one in families(folder, *renamed)] == ["a", "a_"]
    odd = [("x-k8", {"k": 8}), ("y-k16", {"k": 16})]
    assert [one.name for one in families(folder, *odd)] == ["x-k8/y-k16"]


def test_the_registered_pair_comes_first_and_the_rest_have_their_controls(folder: WriteFolder) -> None:
    design = design_of(
        families(
            folder,
            ("batchtopk", {"block_share": 0.0}),
            ("tc32", TC16 | {"window": 32}),
            ("block", {}),
            ("placebo", TC16 | {"positives": "other_document"}),
            ("tc16", TC16),
            ("tc16-a05", {"alpha": 0.05}),
        )
    )
    assert design.no_primary is None
    assert pairs(design) == [
        ("tc16", "block", "primary"),
        ("batchtopk", "block", "secondary"),
        ("tc32", "block", "secondary"),
        ("placebo", "block", "secondary"),
        ("tc16-a05", "block", "secondary"),
        ("tc16", "placebo", "secondary"),
    ]


def test_the_control_is_the_one_that_lacks_the_contrast_and_nothing_else(folder: WriteFolder) -> None:
    design = design_of(
        families(
            folder,
            ("wide", {"expansion": 2.0}),
            ("block", {}),
            ("k-share", {"block_k_share": 0.5}),
            ("tc16", TC16),
        )
    )
    assert pairs(design)[0] == ("tc16", "block", "primary")


@pytest.mark.parametrize(
    ("arms", "why"),
    [
        pytest.param([("block", {})], "no arm with a temporal contrast of window 16", id="no contrast"),
        pytest.param(
            [("block", {}), ("tc8", TC16 | {"window": 8})],
            "no arm with a temporal contrast",
            id="another window",
        ),
        pytest.param(
            [("block", {"block_k_share": 0.5}), ("tc16", TC16)],
            "a control of the same block",
            id="no control",
        ),
        pytest.param(
            [("block", {}), ("a", {"alpha": 0.1}), ("b", {"alpha": 0.3})],
            "a (alpha 0.1), b (alpha 0.3) all have window 16",
            id="two weights, neither registered",
        ),
    ],
)
def test_without_the_registered_pair_it_says_why(
    folder: WriteFolder, arms: list[tuple[str, dict[str, Any]]], why: str
) -> None:
    design = design_of(families(folder, *arms))
    assert design.no_primary is not None
    assert why in design.no_primary
    assert all(role == "secondary" for _, _, role in pairs(design))


def test_one_arm_of_another_weight_alone_is_the_contrast(folder: WriteFolder) -> None:
    design = design_of(families(folder, ("block", {}), ("hot", {"alpha": 0.3})))
    assert pairs(design) == [("hot", "block", "primary")]
