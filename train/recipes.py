"""Named arms, packaged as TOML files in ``data/recipes``.

A recipe's top level is an arm. Its optional table ``[run]`` holds settings of the whole run without which the arm
would not be what its name says, such as the ring's size.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from tcsae.store.errors import ConfigError, UnknownName
from tcsae.train.config import ArmConfig, TrainConfig
from tcsae.train.settings import from_values, load_config, with_settings

_FOLDER = files("tcsae.data") / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes, in order.

    >>> recipe_names()[:3]
    ['batchtopk', 'batchtopk-longer', 'block']
    """
    return sorted(
        file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml")
    )


OF_ALL = ("tokens", "batch_tokens")
"""run settings that decide every arm's result, also of recipes that do not name them"""


def load_recipe(name: str) -> ArmConfig:
    """The arm called ``name``; raises `UnknownName` with the nearest names.

    >>> load_recipe("tc8").window
    8
    """
    return _read(name)[0]


def recipe_run(name: str) -> dict[str, Any]:
    """What the recipe called ``name`` asks of the whole run, fields of `TrainConfig`.

    >>> recipe_run("tc16-ring4k")
    {'ring_size': 4096}
    """
    return _read(name)[1]


def load_recipes(names: Sequence[str], *, given: Collection[str] = ()) -> TrainConfig:
    """A run of the arms called ``names``, with what they ask of the run.

    Parameters
    ----------
    names
        recipes
    given
        run settings that the caller is going to set, about which recipes therefore need not agree

    Raises
    ------
    UnknownName
        no such recipe
    ConfigError
        two recipes ask for different values of a run setting: both are named

    >>> load_recipes(["block", "tc16-ring4k"]).ring_size
    4096
    """
    run: dict[str, Any] = {}
    asked_by: dict[str, str] = {}
    asked = [recipe_run(name) for name in names]
    usual = {field.name: field.default for field in fields(TrainConfig)}
    for name, wishes in zip(names, asked, strict=True):
        # The tokens and the batch are part of an arm: one that asks for none is meant for the usual ones.
        fixed = {field: usual[field] for field in OF_ALL if any(field in other for other in asked)}
        for field, value in {**fixed, **wishes}.items():
            if field in given:
                continue
            if field in run and run[field] != value:
                raise ConfigError(
                    f"recipes {asked_by[field]} and {name} ask for different {field}: {run[field]} and "
                    f"{value}; train them in two runs, or give --set {field}=VALUE"
                )
            run[field] = value
            asked_by.setdefault(field, name)
    return TrainConfig(arms=tuple(load_recipe(name) for name in names), **run)


def _read(name: str) -> tuple[ArmConfig, dict[str, Any]]:
    if name not in recipe_names():
        raise UnknownName.among("recipe", name, recipe_names())
    values = tomllib.loads((_FOLDER / f"{name}.toml").read_text("utf-8"))
    where, run = f"recipe {name}", values.pop("run", {})
    arm = from_values(ArmConfig, {"name": name, **values}, where)
    # Also reads the run's settings as what they are: a number as a float, a list as a tuple.
    whole = from_values(TrainConfig, {"arms": (arm,), **run}, where)
    return arm, {field: getattr(whole, field) for field in run}


def asked_config(
    names: Sequence[str], file: Path | None, settings: Sequence[str], tokens: int | None, seeds: str | None
) -> TrainConfig:
    """The run that the command line asks for: a file or recipes, then tokens and seeds, then each ``key=value``.

    Raises
    ------
    ConfigError
        neither a file nor a recipe, or both, seeds that are no numbers, or a setting that is no ``key=value``
    """
    if bool(names) == (file is not None):
        raise ConfigError(
            "give either --recipe (once or more) or --config FILE; `tcsae recipes` lists the recipes"
        )
    pairs = {}
    if tokens is not None:
        pairs["tokens"] = str(tokens)
    if seeds is not None:
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", seeds):
            raise ConfigError(
                f"--seeds: expected whole numbers from 0 with commas, such as 0,1,2, got {seeds!r}"
            )
        pairs["seeds"] = f"[{seeds}]"
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set: expected KEY=VALUE, got {setting!r}")
        pairs[key.strip()] = value.strip()
    config = load_config(file) if file is not None else load_recipes(names, given=pairs)
    return with_settings(config, pairs)
