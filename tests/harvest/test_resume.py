"""Resuming on a processor that rounds differently would mix two kinds of bits; it is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tcsae.harvest import HarvestConfig, harvest
from tcsae.store import ActivationStore
from tcsae.store.errors import StoreMismatch
from tcsae.store.metadata import FIRST_BATCH
from tcsae.tests.fixtures import HOOKS, hashes
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
