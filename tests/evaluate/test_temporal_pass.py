"""The pass: which tokens are in it, in what pieces, here and on workers, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tcsae.evaluate import table
from tcsae.evaluate import temporal_pass as passes
from tcsae.evaluate.heldout import Block, HeldOut
from tcsae.evaluate.temporal_encoders import AveragedEncoder, SAEEncoder, moving_average
from tcsae.evaluate.temporal_pass import (
    codes_of,
    n_tokens_read,
    parts_of_text,
    temporal_sums,
)
from tcsae.evaluate.temporal_references import threshold_for
from tcsae.evaluate.temporal_sums import ONCE, TemporalSums
from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, RunError, TrainingCollapsed

from .sequences import by_name
from .slow_figures import Slow
from .small_runs import D_MODEL, D_SAE, HOOK, an_sae, run_of

StoreFactory = Callable[..., ActivationStore]


@pytest.fixture
def store(make_store: StoreFactory) -> ActivationStore:
    """Documents of 5 to 400 tokens in contexts of 50; neighbours resemble each other."""
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(5, 90, size=30).tolist(), 400, 60, 30]
    x = generator.normal(size=(sum(lengths), D_MODEL))
    for t in range(1, len(x)):
        x[t] += 0.6 * x[t - 1]
    return make_store(torch.from_numpy(x).float(), lengths, context_rows=50, dtype="float32")


@pytest.fixture
def held_out(store: ActivationStore) -> HeldOut:
    return HeldOut(store, HOOK, "all")


# Pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "block"), [(10**6, 10**6), (300, 100), (200, 40), (1, 1)])
def test_every_context_is_in_one_block_and_every_document_in_one_part(
    held_out: HeldOut, monkeypatch: pytest.MonkeyPatch, part: int, block: int
) -> None:
    monkeypatch.setattr(passes, "PART_TOKENS", part)
    monkeypatch.setattr(passes, "BLOCK_ROWS", block)
    parts = parts_of_text(held_out)
    contexts = [c for blocks in parts for one in blocks for c in one.tolist()]
    assert sorted(contexts) == list(range(len(held_out.contexts)))
    for document in range(held_out.n_documents):
        places = [
            (number, at)
            for number, blocks in enumerate(parts)
            for at, one in enumerate(blocks)
            if document in held_out.document_of_context[one]
        ]
        assert len({number for number, _ in places}) == 1
        # without gaps, else `Accumulator` would take it for complete too early
        first = places[0][1]
        assert [at for _, at in places] == list(range(first, first + len(places)))


def test_a_document_of_many_blocks_still_has_another_one_beside_it(
    held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "BLOCK_ROWS", 300)
    long = 30  # the document of 400 tokens, 8 contexts
    (blocks,) = parts_of_text(held_out)
    beside = [set(held_out.document_of_context[one].tolist()) for one in blocks]
    assert sum(long in documents for documents in beside) >= 2
    assert all(len(documents) > 1 for documents in beside)
    sums = temporal_sums(SAEEncoder(an_sae()), held_out, seed=0, lags=(1,))
    assert sums.n_pairs[long, 2, 0] > 0


def test_the_sums_do_not_depend_on_the_pieces_but_for_the_nulls(
    held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = temporal_sums(SAEEncoder(an_sae()), held_out, seed=0)
    monkeypatch.setattr(passes, "PART_TOKENS", 300)
    monkeypatch.setattr(passes, "BLOCK_ROWS", 100)
    pieces = temporal_sums(SAEEncoder(an_sae()), held_out, seed=0)
    assert pieces.values == pytest.approx(whole.values, rel=1e-6, abs=1e-6)
    assert np.array_equal(pieces.n, whole.n)
    for lag in range(6):
        assert np.array_equal(pieces.joint(0, lag), whole.joint(0, lag))


def test_counts_take_four_bytes_where_a_unit_has_more_tokens_than_fit_in_two(held_out: HeldOut) -> None:
    units = torch.arange(held_out.n_documents)
    assert passes.nothing_counted(held_out, units, D_SAE).cells.dtype == np.int16
    held_out.length = held_out.length.copy()
    held_out.length[0] += np.iinfo(np.int16).max
    assert passes.nothing_counted(held_out, units, D_SAE).cells.dtype == np.int32


def test_thirds_from_a_sample_are_near_those_of_the_text_and_progress_counts_both(
    held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    sae = SAEEncoder(an_sae())
    whole = temporal_sums(sae, held_out, seed=0, advance=done.append)
    assert sum(done) == held_out.n_tokens == n_tokens_read(held_out)
    monkeypatch.setattr(passes, "SAMPLE_TOKENS", 600)
    done.clear()
    sampled = temporal_sums(sae, held_out, seed=0, advance=done.append)
    assert sum(done) == n_tokens_read(held_out)
    assert held_out.n_tokens + 400 < n_tokens_read(held_out) < held_out.n_tokens + 800
    # who is on does not depend on the thirds, and neither does anything but the states
    of_states = [ONCE.index(name) for name in ("in_middle", "in_upper")]
    values = [np.delete(sums.values, of_states, axis=1) for sums in (sampled, whole)]
    assert values[0] == pytest.approx(values[1])
    on = sampled.joint(0, 0)[1:].sum(axis=(0, 1, 2, 3)), whole.joint(0, 0)[1:].sum(axis=(0, 1, 2, 3))
    assert on[0] == on[1]
    shares = [sums.joint(0, 0)[1:].sum(axis=(1, 2, 3)) for sums in (sampled, whole)]
    assert shares[0] / shares[0].sum() == pytest.approx(shares[1] / shares[1].sum(), abs=0.03)


@pytest.mark.parametrize(
    ("kept", "times"), [(passes.MAX_KEPT, 1), (2000, 2)], ids=["all codes are kept", "they are too many"]
)
def test_text_whose_codes_are_too_many_is_encoded_twice_and_every_figure_is_its_loops_definition(
    held_out: HeldOut, monkeypatch: pytest.MonkeyPatch, kept: int, times: int
) -> None:
    n_encoded = 0

    class Counting(SAEEncoder):
        def __call__(self, block: Block) -> torch.Tensor:
            nonlocal n_encoded
            n_encoded += len(block.x)
            return super().__call__(block)

    monkeypatch.setattr(passes, "MAX_KEPT", kept)
    monkeypatch.setattr(passes, "PART_TOKENS", 300)
    monkeypatch.setattr(passes, "BLOCK_ROWS", 100)
    encoder = Counting(an_sae(threshold=torch.full((D_SAE,), 0.1)))
    done: list[int] = []
    sums = temporal_sums(encoder, held_out, seed=0, lags=(1, 8), advance=done.append)
    assert n_encoded == times * held_out.n_tokens
    assert sum(done) == n_tokens_read(held_out) == held_out.n_tokens
    text = codes_of(encoder, held_out.block(np.arange(len(held_out.contexts))))
    assert len(text.value) > 2000
    found = by_name(sums)
    for feature in (0, 7, D_SAE - 1):
        slow = Slow(text, feature, list(range(held_out.n_documents)))
        for name in ("autocorrelation", "within_autocorrelation", "persistence", "information"):
            for lag in (1, 8):
                expected = getattr(slow, name)(lag)
                assert found[f"{name}_lag{lag}"][0, feature] == pytest.approx(expected, abs=1e-5), name
        for name in ("run_length", "smoothness", "total_variation"):
            assert found[name][0, feature] == pytest.approx(getattr(slow, name)(), rel=1e-5), name


def test_activations_that_are_not_finite_are_refused(held_out: HeldOut) -> None:
    sae = an_sae(b_enc=torch.full((D_SAE,), 3e38), W_enc=torch.full((D_MODEL, D_SAE), 3e38))
    block = held_out.block(np.arange(3))
    with pytest.raises(TrainingCollapsed, match="tc16-s0: .* NaN or infinite, the first in context 0"):
        codes_of(SAEEncoder(sae), block)


# From folder to folder ---------------------------------------------------------------------------------


def test_the_features_are_written_and_the_primary_endpoint_is_compared_in_pairs(
    tmp_path: Path, store: ActivationStore
) -> None:
    found = run_of(tmp_path, store)
    features = pq.read_table(found.out / "features" / "tc16-s0.parquet")
    assert features.num_rows == D_SAE
    value = {row.arm: {name: one.value for name, one in row.estimates.items()} for row in found.rows}
    (comparison,) = found.comparisons
    for name in (
        "excess_information_whole_lag8",
        "excess_information_H_lag8",
        "excess_information_best_lag8",
        "autocorrelation_H_lag8",
    ):
        expected = value["tc16"][name] - value["block"][name]
        assert comparison.estimates[f"{name}_difference"].value == pytest.approx(expected)
    name = "excess_information_H_lag8_against_best_difference"
    expected = value["tc16"]["excess_information_H_lag8"] - value["block"]["excess_information_best_lag8"]
    assert comparison.estimates[name].value == pytest.approx(expected)
    lines = table(found).splitlines()
    assert max(map(len, lines)) <= 120
    assert "xi8 H" in lines[0]


def test_a_table_of_features_that_is_gone_is_made_again_and_a_damaged_one_is_named(
    tmp_path: Path, store: ActivationStore
) -> None:
    path = run_of(tmp_path, store).out / "features" / "tc16-s0.parquet"
    before = pq.read_table(path)
    path.unlink()
    run_of(tmp_path, store)
    assert pq.read_table(path).equals(before)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"features/tc16-s0\.parquet: not a table that tcsae wrote"):
        run_of(tmp_path, store)


def test_reference_rows_stand_beside_the_saes_and_are_kept(tmp_path: Path, store: ActivationStore) -> None:
    found = run_of(tmp_path, store, temporal_references=("raw", "random", "averaged"))
    arms = [row.arm for row in found.rows]
    assert arms == ["block", "tc16", "reference: raw", "reference: random", "reference: averaged"]
    raw, averaged = found.rows[2], found.rows[4]
    # rho of x_t = 0.6 x_{t-1} + noise
    rho = raw.estimates["autocorrelation_whole_lag1"].value
    assert rho == pytest.approx(0.6, abs=0.05)
    persistence = raw.estimates["persistence_whole_lag8"]
    assert persistence.value is None
    assert (
        persistence.reason == "undefined, because a dimension of the activations has a sign and is never off"
    )
    first = found.rows[0].estimates["autocorrelation_whole_lag4"].value
    smoothed = averaged.estimates["autocorrelation_whole_lag4"].value
    assert smoothed is not None
    assert first is not None
    assert smoothed > first + 0.2
    assert [comparison.sae for comparison in found.comparisons] == ["tc16-s0"]
    files = sorted(found.out.glob("*/_reference-*"))
    assert len(files) == 6  # JSON and features
    before = [file.stat().st_mtime_ns for file in files]
    again = run_of(tmp_path, store, temporal_references=("raw", "random", "averaged"))
    assert [file.stat().st_mtime_ns for file in files] == before
    assert [row.estimates for row in again.rows] == [row.estimates for row in found.rows]


def test_a_reference_without_the_suite_or_of_another_name_is_refused(
    tmp_path: Path, store: ActivationStore
) -> None:
    with pytest.raises(
        ConfigError, match="temporal_references: expected suite temporal beside them, got core"
    ):
        run_of(tmp_path, store, suites=("core",), temporal_references=("raw",))
    with pytest.raises(ConfigError, match="workers: expected at least 1, got 0"):
        run_of(tmp_path, store, workers=0)


def test_thresholds_leave_as_many_features_on_as_asked(held_out: HeldOut) -> None:
    encoder = AveragedEncoder(an_sae())
    threshold = threshold_for(encoder, held_out, 2.5)
    codes = codes_of(AveragedEncoder(an_sae(), threshold), held_out.block(np.arange(len(held_out.contexts))))
    n_on = int(codes.counted.take(codes.row).sum())
    assert n_on / int(codes.counted.sum()) == pytest.approx(2.5, abs=0.01)
    assert threshold_for(encoder, held_out, 1000.0) == 0.0


def test_the_moving_average_starts_anew_in_every_context_and_forgets_at_its_rate() -> None:
    f = torch.tensor([[4.0], [0.0], [0.0], [2.0], [0.0]])
    found = moving_average(f, np.array([0, 1, 2, 0, 1]), 1 / np.log(2))[:, 0]
    assert found.tolist() == pytest.approx([2.0, 1.0, 0.5, 1.0, 0.5])


def test_an_interrupted_pass_keeps_what_is_finished(
    tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tcsae.evaluate import temporal_suite
    from tcsae.store.errors import Interrupted

    n_calls = 0

    def stop_second(*args: Any, **kwargs: Any) -> TemporalSums:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise KeyboardInterrupt
        return temporal_sums(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(temporal_suite, "temporal_sums", stop_second)
        with pytest.raises(Interrupted, match="run the same command again"):
            run_of(tmp_path, store)
    finished = tmp_path / "out" / "temporal" / "block-s0.json"
    before = finished.stat().st_mtime_ns
    assert not (tmp_path / "out" / "temporal" / "tc16-s0.json").exists()
    assert len(run_of(tmp_path, store).rows) == 2
    assert finished.stat().st_mtime_ns == before
