"""The measured cost of the codecs: the file is whole, and what is quoted is what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tcsae.store.card import write_card
from tcsae.store.copy import copy_store
from tcsae.store.effect import effect_on_saes

FILE = Path(__file__).parents[2] / "data" / "codec_effect.json"
LOSSY = ("int8", "uniform")


@pytest.fixture(scope="module")
def found():
    return json.loads(FILE.read_text())


def test_every_codec_was_measured_on_every_sae_with_an_interval_around_the_figure(found):
    assert set(found["codecs"]) == {"lossless", *LOSSY}
    for effect in found["codecs"].values():
        assert effect["saes"].keys() == found["saes"].keys()
        for figures in effect["saes"].values():
            assert figures.keys() == {"explained_variance", "explained_variance_of_raw", "loss_recovered"}
            for figure in figures.values():
                assert figure["low"] <= figure["value"] <= figure["high"]


def test_the_file_says_what_it_was_measured_on(found):
    assert found["model"]
    assert found["hook"].startswith("blocks.")
    assert re.fullmatch("[0-9a-f]{64}", found["model_sha256"])
    assert 1 < found["n_documents_replayed"] <= found["n_documents"]
    assert all(sae["recipe"]["k"] > 0 and sae["seed"] is not None for sae in found["saes"].values())


def test_a_lossless_codec_changes_nothing_and_a_lossy_one_does(found):
    for name, effect in found["codecs"].items():
        lossy = name in LOSSY
        assert (effect["relative_error"] > 0) == lossy
        for figures in effect["saes"].values():
            assert (figures["explained_variance"]["value"] < 0) == lossy
            assert (figures["loss_recovered"]["value"] != 0) == lossy


def test_uniform_keeps_what_it_was_made_for(found):
    uniform = found["codecs"]["uniform"]
    assert uniform["ratio"] >= 3.5
    # an effect on the explained variance is one on the unexplained one, with the other sign
    assert all(figures["explained_variance"]["value"] >= -0.002 for figures in uniform["saes"].values())


@pytest.mark.parametrize("codec", LOSSY)
def test_a_sentence_has_the_files_numbers(found, codec):
    sentences = effect_on_saes(codec)
    assert len(sentences) == len(found["saes"])
    for sentence, (name, figures) in zip(sentences, found["codecs"][codec]["saes"].items(), strict=True):
        assert f"SAE {name} (k = {found['saes'][name]['recipe']['k']}," in sentence
        for figure, title in (
            ("explained_variance", "explained variance"),
            ("loss_recovered", "loss recovered"),
        ):
            said = re.search(rf"{title} (\S+) \[(\S+), (\S+)\]", sentence)
            assert said is not None, sentence
            expected = [figures[figure][end] for end in ("value", "low", "high")]
            assert [float(number) for number in said.groups()] == pytest.approx(expected, abs=5.1e-5)


def test_an_unmeasured_codec_has_no_sentence():
    assert effect_on_saes("raw") == ()


def test_the_card_of_a_lossy_copy_quotes_it_and_that_of_another_does_not(make_store, tmp_path):
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    store = make_store(rows, [10, 40, 25, 25] * 10)
    for codec, is_quoted in (("uniform", True), ("int8", True), ("lossless", False)):
        copy_store(store.path, tmp_path / codec, codec=codec)
        card = write_card(tmp_path / codec)
        assert all((sentence in card) == is_quoted for sentence in effect_on_saes(codec)), card
    assert "explained variance" not in write_card(store)
