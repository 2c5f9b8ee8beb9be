"""Named arms, packaged as TOML files in ``data/recipes``."""

from __future__ import annotations

import tomllib
from importlib.resources import files

from tcsae.store.errors import UnknownName
from tcsae.train.config import ArmConfig
from tcsae.train.settings import from_values

_FOLDER = files("tcsae.data") / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes, in order.

    >>> recipe_names()
    ['batchtopk', 'block', 'tc16', 'tc32', 'tc8']
    """
    return sorted(
        file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml")
    )


def load_recipe(name: str) -> ArmConfig:
    """The arm called ``name``; raises `UnknownName` with the nearest names.

    >>> load_recipe("tc8").window
    8
    """
    if name not in recipe_names():
        raise UnknownName.among("recipe", name, recipe_names())
    values = tomllib.loads((_FOLDER / f"{name}.toml").read_text("utf-8"))
    return from_values(ArmConfig, {"name": name, **values}, f"recipe {name}")
