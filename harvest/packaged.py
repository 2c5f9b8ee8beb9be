"""Material that comes inside PyPI packages: where it is, and how to install it if it is not there."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from tcsae.store.errors import TcsaeError


def table(name: str) -> dict[str, Any]:
    """The table ``data/<name>.toml``, which says what packages hold and where."""
    return tomllib.loads((resources.files("tcsae.data") / f"{name}.toml").read_text(encoding="utf-8"))


def package_folder(entry: dict[str, Any], missing: type[TcsaeError], what: str) -> Path:
    """Folder of an installed package, found without importing it.

    Parameters
    ----------
    entry
        line of a `table`: ``module`` is looked for, ``distribution`` and ``install`` are for the error
    missing
        the error to raise if it is not installed
    what
        what the user asked for, such as ``model 'smollm2'``
    """
    found = importlib.util.find_spec(entry["module"])
    if found is None or not found.submodule_search_locations:
        raise missing(
            f"{what}: it comes in the package {entry['distribution']}, which is not installed; "
            f"{entry['install']}"
        )
    return Path(next(iter(found.submodule_search_locations)))
