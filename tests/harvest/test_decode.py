"""A store's tokens as text, by the tokenizer of its model where that is on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tcsae.harvest.decode import local_decoder
from tcsae.store import ActivationStore
from tcsae.store.errors import ModelNotFound
from tcsae.store.spec import Provenance
from tcsae.tests.store.damage import edit_root


def decoded(made: Provenance, ids: list[int]) -> str:
    return local_decoder(made.model, made.model_revision, made.tokenizer_sha256)(ids)


def test_the_beginning_of_a_document_is_its_text(reference: ActivationStore, real_text: Path) -> None:
    first = json.loads(real_text.read_text("utf-8").splitlines()[0])
    assert reference.documents["id"][0].as_py() == first["id"]
    text = decoded(reference.provenance, reference.tokens[:20].tolist())
    assert len(text) > 20
    assert first["text"].startswith(text)


def test_a_tokenizer_in_the_hubs_cache_is_found(
    reference: ActivationStore, neox_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    made = replace(reference.provenance, model="lab/tiny", model_revision="0" * 40)
    ids = reference.tokens[:8].tolist()
    with pytest.raises(ModelNotFound, match="not on this machine"):
        decoded(made, ids)
    snapshot = tmp_path / "models--lab--tiny" / "snapshots" / made.model_revision
    snapshot.mkdir(parents=True)
    shutil.copy(neox_folder / "tokenizer.json", snapshot)
    assert decoded(made, ids) == decoded(reference.provenance, ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"model": "/another/machine/model"}, "not on this machine", id="another machine's folder"
        ),
        pytest.param({"model": "smollm2"}, "not on this machine", id="a packaged model not yet used"),
        pytest.param({"model": "~nobody-of-that-name/m"}, "not on this machine", id="an unknown user's home"),
        pytest.param({"model": "m" * 5000}, "not on this machine", id="a name too long for a path"),
        pytest.param(
            {"model": "a/b", "model_revision": "r" * 5000}, "not on this machine", id="a long revision"
        ),
        pytest.param({"model": "a\0b"}, "not on this machine", id="a name with a null"),
        pytest.param({"tokenizer_sha256": "0" * 64}, "another tokenizer than the store's", id="another one"),
    ],
)
def test_no_text_is_made_up(
    reference: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match=message) as caught:
        decoded(replace(reference.provenance, **changes), [1, 2])
    assert "\n" not in str(caught.value)


def test_ids_that_no_token_has_are_left_out(reference: ActivationStore) -> None:
    ids = reference.tokens[:8].tolist()
    assert decoded(reference.provenance, [-1, *ids, -(2**31), 2**31 - 1]) == decoded(
        reference.provenance, ids
    )


def test_info_and_card_show_beginnings_and_say_why_not(reference: ActivationStore, tmp_path: Path) -> None:
    def tcsae(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "tcsae.cli", "store", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    begins = decoded(reference.provenance, reference.tokens[:32].tolist())
    shown = tcsae("info", str(reference.path), "--json")
    assert json.loads(shown.stdout)["examples"][0] == begins
    assert shown.stderr == ""
    lines = [" ".join(line.split()) for line in tcsae("info", str(reference.path)).stdout.splitlines()]
    assert f"examples {' '.join(begins.split())}" in lines
    assert any(line.startswith("documents by topic ") for line in lines)
    elsewhere = tmp_path / "s.zarr"
    shutil.copytree(reference.path, elsewhere)
    edit_root(elsewhere, model="/another/machine/model")
    card = tcsae("card", str(elsewhere))
    assert "## A few beginnings" not in card.stdout
    assert "examples: no text: /another/machine/model" in card.stderr
    assert len(card.stderr.strip().splitlines()) == 1
