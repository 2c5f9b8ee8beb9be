"""Exported folders hold the same SAEs, whole, and nothing is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.errors import RunError, RunExists, RunNotFound, UnknownName
from tcsae.train import Run, TrainConfig, load_sae, train
from tcsae.train.export import export
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae


@pytest.fixture
def run(sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path) -> Run:
    return train(sticky_store, tmp_path / "run", small_config(tokens=8 * 128, arm={"warmup_steps": 2}))


def test_a_run_gives_a_folder_for_each_sae_and_one_sae_the_folder_itself(run: Run, tmp_path: Path) -> None:
    every = export(run.path, tmp_path / "all")
    assert [p.name for p in every.saes] == ["block-s0", "tc8-s0"]
    one = export(run.saes[1], tmp_path / "one")
    assert one.saes == [tmp_path / "one"]
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    expected = load_sae(run.saes[1])
    for folder in (every.saes[1], one.saes[0]):
        assert load_sae(folder).encode(x).equal(expected.encode(x))
        assert load_sae(folder).metadata["tcsae"]["arm"] == "tc8"


def test_what_cannot_be_exported_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown format 'pickle'.*saelens"):
        export(run.path, tmp_path / "a", "pickle")
    with pytest.raises(RunExists, match="run: already holds something"):
        export(run.saes[0], run.path)
    with pytest.raises(RunNotFound, match="neither a run nor an SAE folder"):
        export(tmp_path, tmp_path / "b")
    weights = run.saes[0] / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match="SHA-256"):
        export(run.saes[0], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_export_that_is_interrupted_leaves_nothing_in_the_way_of_the_next(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(sae: SAE, folder: Path) -> None:
        save_sae(sae, folder)
        if folder.name == "tc8-s0":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tcsae.train.export.save_sae", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(run.path, tmp_path / "all")
    assert not list((tmp_path / "all").iterdir())
    assert len(export(run.path, tmp_path / "all").saes) == 2


def test_a_run_with_a_damaged_sae_or_unfinished_is_not_exported_by_half(run: Run, tmp_path: Path) -> None:
    weights = run.saes[1] / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"?")
    with pytest.raises(RunError, match="SHA-256"):
        export(run.path, tmp_path / "all")
    assert not (tmp_path / "all").exists()
    weights.write_bytes(whole)
    facts = run.path / "run.json"
    # As if the process had been killed while it wrote the SAEs.
    facts.write_text(facts.read_text().replace('"finished"', '"running"'))
    with pytest.raises(
        RunError, match="the run is running after step 8 of 8, expected finished; go on with it"
    ):
        export(run.path, tmp_path / "all")
    assert not (tmp_path / "all").exists()
    assert export(run.saes[1], tmp_path / "one").saes == [tmp_path / "one"]
