"""Dask clusters on one machine are not in each other's way."""

from __future__ import annotations

from tcsae.store.parallel import map_tasks


def test_two_clusters_at_once_do_not_clash():
    outer = map_tasks(abs, [-1, -2, -3], workers=2)
    found = dict([next(outer)])
    # warnings are errors in these tests, such as Dask's about a port that is taken
    assert dict(map_tasks(abs, [-4, -5], workers=2)) == {-4: 4, -5: 5}
    assert found | dict(outer) == {-1: 1, -2: 2, -3: 3}
