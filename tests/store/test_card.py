"""The card and the description say what is in the store."""

from __future__ import annotations

import pytest
import torch

from tcsae.store import describe
from tcsae.store.card import write_card
from tcsae.store.copy import copy_store


@pytest.fixture
def store(make_store):
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    return make_store(rows, [10, 40, 25, 25] * 10, corpus="pipes | and\nlines")


def test_a_description_counts_topics_and_splits(store):
    found = describe(store)
    assert found.topics == 2
    assert found.documents_by_topic == {"even": 20, "odd": 20}
    assert sum(found.splits.values()) == 40
    assert (found.codec, found.codec_ratio, found.examples) == ("raw", {}, ())
    assert describe(store.path) == found


def test_examples_are_the_first_tokens_of_documents(store):
    # 40 documents, every thirteenth: 0, 13 and 26, which begin at rows 0, 310 and 650
    found = describe(store, lambda tokens: f"{tokens[0]} to {tokens[-1]}")
    assert found.examples == ("0 to 9", "310 to 341", "650 to 674")


def test_the_card_names_model_rows_hooks_and_topics(store):
    card = write_card(store)
    assert card.startswith("# Activations of made-by-hand\n")
    assert "| rows x dimensions | 1,000 x 16 |" in card
    assert "| corpus | pipes \\| and lines |" in card
    assert "| even | 20 |" in card
    assert "`blocks.0.hook_resid_post`" in card
    assert store.id in card


def test_the_card_of_a_compressed_copy_states_its_measured_effect(store, tmp_path):
    copied = copy_store(store.path, tmp_path / "small", codec="int8")
    card = write_card(tmp_path / "small")
    assert f"{copied.ratio[store.hooks[0]]:.2f} x smaller" in card
    assert "where tcsae is installed" in card
