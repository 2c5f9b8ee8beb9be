"""Parts of a temporal pass on Dask workers: the bits of one process, whoever counts and whoever dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from tcsae.evaluate import temporal_workers
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.temporal_encoders import SAEEncoder
from tcsae.evaluate.temporal_pass import (
    PART_TOKENS,
    calibrated,
    is_short,
    n_tokens_read,
    parts_of_text,
    temporal_sums,
    untold,
)
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.evaluate.temporal_workers import (
    SHARED,
    PartSums,
    PartTask,
    count_part,
    temporal_sums_on_workers,
)
from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError
from tcsae.store.kept import Kept
from tcsae.tests.clusters import (
    DaskCluster,
    ctrl_c_while_held,
    dask_cluster,
    holding,
    objects_of,
    until_workers_say,
)

from .small_runs import D_MODEL, D_SAE, HOOK, an_sae, run_of, same

StoreFactory = Callable[..., ActivationStore]

N_PARTS = 3


@pytest.fixture
def held_out(make_store: StoreFactory) -> HeldOut:
    """Text of three parts, too long for its codes to be kept; neighbours resemble each other."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(100, 600, size=int(PART_TOKENS * (N_PARTS - 0.5)) // 350).tolist()
    x = lfilter([1.0], [1.0, -0.6], generator.normal(size=(sum(lengths), D_MODEL)), axis=0)
    store = make_store(
        torch.from_numpy(x).float(), lengths, context_rows=50, dtype="float32", rows_per_chunk=2**14
    )
    found = HeldOut(store, HOOK, "all")
    assert len(parts_of_text(found)) == N_PARTS
    assert not is_short(found)
    return found


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporal_workers, "_kept", Kept())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """A scheduler and two workers in another folder, each of which its nanny starts again if it dies."""
    with dask_cluster(tmp_path_factory.mktemp("cluster"), n_workers=2) as found:
        yield found


class Counted(NamedTuple):
    """A pass on workers, and what it told of tokens that are done."""

    sums: TemporalSums
    done: list[int]


def on_workers(
    held_out: HeldOut,
    folder: Path,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    advance: Callable[[int], object] = untold,
) -> Counted:
    done: list[int] = []

    def told(n: int) -> None:
        done.append(n)
        advance(n)

    sums = temporal_sums_on_workers(
        SAEEncoder(an_sae()), held_out, folder, seed=0, workers=workers, scheduler=scheduler, advance=told
    )
    return Counted(sums, done)


def test_a_part_that_is_packed_and_sent_adds_the_same_bits(held_out: HeldOut) -> None:
    whole = temporal_sums(SAEEncoder(an_sae()), held_out, seed=0)
    total = TemporalSums.zeros(whole.n_units, D_SAE, whole.lags)
    total.add(PartSums.of(whole).unpacked(whole.n_units, total.cells))
    assert same(total, whole)


def test_processes_of_this_machine_give_the_bits_of_a_single_one(held_out: HeldOut, tmp_path: Path) -> None:
    alone = temporal_sums(SAEEncoder(an_sae()), held_out, seed=0)
    found = on_workers(held_out, tmp_path / "out", workers=2)
    assert same(found.sums, alone)
    assert sum(found.done) == n_tokens_read(held_out)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_worker_of_another_cluster_that_is_killed_midway_costs_no_bit(
    cluster: DaskCluster, held_out: HeldOut, tmp_path: Path
) -> None:
    alone = temporal_sums(SAEEncoder(an_sae()), held_out, seed=0)
    sample: list[int] = []
    calibrated(SAEEncoder(an_sae()), held_out, sample.append)
    n_told = 0
    killed = []

    def kill_one(_: int) -> None:
        nonlocal n_told
        n_told += 1
        if n_told == len(sample) + 1:  # the first part is there
            victim = cluster.workers()[0]
            victim.kill()
            killed.append(victim.pid)

    found = on_workers(held_out, tmp_path / "out", scheduler=cluster.address, advance=kill_one)
    assert len(killed) == 1
    assert same(found.sums, alone)
    assert sum(found.done) == n_tokens_read(held_out)


