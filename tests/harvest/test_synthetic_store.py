"""A synthetic store keeps harvest's promises, and its truth survives what happens to stores."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from tcsae.harvest import HarvestConfig, dry_run, harvest
from tcsae.harvest.synthetic import truth_codes, truth_of_store
from tcsae.store import ActivationStore
from tcsae.store.copy import copy_store
from tcsae.store.errors import ConfigError, DiskFull, StoreCorrupt, StoreMismatch
from tcsae.store.verify import verify
from tcsae.store.writer import StoreWriter
from tcsae.tests.fixtures import hashes
from tcsae.tests.store.damage import edit_root, flip

CORPUS = "synthetic:features=60,d_model=24,documents=30,length=50,topics=3,coherence=0.8"


@pytest.fixture(scope="session")
def synthetic_config(tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    """Thirty documents of fifty rows in contexts of 32, in chunks that cut documents in two."""
    path = tmp_path_factory.mktemp("synthetic") / "reference.zarr"
    return HarvestConfig(store=path, corpus=CORPUS, context_length=32, dtype="float32", rows_per_chunk=320)


@pytest.fixture(scope="session")
def synthetic(synthetic_config: HarvestConfig) -> ActivationStore:
    """That store, which no test changes."""
    return ActivationStore.open(harvest(synthetic_config).path)


@pytest.fixture
def copy(synthetic: ActivationStore, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    return Path(shutil.copytree(synthetic.path, tmp_path / "copy.zarr"))


def test_rows_are_those_of_the_truth(synthetic):
    source = truth_of_store(synthetic)
    for document in (0, 6, 29):
        codes = truth_codes(synthetic, source, document)
        np.testing.assert_array_equal(
            synthetic.document(document).numpy(), source.activations(document, codes)
        )


def test_documents_have_topics_sources_contexts_and_a_split(synthetic):
    documents = synthetic.documents.to_pydict()
    assert set(documents["topic"]) == {"topic-0", "topic-1", "topic-2"}
    numbers = [int(topic[-1]) for topic in documents["topic"]]
    assert documents["source"] == [f"source-{number % 2}" for number in numbers]
    assert set(documents["split"]) == {"train", "test"}
    assert np.diff(synthetic.context_offsets).tolist() == [32, 18] * 30
    made = synthetic.provenance
    assert (made.model, made.hooks, made.bos_token_id, made.vocab_size) == (
        "synthetic",
        ("synthetic",),
        None,
        31,
    )
    assert verify(synthetic.path).is_good


def test_a_store_interrupted_anywhere_is_completed_to_the_same_bytes(
    synthetic, synthetic_config, tmp_path, monkeypatch
):
    mine = replace(synthetic_config, store=tmp_path / "s.zarr")
    write = StoreWriter.write

    def full(self, hook, chunk, rows):
        if chunk == 2:
            raise DiskFull("no more")
        write(self, hook, chunk, rows)

    monkeypatch.setattr(StoreWriter, "write", full)
    with pytest.raises(DiskFull):
        harvest(mine)
    monkeypatch.undo()
    done = harvest(replace(mine, resume=True))
    assert 0 < done.computed_chunks < done.chunks == 5
    assert hashes(mine.store) == hashes(synthetic.path)
    assert harvest(replace(mine, resume=True)).computed_chunks == 0


def test_rows_do_not_depend_on_where_chunks_begin(synthetic, synthetic_config, tmp_path):
    other = harvest(replace(synthetic_config, store=tmp_path / "s.zarr", rows_per_chunk=1000))
    found = ActivationStore.open(other.path)
    assert found.rows(0, 1500).equal(synthetic.rows(0, 1500))


def test_another_corpus_is_refused_on_resuming_and_so_is_another_rounding(copy, synthetic_config):
    changed = replace(synthetic_config, store=copy, resume=True, corpus=f"{CORPUS},seed=3")
    for refused in (dry_run, harvest):
        with pytest.raises(StoreMismatch, match="other parameters: seed: begun with 0, now 3; resume"):
            refused(changed)
    next((copy / "activations" / "synthetic" / "c").iterdir()).joinpath("0").unlink()
    edit_root(copy, first_batch_sha256="0" * 64)
    for refused in (dry_run, harvest):
        with pytest.raises(StoreMismatch, match="begun on a machine that rounds differently"):
            refused(replace(synthetic_config, store=copy, resume=True))


def test_a_dry_run_of_a_resume_draws_no_plan_and_counts_what_is_missing(copy, synthetic_config, monkeypatch):
    mine = replace(synthetic_config, store=copy, resume=True)
    (copy / "activations" / "synthetic" / "c" / "3" / "0").unlink()
    monkeypatch.setattr("tcsae.harvest.dryrun.synthetic_plan", None)
    found = dry_run(mine)
    assert (found.rows, found.chunks, found.missing_chunks) == (1500, 5, 1)
    assert found.seconds * found.tokens_per_second == pytest.approx(320)
    assert harvest(mine).computed_chunks == 1


def test_a_dry_run_says_what_would_be_and_writes_nothing(synthetic_config, tmp_path):
    found = dry_run(replace(synthetic_config, store=tmp_path / "s.zarr", max_tokens=1234))
    assert (found.rows, found.documents, found.contexts, found.chunks) == (1200, 24, 48, 4)
    assert (found.hooks, found.d_model, found.total_bytes) == (("synthetic",), 24, 4 * (320 * 24 * 4 + 4))
    assert found.seconds > 0
    assert not list(tmp_path.iterdir())


def test_a_bound_below_one_document_is_refused(synthetic_config, tmp_path):
    with pytest.raises(
        ConfigError, match="max_tokens: expected at least the 50 tokens of a document, got 49"
    ):
        harvest(replace(synthetic_config, store=tmp_path / "s.zarr", max_tokens=49))


@pytest.mark.parametrize(
    "changes", [{"hooks": ("a",)}, {"model": "smollm2"}, {"precision": "bfloat16"}, {"workers": 2}]
)
def test_what_only_a_model_could_do_is_refused(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}: expected none with a synthetic corpus"):
        HarvestConfig(store=Path("s"), corpus="synthetic", **changes)


# The truth on disk


def test_any_zarr_reader_finds_the_dictionary(synthetic):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)  # documents.parquet is not zarr's
        truth = zarr.open_group(synthetic.path, mode="r")["truth"]
    ours = synthetic.truth()
    assert {name for name, _ in truth.arrays()} == {
        *("directions", "mean", "kind", "rate", "run_length", "hold", "topic"),
    }
    for name, array in truth.arrays():
        np.testing.assert_array_equal(array[:], getattr(ours, name))
    assert truth["kind"].attrs["names"] == ["slow", "medium", "fast"]
    assert [int(ours.of_kind(kind).sum()) for kind in ("slow", "medium", "fast")] == [12, 18, 30]


def test_a_whole_copy_keeps_every_byte_and_a_part_keeps_the_truth_of_its_rows(synthetic, tmp_path):
    copy_store(synthetic.path, tmp_path / "whole")
    assert hashes(tmp_path / "whole") == hashes(synthetic.path)
    copy_store(synthetic.path, tmp_path / "part", documents=(5, 9), codec="lossless")
    part = ActivationStore.open(tmp_path / "part")
    assert verify(part.path).is_good
    np.testing.assert_array_equal(part.truth().directions, synthetic.truth().directions)
    source = truth_of_store(part)
    codes = truth_codes(part, source, 1)
    np.testing.assert_array_equal(part.document(1).numpy(), source.activations(6, codes))


def test_a_store_at_a_url_brings_its_truth(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
    copy_store(synthetic.path, "memory://bucket/synthetic.zarr")
    there = ActivationStore.open("memory://bucket/synthetic.zarr")
    np.testing.assert_array_equal(there.truth().rate, synthetic.truth().rate)


def test_a_models_store_has_no_truth(make_store, tmp_path):
    import torch

    store = make_store(torch.zeros(20, 4), [20])
    assert store.truth() is None
    with pytest.raises(StoreMismatch, match="made by model made-by-hand, whose features nobody knows"):
        truth_of_store(store)


DAMAGE = [
    pytest.param(lambda s: flip(s / "truth/directions/c/0/0", 40), "truth/directions/c/0/0: SHA-256", id="a bit"),
    pytest.param(lambda s: (s / "truth/rate/c/0").unlink(), "truth/rate/c/0: chunk is missing", id="a lost file"),
    pytest.param(
        lambda s: shutil.copy(s / "truth/run_length/c/0", s / "truth/rate/c/0"),
        "truth/rate/c/0: SHA-256",
        id="another array's file, whole in itself",
    ),
    pytest.param(
        lambda s: (s / "truth/kind/zarr.json").write_text("{}"),
        "truth/kind/zarr.json: does not fit",
        id="metadata",
    ),
    pytest.param(
        lambda s: edit_root(s, truth={"features": 0, "generator": 1, "parameters": {}}),
        "truth: expected a number of features, at least 1",
        id="no features",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_verify_finds_planted_damage_of_the_truth(copy, damage, message):
    damage(copy)
    found = verify(copy).problems
    assert any(message in problem for problem in found), found


def test_a_damaged_dictionary_is_refused_where_it_is_read(copy):
    flip(copy / "truth" / "mean" / "c" / "0", 3)
    with pytest.raises(StoreCorrupt, match="truth/mean/c/0: SHA-256"):
        ActivationStore.open(copy).truth()


def test_tokens_that_the_truth_does_not_give_are_refused(copy):
    root = json.loads((copy / "zarr.json").read_text())["attributes"]
    parameters = root["truth"]["parameters"] | {"seed": 9}
    edit_root(copy, truth=root["truth"] | {"parameters": parameters})
    store = ActivationStore.open(copy)
    with pytest.raises(StoreMismatch, match="its tokens are not those that its truth gives"):
        truth_codes(store, truth_of_store(store), 0)
    edit_root(copy, truth=root["truth"] | {"generator": 99})
    with pytest.raises(StoreMismatch, match="expected generator 1, got 99"):
        truth_of_store(ActivationStore.open(copy))
