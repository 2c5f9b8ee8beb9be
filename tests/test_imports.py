"""One direction: store <- harvest <- train <- evaluate <- cli. Read from the sources, nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "store": {"store"},
    "harvest": {"store", "harvest", "data"},
    # training needs a store and nothing else: neither a model nor its text
    "train": {"store", "train", "data"},
    # replaying needs the model as harvest loads it, the SAE as training saves it, and a truth as harvest drew it
    "evaluate": {"store", "evaluate", "train", "harvest.model", "harvest.synthetic"},
    "data": {"data"},
}


def imports_of(path: Path) -> set[str]:
    """Modules of tcsae that a file imports, without the prefix; "from tcsae.a import b" counts as a."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write tcsae.…"
            found.add(node.module or "")
    return {name.removeprefix("tcsae.") for name in found if name.split(".")[0] == "tcsae"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imports_of(path)
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_IMPORT[package])
    }
    assert wrong == set()


def test_evaluate_takes_of_train_only_what_loads_an_sae():
    used = {
        name
        for path in (ROOT / "evaluate").rglob("*.py")
        for name in imports_of(path)
        if name.startswith("train")
    }
    # and what draws a figure, its own and that of the training run; untrained: initial weights, as a reference
    others = {"train.figure_style", "train.plots", "train.config", "train.untrained"}
    assert used <= {"train.saelens", "train.sae", "train.sae.inference", "train.run"} | others


def test_nothing_imports_a_package_of_ours_without_its_prefix():
    ours = set(MAY_IMPORT) | {"cli"}
    for top in ours - {"cli"}:
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert not {name.split(".")[0] for name in names} & ours, f"{path}: {names}"
