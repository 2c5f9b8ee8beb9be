"""The training figure: on demand, with a band over seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tcsae.store import ActivationStore
from tcsae.store.errors import RunError, RunNotFound
from tcsae.train import ArmConfig, TrainConfig, plot_run, train
from tcsae.train.plots import comparable, over_seeds


def test_a_run_is_drawn_again_from_what_it_has_written(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = train(sticky_store, tmp_path / "run", small_config(seeds=(3, 1)))
    run.figure.unlink()
    drawn = plot_run(run.path)
    assert (drawn.figure, drawn.step, drawn.steps) == (run.figure, 40, 40)
    assert run.figure.read_bytes().startswith(b"\x89PNG")
    table = pq.read_table(run.metrics)
    step, values = over_seeds(table, "tc8", "fvu")
    lines = [line for line in table.to_pylist() if line["arm"] == "tc8"]
    for row, seed in zip(values, (1, 3), strict=True):
        assert row.tolist() == [line["fvu"] for line in lines if line["seed"] == seed]
    _, contrast = over_seeds(table, "tc8", "contrast")
    # 32 of 256 enter the ring after each step, so the line of step 10 is the first with a full one.
    assert step[np.isfinite(contrast).all(axis=0)].min() == 10
    run.metrics.unlink()
    with pytest.raises(RunError, match="not there yet; a run writes it with its first checkpoint"):
        plot_run(run.path)
    with pytest.raises(RunNotFound):
        plot_run(tmp_path / "none")


def test_only_losses_of_one_objective_share_a_panel() -> None:
    plain = ArmConfig(name="plain", block_share=0.0)
    learning: dict[str, Any] = {"alpha": 0.1}
    block, tc16 = ArmConfig(name="block"), ArmConfig(name="tc16", **learning)
    dot = ArmConfig(name="dot", objective="in_batch", similarity="dot", **learning)
    cosine = ArmConfig(name="cosine", objective="in_batch", **learning)
    difference = ArmConfig(name="difference", objective="difference", **learning)
    ring = "temporal contrastive loss (nats)"
    assert comparable([plain, block]) == comparable([plain]) == (ring, {})
    others = {"dot": "in_batch", "difference": "difference"}
    assert comparable([dot, plain, tc16, block, difference]) == (ring, others)
    label, others = comparable([plain, dot, cosine, block])
    assert label == "contrastive loss of dot products (nats)"
    assert others == {"cosine": "in_batch", "block": "info_nce"}
    assert comparable([difference]) == ("squared difference of a pair's codes", {})
