"""Short runs of every architecture beside each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.tests.train.architectures import OPTIONS, every_architecture
from tcsae.train import TrainConfig, load_sae, train
from tcsae.train.config import TrainedArchitecture
from tcsae.train.sae.build import CLASSES


def test_every_architecture_of_the_configuration_is_built() -> None:
    assert set(CLASSES) == set(get_args(TrainedArchitecture))


def test_every_architecture_learns_and_is_sparse_on_held_out_documents(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    arms = every_architecture(learning_rate=5e-3)
    run = train(
        sticky_store, tmp_path / "run", small_config(arms=arms, tokens=200 * 128, checkpoint_every=200)
    )
    x = torch.cat([sticky_store.document(int(i)) for i in sticky_store.documents_in("test")]).float()
    found = {}
    for folder in run.saes:
        sae = load_sae(folder)
        f = sae.encode(x)
        explained = 1 - (x - sae.decode(f)).square().sum() / (x - x.mean(dim=0)).square().sum()
        found[sae.name.removesuffix("-s0")] = (float(explained), float((f > 0).sum(dim=1).double().mean()))
    assert found.keys() == OPTIONS.keys()
    for name, (explained, l0) in found.items():
        # The mean explains 0; of the 64 features ReLU starts with half.
        assert explained > 0.6, found
        assert 1 < l0 < 24, found
        if OPTIONS[name].get("architecture") not in ("standard", "gated"):
            assert l0 == pytest.approx(4, rel=0.15), found
    table = pq.read_table(run.metrics).to_pandas().set_index(["arm", "step"])
    for name in ("standard", "batch-norm", "gated", "jumprelu"):
        assert table.loc[(name, 200), "sparsity"] < table.loc[(name, 1), "sparsity"]
