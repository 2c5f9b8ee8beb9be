"""What a harvest will do, known before the model runs: every row's place and the bytes."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path

from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.corpus import Skips, read_corpus
from tcsae.harvest.model import LanguageModel
from tcsae.harvest.tokens import tokenise
from tcsae.store.errors import ConfigError, DiskFull
from tcsae.store.layout import Layout
from tcsae.store.space import free_bytes, hook_bytes
from tcsae.store.spec import Provenance

log = logging.getLogger(__name__)

BYTE_DECIDING = ("tcsae", "torch", "transformers", "transformer_lens", "tokenizers")
"""Packages whose version may change an activation's last bits or a token."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything that the writer and the chunks' runner need."""

    layout: Layout
    """every row's place"""
    provenance: Provenance
    """who, from what, with which settings"""
    skips: Skips
    """rows of the corpus that became no document"""


def make_plan(config: HarvestConfig, model: LanguageModel) -> Plan:
    """Tokenise the corpus and lay out its rows.

    Raises
    ------
    UnknownName
        the model has no such hook, or the corpus no such part
    CorpusError
        the corpus cannot be read, or none of it is usable
    ConfigError
        the contexts are longer than the model can read, or its tokenizer has tokens that it does not know
    """
    model.check_hooks(config.hooks)
    if model.max_context is not None and config.context_length > model.max_context:
        raise ConfigError(
            f"context_length: expected at most the {model.max_context} tokens that {model.name} can read, "
            "got "
            f"{config.context_length}; lower it"
        )
    tokenised = tokenise(
        read_corpus(config.corpus),
        model.tokenizer,
        rows_per_context=config.context_length - (model.bos_token_id is not None),
        max_tokens=config.max_tokens,
    )
    _check_vocabulary(model, tokenised.layout)
    if tokenised.skips.total:
        log.warning("%s: skipped %s", config.corpus, tokenised.skips)
    return Plan(tokenised.layout, provenance_of(config, model, tokenised.corpus_sha256), tokenised.skips)


def _check_vocabulary(model: LanguageModel, layout: Layout) -> None:
    """Refuse a tokenizer that gives ids which the model does not know, such as one with tokens added later."""
    highest = max(int(layout.tokens.max()), model.bos_token_id or 0)
    if highest >= model.vocab_size:
        raise ConfigError(
            f"model: expected a tokenizer with ids below the {model.vocab_size:,} of the vocabulary of {model.name}, "
            f"got {highest:,} ({model.tokenizer.convert_ids_to_tokens(highest)!r}); save the tokenizer that belongs to "
            "the model in its folder"
        )


def provenance_of(config: HarvestConfig, model: LanguageModel, corpus_sha256: str) -> Provenance:
    """The attributes of a store that ``config`` and ``model`` make from the corpus with that hash."""
    return Provenance(
        model=model.name,
        model_revision=model.revision,
        model_sha256=model.sha256,
        tokenizer_sha256=model.tokenizer_sha256,
        hooks=config.hooks,
        d_model=model.d_model,
        context_length=config.context_length,
        bos_token_id=model.bos_token_id,
        special_token_ids=model.special_token_ids,
        vocab_size=model.vocab_size,
        dtype=config.dtype,
        precision=config.precision,
        rows_per_chunk=config.rows_per_chunk,
        corpus=config.corpus,
        corpus_sha256=corpus_sha256,
        max_tokens=config.max_tokens,
        versions={name: importlib.metadata.version(name) for name in BYTE_DECIDING},
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def check_space(store: Path, provenance: Provenance, n_chunks: int) -> None:
    """Raise `DiskFull`, with the numbers, unless ``n_chunks`` more chunks of every hook fit on the disk."""
    n_hooks = len(provenance.hooks)
    per_hook = hook_bytes(provenance, n_chunks * provenance.rows_per_chunk)
    free = free_bytes(store)
    if free < per_hook * n_hooks:
        raise DiskFull(
            f"{store}: expected {per_hook * n_hooks:,} bytes free for {n_chunks:,} chunks of {n_hooks} hooks in "
            f"{provenance.dtype} ({per_hook:,} bytes a hook), got {free:,}; free some space, lower --max-tokens or "
            "store fewer hooks"
        )
