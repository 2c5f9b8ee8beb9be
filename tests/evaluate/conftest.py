"""A tiny GPT-NeoX with a tokenizer, as Pythia has them (BOS = EOS = pad = 0), and a store that it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.evaluate.splice import ReplayModel
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.store import ActivationStore

HOOK = "blocks.1.hook_resid_post"
VOCAB = 61


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, in Hugging Face's form."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("neox")
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPTNeoXForCausalLM(config).save_pretrained(folder)
    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def neox(neox_folder: Path) -> LanguageModel:
    """The model, loaded as harvest loads it."""
    return load_model(str(neox_folder), device="cpu")


StoreOf = Callable[..., ActivationStore]


@pytest.fixture
def neox_store(make_store: StoreOf, neox: LanguageModel) -> ActivationStore:
    """Forty documents of 17 to 40 tokens in contexts of 20 rows, float32, at `HOOK`; some hold a 0."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(17, 41, size=40).tolist()
    tokens = generator.integers(1, VOCAB, size=sum(lengths))
    tokens[generator.integers(0, len(tokens), size=5)] = 0
    rows, at = [], 0
    for length in lengths:
        for start in range(0, length, 20):
            context = tokens[at + start : at + min(start + 20, length)]
            ids = torch.tensor([[0, *context.tolist()]])
            rows.append(neox.residuals(ids, [HOOK])[HOOK][0, 1:].clone())
        at += length
    return make_store(
        torch.cat(rows),
        lengths,
        context_rows=20,
        tokens=tokens,
        **made_by(neox),
    )


def made_by(model: LanguageModel) -> dict[str, Any]:
    """Fields of the provenance of a store that ``model`` made at `HOOK`."""
    return {
        "model": model.name,
        "model_sha256": model.sha256,
        "tokenizer_sha256": model.tokenizer_sha256,
        "hooks": (HOOK,),
        "bos_token_id": model.bos_token_id,
        "special_token_ids": model.special_token_ids,
        "vocab_size": model.vocab_size,
        "dtype": "float32",
    }


@pytest.fixture
def replayed(neox: LanguageModel) -> ReplayModel:
    """The model under the type that evaluation knows it by."""
    assert isinstance(neox, ReplayModel)
    return neox
