"""What is built is what is here: every package is listed, and nothing else lands beside tcsae."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("store", "harvest", "train", "evaluate", "data")


def listed_packages() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_every_package_on_disk_is_listed():
    on_disk = {
        ".".join(("tcsae", *init.parent.relative_to(ROOT).parts))
        for top in CODE
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(listed_packages()) == {"tcsae"} | on_disk


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for top in CODE for path in (ROOT / top).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="tcsae")
    assert command.value == "tcsae.cli:main"


def test_the_root_holds_no_module_but_the_command_line():
    # every *.py in the root would be shipped as tcsae/*.py
    assert [path.name for path in ROOT.glob("*.py")] == ["cli.py"]


def test_no_top_level_name_of_ours_is_importable():
    names = ("store", "harvest", "train", "cli", "data")
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_has_every_module_and_every_recipe(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"tcsae/{path.relative_to(ROOT)}" for top in CODE for path in (ROOT / top).rglob("*.py")}
    expected |= {
        f"tcsae/{path.relative_to(ROOT)}"
        for pattern in ("*.toml", "*.json")
        for path in (ROOT / "data").rglob(pattern)
    }
    expected |= {"tcsae/cli.py", "tcsae/store/py.typed"}
    assert expected <= inside
    assert {name.split("/")[0] for name in inside if ".dist-info" not in name} == {"tcsae"}
