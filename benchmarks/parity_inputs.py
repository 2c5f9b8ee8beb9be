"""What SAEBench and we are given in `parity`: rows of tokens and SAEs, all from fixed seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from tcsae.harvest.model import LanguageModel
from tcsae.tests.fixtures import write_corpus
from tcsae.train.sae.inference import SAE

CONTEXT = 128
"""tokens of a row"""


def random_saes(
    model: LanguageModel, hook: str, rows: Int64[np.ndarray, "row position"], d_sae: int
) -> list[SAE]:
    """A ReLU, a TopK and a JumpReLU SAE about the mean of the model's activations."""
    ids = torch.from_numpy(rows)
    x = model.residuals(ids, [hook])[hook][:, 1:].flatten(0, 1)
    draw = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], generator=draw), dim=1)
    W_enc = W_dec.T + 0.02 * torch.randn(W_dec.T.shape, generator=draw)
    pre = (x - x.mean(dim=0)) @ W_enc
    spread = pre.std().item()
    # biases of both signs: some features are dead, some dense
    bias = spread * (torch.randn(d_sae, generator=draw) - 2)
    metadata = {
        "model_name": model.name,
        "hook_name": hook,
        "prepend_bos": True,
        "context_size": rows.shape[1],
    }
    common: dict[str, Any] = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": x.mean(dim=0), "metadata": metadata}
    threshold = spread * (1 + torch.rand(d_sae, generator=draw))
    return [
        SAE(architecture="standard", name="relu", b_enc=bias, **common),
        SAE(architecture="topk", name="topk", b_enc=torch.zeros(d_sae), k=min(32, d_sae // 4), **common),
        SAE(architecture="jumprelu", name="jumprelu", b_enc=0.1 * bias, threshold=threshold, **common),
    ]


def random_rows(model: LanguageModel, n_rows: int) -> Int64[np.ndarray, "row position"]:
    """Rows of random tokens, BOS in front, a special token inside every fourth."""
    rows = np.random.default_rng(0).integers(10, 50_000, size=(n_rows, CONTEXT))
    assert model.bos_token_id is not None
    rows[:, 0] = model.bos_token_id
    rows[::4, CONTEXT // 2] = model.special_token_ids[0]
    return rows


def text_rows(model: LanguageModel, n_rows: int, folder: Path) -> Int64[np.ndarray, "row position"]:
    """Rows of real text: documents one after the other, BOS in front of each row."""
    write_corpus(folder / "corpus.jsonl", n_documents=400)
    lines = (folder / "corpus.jsonl").read_text("utf-8").splitlines()
    tokens: list[int] = []
    for line in lines:
        tokens += model.tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    cut = np.array(tokens[: n_rows * (CONTEXT - 1)]).reshape(n_rows, CONTEXT - 1)
    return np.concatenate([np.full((n_rows, 1), model.bos_token_id), cut], axis=1)
