"""Tasks on Dask workers: no cluster is in another's way, and what is added up does not depend on who was first."""

from __future__ import annotations

import time

import torch

from tcsae.store import StoreWriter
from tcsae.store.parallel import HERE, map_tasks, task_pool
from tcsae.tests.fixtures import hashes


def late_if_even(number: int) -> int:
    time.sleep(0.05 * (number % 2 == 0))
    return number * number


def test_two_clusters_at_once_do_not_clash():
    outer = map_tasks(abs, [-1, -2, -3], workers=2)
    found = dict([next(outer)])
    # warnings are errors in these tests, such as Dask's about a port that is taken
    assert dict(map_tasks(abs, [-4, -5], workers=2)) == {-4: 4, -5: 5}
    assert found | dict(outer) == {-1: 1, -2: 2, -3: 3}


def test_results_come_in_the_items_order_and_statistics_are_the_same_bits_on_workers(
    make_store, make_layout, make_provenance, tmp_path
):
    # one cluster for both, since it takes seconds to start
    lengths, rows = [100] * 40, torch.randn(4000, 16, generator=torch.Generator().manual_seed(8))
    alone = make_store(rows, lengths, hooks=("a", "b"))
    with task_pool(workers=2) as pool:
        assert list(pool.map_in_order(late_if_even, range(8))) == [n * n for n in range(8)]
        made = make_provenance(hooks=("a", "b"))
        with StoreWriter.create(tmp_path / "shared.zarr", make_layout(lengths, 25), made) as writer:
            for chunk in range(writer.n_chunks):
                start, stop = writer.rows_of(chunk)
                for hook in made.hooks:
                    writer.write(hook, chunk, rows[start:stop])
            writer.finish(pool)
    assert hashes(tmp_path / "shared.zarr") == hashes(alone.path)


def test_one_worker_is_this_process():
    with task_pool(workers=1) as pool:
        assert pool is HERE
    assert list(HERE.map_in_order(abs, [-2, 1])) == [2, 1]
