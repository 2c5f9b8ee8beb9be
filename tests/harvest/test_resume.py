"""What a resumed harvest compares with the store that was begun, and that a dry run of it compares the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tcsae.harvest import HarvestConfig, LanguageModel, dry_run, harvest, load_model, plan, resume
from tcsae.store import ActivationStore
from tcsae.store.errors import StoreMismatch, TcsaeError
from tcsae.store.metadata import FIRST_BATCH
from tcsae.tests.fixtures import HOOKS, hashes, save_neox
from tcsae.tests.store.damage import edit_root


@pytest.fixture
def lacking(reference: ActivationStore, config: HarvestConfig, tmp_path: Path) -> HarvestConfig:
    """A harvest to go on with: one of its chunks is not there yet."""
    mine = replace(config, store=tmp_path / "s.zarr", resume=True)
    shutil.copytree(reference.path, mine.store)
    chunk_of(mine).unlink()
    return mine


def chunk_of(config: HarvestConfig) -> Path:
    return config.store / "activations" / HOOKS[0] / "c" / "1" / "0"


def test_another_kind_of_processor_is_refused_and_nothing_is_written(lacking: HarvestConfig) -> None:
    command = [sys.executable, "-P", "-m", "tcsae.cli", "harvest", str(lacking.store), "--resume"]
    command += ["--model", lacking.model, "--corpus", lacking.corpus, "--dtype", lacking.dtype]
    command += ["--context-length", "64", "--rows-per-chunk", "1000", *(f"--hook={hook}" for hook in HOOKS)]
    # without AVX, torch's kernels add in another order: another kind of processor, on this machine
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "rounds differently" in done.stderr
    assert re.search(r" here \(cpu, \d+ threads, DEFAULT\)", done.stderr)
    assert "resume on a machine of the first kind with the same OMP_NUM_THREADS" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not chunk_of(lacking).exists()


def test_the_same_processor_goes_on_to_the_same_bytes(
    lacking: HarvestConfig, reference: ActivationStore
) -> None:
    harvest(lacking)
    assert hashes(lacking.store) == hashes(reference.path)


def test_what_was_recorded_decides(lacking: HarvestConfig) -> None:
    edit_root(lacking.store, **{FIRST_BATCH: "0" * 64})
    with pytest.raises(StoreMismatch, match=r"SHA-256 000000000000… there"):
        harvest(lacking)


def test_a_store_from_before_it_was_recorded_is_resumed(
    lacking: HarvestConfig, reference: ActivationStore
) -> None:
    edit_root(lacking.store, **{FIRST_BATCH: None})
    harvest(lacking)
    assert (
        chunk_of(lacking).read_bytes()
        == (reference.path / chunk_of(lacking).relative_to(lacking.store)).read_bytes()
    )
    assert FIRST_BATCH not in json.loads((lacking.store / "zarr.json").read_text())["attributes"]


# --------------------------------------------------------------------- a dry run of it


@pytest.fixture
def model_already_loaded(neox: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> LanguageModel:
        return neox if name == neox.name else load_model(name, **options)

    monkeypatch.setattr(resume, "load_model", load)


def said(command: Callable[[HarvestConfig], object], config: HarvestConfig) -> str | None:
    """What it is refused with; None if it is not."""
    try:
        command(config)
    except TcsaeError as error:
        return str(error)
    return None


def other_texts(config: HarvestConfig) -> HarvestConfig:
    """The documents at the corpus' path are others by now."""
    path = config.store.parent / "corpus.jsonl"
    path.write_text('{"text": "Nothing that was there before."}\n')
    edit_root(config.store, corpus=str(path))
    return replace(config, corpus=str(path))


def no_texts(config: HarvestConfig) -> HarvestConfig:
    """The corpus has been deleted."""
    changed = other_texts(config)
    Path(changed.corpus).unlink()
    return changed


def other_weights(config: HarvestConfig) -> HarvestConfig:
    """The model's folder holds other weights by now."""
    model = str(save_neox(config.store.parent / "model", seed=1))
    edit_root(config.store, model=model)
    return replace(config, model=model)


def other_rounding(config: HarvestConfig) -> HarvestConfig:
    edit_root(config.store, **{FIRST_BATCH: "0" * 64})
    return config


def other_packages(config: HarvestConfig) -> HarvestConfig:
    made = json.loads((config.store / "zarr.json").read_text())["attributes"]["versions"]
    edit_root(config.store, versions=made | {"torch": "1.0"})
    return config


@pytest.mark.usefixtures("model_already_loaded")
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param(lambda config: config, None, id="nothing changed"),
        pytest.param(other_texts, None, id="other documents in the corpus, which is not read again"),
        pytest.param(no_texts, None, id="no corpus any more"),
        pytest.param(lambda c: replace(c, corpus=f"{c.corpus}l"), "corpus: begun", id="another corpus"),
        pytest.param(lambda c: replace(c, model="smollm2"), "model: begun", id="another model"),
        pytest.param(other_weights, "model_sha256: begun", id="another model of the same name"),
        pytest.param(lambda c: replace(c, context_length=32), "context_length: begun", id="other contexts"),
        pytest.param(other_packages, "versions: begun", id="other packages"),
        pytest.param(other_rounding, "rounds differently", id="another rounding"),
    ],
)
def test_a_dry_run_of_a_resume_refuses_what_the_resume_refuses(
    changed: Callable[[HarvestConfig], HarvestConfig], expected: str | None, lacking: HarvestConfig
) -> None:
    mine = changed(lacking)
    before = hashes(mine.store)
    planned = said(dry_run, mine)
    assert hashes(mine.store) == before
    assert planned == said(harvest, mine)
    assert planned is None if expected is None else expected in str(planned)


def test_a_dry_run_of_a_resume_without_a_missing_chunk_loads_neither_model_nor_corpus(
    lacking: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = no_texts(other_weights(lacking))
    whole = replace(mine, hooks=HOOKS[1:])
    edit_root(mine.store, hooks=list(whole.hooks))  # the other one's chunks are all there
    monkeypatch.setattr(resume, "load_model", None)
    found = dry_run(whole)
    assert (found.missing_chunks, found.seconds, found.skipped) == (0, 0.0, {})


def test_a_dry_run_of_a_resume_is_refused_for_want_of_space_as_the_resume_is(
    lacking: HarvestConfig, model_already_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda _: 1000)
    planned = said(dry_run, lacking)
    assert planned == said(harvest, lacking)
    assert "bytes free for 1 chunks" in str(planned)
