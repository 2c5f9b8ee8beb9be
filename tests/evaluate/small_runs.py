"""A small SAE of a store that no model made, and what the temporal suite says of it beside a control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae

HOOK = "blocks.0.hook_resid_post"
D_MODEL, D_SAE = 8, 24


def an_sae(**changes: Any) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=1)
    fields: dict[str, Any] = {
        "architecture": "jumprelu",
        "W_enc": W_dec.T.contiguous(),
        "b_enc": torch.zeros(D_SAE),
        "W_dec": W_dec,
        "b_dec": torch.zeros(D_MODEL),
        "threshold": torch.full((D_SAE,), 0.8),
        "block_size": 6,
        "name": "tc16-s0",
        "metadata": {"hook_name": HOOK},
    }
    return SAE(**(fields | changes))


def same(a: TemporalSums, b: TemporalSums) -> bool:
    """Whether all bits are the same."""
    pairs = ((a.n, b.n), (a.n_pairs, b.n_pairs), (a.values, b.values), (a.cells, b.cells))
    return all(np.array_equal(x, y) for x, y in (*pairs, (a.published, b.published)))


def run_of(tmp_path: Path, store: ActivationStore, **changes: Any) -> Evaluation:
    control = an_sae(name="block-s0", W_enc=an_sae().W_enc.flip(1).contiguous())
    for sae, alpha in ((an_sae(), 1.0), (control, 0.0)):
        sae.metadata["tcsae"] = {"arm": sae.name[:-3], "seed": 0, "recipe": {"alpha": alpha}}
        save_sae(sae, tmp_path / "run" / "sae" / sae.name)
    fields: dict[str, Any] = {
        "saes": (tmp_path / "run",),
        "out": tmp_path / "out",
        "store": store.path,
        "split": "all",
        "suites": ("temporal",),
        "n_bootstrap": 100,
        "device": "cpu",
    }
    return evaluate(EvaluateConfig(**(fields | changes)))