@pytest.mark.slow
def test_an_evaluation_on_a_scheduler_writes_the_figures_of_one_process(
    cluster: DaskCluster, held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no worker is
    store = ActivationStore.open(held_out.store.path.relative_to(tmp_path))
    wanted: dict[str, Any] = {"temporal_references": ("averaged",)}
    alone = run_of(tmp_path, store, out=Path("alone"), **wanted)
    shared = run_of(tmp_path, store, out=Path("shared"), scheduler=cluster.address, **wanted)
    assert [row.sae for row in shared.rows] == [row.sae for row in alone.rows]
    for ours, theirs in zip(shared.rows, alone.rows, strict=True):
        assert ours.estimates == theirs.estimates
        assert ours.estimates["excess_information_whole_lag8"].low is not None
    assert [one.estimates for one in shared.comparisons] == [one.estimates for one in alone.comparisons]
    for file in (tmp_path / "alone" / "features").iterdir():
        assert file.read_bytes() == (tmp_path / "shared" / "features" / file.name).read_bytes()


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_schedulers_workers_and_they_keep_nothing_after_it(
    held_out: HeldOut, tmp_path: Path
) -> None:
    script = holding(tmp_path, "tcsae.evaluate.temporal_workers", "codes_of")
    with dask_cluster(tmp_path, nanny=False, preload=[script]) as cluster:
        with pytest.raises(KeyboardInterrupt), ctrl_c_while_held(tmp_path):
            on_workers(held_out, tmp_path / "out", scheduler=cluster.address)
        kept = "__import__('tcsae.evaluate.temporal_workers', fromlist=['_'])._kept.is_empty"
        until_workers_say(cluster, kept, True)
        until_workers_say(cluster, objects_of("SAEEncoder"), 0)
        again = on_workers(held_out, tmp_path / "out", scheduler=cluster.address)
    assert same(again.sums, temporal_sums(SAEEncoder(an_sae()), held_out, seed=0))


def test_a_scheduler_that_does_not_answer_is_refused_before_anything_is_measured(
    held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcsae.store.parallel.ANSWER_SECONDS", 0.2)
    with pytest.raises(ConfigError, match="got 'tcp://127.0.0.1:9': none answers there") as caught:
        run_of(tmp_path, held_out.store, scheduler="tcp://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_outlived_one_evaluation_takes_the_next_ones_encoder(
    held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"

    def first_part(encoder: SAEEncoder) -> PartSums:
        thirds, _ = calibrated(encoder, held_out, untold)
        with temporal_workers._shared(folder, encoder, thirds) as shared:
            return count_part(PartTask(shared, str(held_out.store.path), HOOK, "all", 0, 0))

    first_part(SAEEncoder(an_sae()))  # nobody tells this process, as a worker, to release it
    other = SAEEncoder(an_sae(b_enc=torch.full((D_SAE,), 0.3)))
    after = first_part(other)
    monkeypatch.setattr(temporal_workers, "_kept", Kept())
    assert np.array_equal(after.values, first_part(other).values)


def test_what_a_killed_evaluation_left_is_removed_by_the_next(held_out: HeldOut, tmp_path: Path) -> None:
    left = tmp_path / f"{SHARED}left.pt"
    left.touch()
    encoder = SAEEncoder(an_sae())
    thirds, _ = calibrated(encoder, held_out, untold)
    with temporal_workers._shared(tmp_path, encoder, thirds) as shared:
        assert list(tmp_path.glob(f"{SHARED}*")) == [shared]
    assert not list(tmp_path.glob(f"{SHARED}*"))


def test_a_worker_that_does_not_see_the_files_says_which(held_out: HeldOut, tmp_path: Path) -> None:
    absent = tmp_path / "out" / f"{SHARED}0.pt"
    task = PartTask(absent, str(held_out.store.path), HOOK, "all", 0, 0)
    with pytest.raises(ConfigError, match=rf"does not find {absent}; use an evaluation folder") as caught:
        count_part(task)
    assert "\n" not in str(caught.value)
