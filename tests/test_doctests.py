"""Every example in a docstring runs, on the installed modules and not on second copies of them."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

PACKAGES = ("tcsae.store", "tcsae.harvest", "tcsae.train", "tcsae.evaluate")


def modules() -> list[str]:
    return [
        found.name
        for package in PACKAGES
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    ]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples_at_all():
    total = sum(doctest.testmod(importlib.import_module(name)).attempted for name in modules())
    assert total > 20
