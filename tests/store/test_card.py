"""The card and the description say what is in the store."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from tcsae.store import describe
from tcsae.store.card import write_card
from tcsae.store.copy import copy_store
from tcsae.tests.store.damage import edit_documents, edit_root


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


def test_norms_of_a_store_without_a_train_split_are_not_made_up(store, tmp_path):
    held_out = int(store.documents_in("test")[0])
    part = tmp_path / "part"
    copy_store(store.path, part, documents=(held_out, held_out + 1))
    found = describe(part)
    assert found.splits == {"test": 1}
    assert (found.median_norm, found.outliers, found.norm_quantiles) == ({}, {}, {})
    assert "| no row in the train split | - |" in write_card(part)


def test_the_card_of_a_compressed_copy_states_its_measured_effect(store, tmp_path):
    copied = copy_store(store.path, tmp_path / "small", codec="int8")
    card = write_card(tmp_path / "small")
    assert f"{copied.ratio[store.hooks[0]]:.2f} x smaller" in card
    assert "where tcsae is installed" in card


@pytest.mark.parametrize("codec", ["lossless", "uniform"])
def test_an_effect_that_was_not_recorded_is_not_measured(store, tmp_path, codec):
    copy_store(store.path, tmp_path / "small", codec=codec)
    edit_root(tmp_path / "small", codec_effect=None)
    found = describe(tmp_path / "small")
    assert (found.codec_ratio, found.codec_error) == ({}, {})
    assert "| not measured |" in write_card(tmp_path / "small")
    copied = copy_store(tmp_path / "small", tmp_path / "part", documents=(0, 20))
    assert (copied.ratio, copied.relative_error) == ({}, {})
    assert "codec_effect" not in json.loads((tmp_path / "part" / "zarr.json").read_text())["attributes"]


def test_half_an_effect_is_shown_by_half(store, tmp_path):
    copy_store(store.path, tmp_path / "small", codec="int8")
    edit_root(tmp_path / "small", codec_effect={store.hooks[0]: {"ratio": 1.75}})
    assert "| 1.75 x smaller |" in write_card(tmp_path / "small")


def test_texts_of_a_store_are_no_markdown_in_its_card(make_store):
    rows = torch.zeros(50, 16)
    model, topic = "a*b*`c`\n# d", "<b>x</b> [y](z)"
    store = make_store(rows, [50], model=model)
    edit_documents(store.path, "topic", [topic])
    edit_root(store.path, table_sha256=None)
    card = write_card(store.path, lambda _: "```\n</p><script>\x1b[2J\n# h\n- [x](http://y)")
    assert card.startswith(
        "# Activations of a\\*b\\*\\`c\\` \\# d\n\n50 activations of `a*b*'c' # d` in token"
    )
    assert "| \\<b\\>x\\</b\\> \\[y\\](z) | 1 |" in card
    assert "\n\n    ``` </p><script>[2J # h - [x](http://y)\n\n" in card
    assert "\x1b" not in card


def test_a_terminal_gets_no_control_characters_from_a_store(make_store):
    store = make_store(torch.zeros(50, 16), [50], corpus="two  blanks\x1b]0;title\x07\u202e\nand a line")
    edit_documents(store.path, "topic", ["\x1b[2Jlaw"])
    edit_root(store.path, table_sha256=None)
    command = [sys.executable, "-P", "-m", "tcsae.cli", "store", "info", str(store.path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert re.search(r"^corpus +two  blanks\]0;title and a line$", shown, re.MULTILINE)
    assert re.search(r"^documents by topic +\[2Jlaw: 1$", shown, re.MULTILINE)
    assert all(line.isprintable() for line in shown.split("\n"))
