"""Fixtures of the harvest tests: models loaded once, and a corpus of real text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tcsae.harvest import HarvestConfig, LanguageModel, harvest, load_model
from tcsae.store import ActivationStore
from tcsae.tests.fixtures import HOOKS, save_neox, write_corpus


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread: on a busy machine, small products wait 30 times longer for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-NeoX model with the real tokenizer."""
    return save_neox(tmp_path_factory.mktemp("models") / "neox")


@pytest.fixture(scope="session")
def neox(neox_folder: Path) -> LanguageModel:
    """The same, loaded."""
    return load_model(str(neox_folder))


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2, from the user's cache if it has been converted before."""
    return load_model("smollm2")


@pytest.fixture(scope="session")
def real_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of real text as JSON lines."""
    return write_corpus(tmp_path_factory.mktemp("corpora") / "real.jsonl")


@pytest.fixture(scope="session")
def config(neox_folder: Path, real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    """Settings of a small float32 store of real text, in chunks that cut contexts in two."""
    return HarvestConfig(
        store=tmp_path_factory.mktemp("stores") / "reference.zarr",
        model=str(neox_folder),
        corpus=str(real_text),
        hooks=HOOKS,
        context_length=64,
        dtype="float32",
        rows_per_chunk=1000,
    )


@pytest.fixture(scope="session")
def reference(config: HarvestConfig) -> ActivationStore:
    """That store, harvested without interruption."""
    return ActivationStore.open(harvest(config).path)
