"""SAEs whose weights hold a NaN, through the command: refused in a line that names file and tensor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tcsae import cli
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae

from .conftest import HOOK

Run = tuple[int, str, list[str]]


def an_sae(model: LanguageModel, name: str, **changes: Any) -> SAE:
    W_dec = torch.nn.functional.normalize(torch.eye(16).repeat(2, 1) + 0.1, dim=1)
    fields: dict[str, Any] = {
        "architecture": "jumprelu",
        "W_enc": W_dec.T.clone(),
        "b_enc": torch.zeros(32),
        "W_dec": W_dec,
        "b_dec": torch.zeros(16),
        "threshold": torch.full((32,), 0.1),
        "name": name,
        "metadata": {"model_name": model.name, "hook_name": HOOK},
    }
    return SAE(**(fields | changes))


@pytest.fixture(params=["our own", "SAELens'"])
def run(request: pytest.FixtureRequest, tmp_path: Path, neox: LanguageModel) -> Path:
    """A run of a good SAE and of one that was saved with a NaN in W_dec, so that its digest, if any, is right."""
    broken = an_sae(neox, "broken")
    broken.W_dec[5, 3] = torch.nan
    for sae in (an_sae(neox, "a-good-one"), broken):
        folder = tmp_path / "run" / "sae" / sae.name
        save_sae(sae, folder)
        if request.param == "SAELens'":
            config = json.loads((folder / "cfg.json").read_text())
            del config["metadata"]["tcsae"]
            (folder / "cfg.json").write_text(json.dumps(config))
    return tmp_path / "run"


def tcsae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Run:
    """Exit code, stdout and the lines of stderr."""
    monkeypatch.setattr(sys, "argv", ["tcsae", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err.strip().splitlines()


def refused(run: Path) -> Run:
    where = run / "sae" / "broken" / "sae_weights.safetensors"
    return (
        1,
        "",
        [
            f"tcsae: {where}: W_dec holds 1 NaN or infinite of 512 values in float32; its training collapsed, train it "
            "again"
        ],
    )


@pytest.mark.parametrize("suite", ["core", "temporal", "probing", "unlearning"])
def test_no_suite_measures_anything_of_a_run_in_which_one_sae_holds_a_nan(
    run: Path,
    suite: str,
    neox_store: ActivationStore,
    neox_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = run.parent / "out"
    words = ["--store", neox_store.path, "--suite", suite, "--split", "all", "--model", neox_folder]
    assert tcsae(monkeypatch, capsys, "evaluate", run, out, *words) == refused(run)
    assert not list(out.rglob("*.json"))


def test_an_sae_that_holds_a_nan_is_not_exported(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = run / "sae" / "broken", run.parent / "exported"
    assert tcsae(monkeypatch, capsys, "export", source, target) == refused(run)
    assert not target.exists()
