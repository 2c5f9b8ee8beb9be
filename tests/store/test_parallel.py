"""Dask clusters leave each other alone, the loss of one is one line, and what is summed does not depend on them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from dask.distributed import Future

from tcsae.store import StoreWriter, parallel
from tcsae.store.errors import ConfigError, TcsaeError, WorkersLost
from tcsae.store.parallel import HERE, Pool, map_tasks, task_pool
from tcsae.tests.clusters import DaskCluster, dask_cluster
from tcsae.tests.fixtures import hashes


def test_two_clusters_at_once_do_not_clash():
    outer = map_tasks(abs, [-1, -2, -3], workers=2)
    found = dict([next(outer)])
    # warnings are errors in these tests, such as Dask's about a port that is taken
    assert dict(map_tasks(abs, [-4, -5], workers=2)) == {-4: 4, -5: 5}
    assert found | dict(outer) == {-1: 1, -2: 2, -3: 3}


class LastFirst(Pool):
    """A pool whose results come the other way round."""

    def _numbered(self, function, items):
        return reversed(list(super()._numbered(function, items)))


def test_results_that_come_early_are_held_back():
    assert list(LastFirst().map(abs, [-3, 1, -2])) == [(-2, 2), (1, 1), (-3, 3)]
    assert list(LastFirst().map_in_order(abs, [-3, 1, -2])) == [3, 1, 2]


def test_a_store_finished_by_workers_has_the_bytes_of_one_finished_here(
    make_store, make_layout, make_provenance, tmp_path
):
    lengths, rows = [100] * 40, torch.randn(4000, 16, generator=torch.Generator().manual_seed(8))
    alone = make_store(rows, lengths, hooks=("a", "b"))
    made = make_provenance(hooks=("a", "b"))
    with StoreWriter.create(tmp_path / "shared.zarr", make_layout(lengths, 25), made) as writer:
        for chunk in range(writer.n_chunks):
            start, stop = writer.rows_of(chunk)
            for hook in made.hooks:
                writer.write(hook, chunk, rows[start:stop])
        with task_pool(workers=2) as pool:
            writer.finish(pool)
    assert hashes(tmp_path / "shared.zarr") == hashes(alone.path)


def test_one_worker_is_this_process():
    with task_pool(workers=1) as pool:
        assert pool is HERE
    assert list(HERE.map_in_order(abs, [-2, 1])) == [2, 1]


# A cluster of other processes ---------------------------------------------------------------------------


def test_more_tasks_than_are_with_the_scheduler_at_once_all_come_back(tmp_path: Path):
    with dask_cluster(tmp_path, nanny=False) as cluster:
        n = 5 * parallel.TASKS_AHEAD
        assert dict(map_tasks(abs, range(-n, 0), scheduler=cluster.address)) == {
            -i: i for i in range(1, n + 1)
        }


@pytest.mark.slow
@pytest.mark.parametrize("what", ["worker", "scheduler"])
def test_the_loss_of_the_last_worker_or_of_the_scheduler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    monkeypatch.setattr(parallel, "LOOK_SECONDS", 0.2)
    with dask_cluster(tmp_path, nanny=False) as cluster:
        found = map_tasks(time.sleep, [0.01, 600.0], scheduler=cluster.address)
        assert next(found) == (0.01, None)
        monkeypatch.setattr(parallel, "WORKER_SECONDS", 1)
        (cluster.scheduler if what == "scheduler" else cluster.workers()[0]).kill()
        message = (
            "got no connection any more; start one and run again"
            if what == "scheduler"
            else "expected at least one living worker, got none for 1 s"
        )
        with pytest.raises(WorkersLost, match=message) as caught:
            next(found)
        assert str(caught.value).startswith(f"scheduler {cluster.address}: ")
        assert "\n" not in str(caught.value)


def lose_the_scheduler(cluster: DaskCluster, future: Future) -> None:
    """Kill it, and wait until the client has seen it."""
    cluster.scheduler.kill()
    until = time.monotonic() + 60
    while not future.cancelled():
        assert time.monotonic() < until
        time.sleep(0.01)


def lose_the_scheduler_while_it_is_asked(cluster: DaskCluster, future: Future) -> None:
    """Let it take the question without answering, and kill it then."""
    cluster.scheduler.suspend()
    Timer(1, cluster.scheduler.kill).start()


def lose_the_worker(cluster: DaskCluster, future: Future) -> None:
    """Kill the only one, which holds the result."""
    cluster.workers()[0].kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lose", "patience", "message"),
    [
        (lose_the_scheduler, 60, "got no connection any more; start one and run again"),
        (lose_the_scheduler_while_it_is_asked, 60, "got no connection any more; start one and run again"),
        (lose_the_worker, 5, "expected at least one living worker, got none for 5 s"),
    ],
    ids=["scheduler", "scheduler, asked for the result", "worker"],
)
def test_a_loss_between_the_end_of_a_task_and_the_arrival_of_its_result_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[DaskCluster, Future], None],
    patience: int,
    message: str,
):
    finished = parallel._finished

    def finished_then_lost(*looked_at: Any) -> set[Future]:
        (future,) = found = finished(*looked_at)
        assert future.status == "finished"
        monkeypatch.setattr(parallel, "WORKER_SECONDS", patience)
        lose(cluster, future)
        return found

    monkeypatch.setattr(parallel, "_finished", finished_then_lost)
    with dask_cluster(tmp_path, nanny=False) as cluster:
        with pytest.raises(WorkersLost, match=message) as caught:
            list(map_tasks(abs, [-1], scheduler=cluster.address))
        assert str(caught.value).startswith(f"scheduler {cluster.address}: ")
        assert "\n" not in str(caught.value)
    del caught
    gc.collect()  # which is when asyncio tells of errors that nobody has asked for
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_what_a_task_raises_itself_is_no_loss(tmp_path: Path):
    with dask_cluster(tmp_path, nanny=False) as cluster:
        for error in (TimeoutError, FileNotFoundError, ConnectionResetError):
            with pytest.raises(error, match="^its own$"):
                list(map_tasks(exec, [f"raise {error.__name__}('its own')"], scheduler=cluster.address))


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_named(tmp_path: Path):
    once = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with (
        dask_cluster(tmp_path, nanny=False, environment=once) as cluster,
        pytest.raises(WorkersLost, match="^3: 1 workers died of it, the last one at tcp://127.0.0.1"),
    ):
        list(map_tasks(os._exit, [3], scheduler=cluster.address))


ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tcsae":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

ABSENT_ON_WORKERS = ABSENT.replace("sys.meta_path", 'if "worker" in sys.argv: sys.meta_path')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("everywhere", ConfigError, "expected the packages of this machine .* install the same tcsae there"),
        # it cannot read what the scheduler says to it, and leaves
        (
            "on the worker alone",
            WorkersLost,
            "got none for 5 s; see that they have the tcsae of this machine",
        ),
    ],
    ids=["everywhere", "on the worker alone"],
)
def test_a_cluster_without_the_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[TcsaeError], message: str
):
    script = tmp_path / "absent.py"
    script.write_text(ABSENT if where == "everywhere" else ABSENT_ON_WORKERS)
    with dask_cluster(tmp_path, nanny=False, preload=[script]) as cluster:
        monkeypatch.setattr(parallel, "WORKER_SECONDS", 5)
        with pytest.raises(error, match=message) as caught:
            list(map_tasks(TcsaeError, ["x"], scheduler=cluster.address))
    assert "\n" not in str(caught.value)
