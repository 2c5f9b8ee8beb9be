"""A model, a store and an SAE in which one feature carries a topic, so that what unlearning finds is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tcsae.evaluate.splice import ReplayModel
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE

from .conftest import HOOK, VOCAB, made_by, neox, neox_folder, neox_store, replayed

__all__ = ["neox", "neox_folder", "neox_store", "replayed"]

StoreFactory = Callable[..., ActivationStore]

N_DENSE = 24
"""Features that fire on everything, after the planted one."""


class Planted(NamedTuple):
    """Documents with an even number hold tokens of one half of the vocabulary, those with an odd number the
    other half; feature 0 fires on rows of even documents alone, the other features on rows of both."""

    store: ActivationStore
    sae: SAE


@pytest.fixture
def planted(make_store: StoreFactory, neox: LanguageModel) -> Planted:
    generator = np.random.default_rng(1)
    lengths = generator.integers(14, 31, size=48).tolist()
    halves = (np.arange(1, VOCAB // 2), np.arange(VOCAB // 2, VOCAB))
    documents = [_likely_text(neox, halves[i % 2], n, generator) for i, n in enumerate(lengths)]
    rows = []
    for text in documents:
        for start in range(0, len(text), 15):
            ids = torch.tensor([[0, *text[start : start + 15]]])
            rows.append(neox.residuals(ids, [HOOK])[HOOK][0, 1:].clone())
    store = make_store(
        torch.cat(rows), lengths, context_rows=15, tokens=np.concatenate(documents), **made_by(neox)
    )
    return Planted(store, _planted_sae(torch.cat(rows), store, neox))


def _likely_text(
    model: LanguageModel, among: np.ndarray[Any, Any], n_tokens: int, generator: np.random.Generator
) -> list[int]:
    """Tokens of ``among`` that the model itself finds likely, so that disturbing it makes them less so."""
    text: list[int] = []
    while len(text) < n_tokens:
        # the model starts again with each context of 15 rows
        context = [0, *text[len(text) // 15 * 15 :]]
        p = torch.softmax(model.logits(torch.tensor([context]))[0, -1, among].double(), dim=-1).numpy()
        text.append(int(generator.choice(among, p=p / p.sum())))
    return text


def _planted_sae(x: torch.Tensor, store: ActivationStore, model: LanguageModel) -> SAE:
    document = np.repeat(np.arange(store.n_documents), np.diff(store.document_offsets))
    is_even = torch.from_numpy(document % 2 == 0)
    with_one = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    weight = torch.linalg.lstsq(with_one, is_even.double()).solution.float()[:-1]
    threshold = (x @ weight)[~is_even].max() + 1e-3
    generator = torch.Generator().manual_seed(2)
    W_enc = torch.cat([weight[:, None], torch.randn(16, N_DENSE, generator=generator)], dim=1)
    W_dec = torch.nn.functional.normalize(torch.randn(N_DENSE + 1, 16, generator=generator), dim=1)
    return SAE(
        architecture="standard",
        W_enc=W_enc,
        b_enc=torch.cat([-threshold[None], torch.zeros(N_DENSE)]),
        W_dec=W_dec * x.norm(dim=1).mean(),
        b_dec=torch.zeros(16),
        name="planted-s0",
        metadata={"model_name": model.name, "hook_name": HOOK},
    )


@pytest.fixture
def replay_model(neox: LanguageModel) -> ReplayModel:
    """The model under the type that evaluation knows it by."""
    assert isinstance(neox, ReplayModel)
    return neox
