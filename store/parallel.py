"""The same function over many items, here or on Dask workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int = 1,
    scheduler: str | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with ``function(item)``, as results come in.

    Parameters
    ----------
    function
        importable by its name, as are the items' types, since they are sent to other processes
    items
        hashable, each one task
    workers
        processes on this machine; 1 calls ``function`` in this one, in order
    scheduler
        address of a running Dask scheduler, such as ``tcp://host:8786``, whose workers see the same files;
        takes precedence over ``workers``

    A worker that dies is replaced and its tasks are run again. What ``function`` raises is raised here.
    """
    if workers <= 1 and scheduler is None:
        for item in items:
            yield item, function(item)
        return
    # imported here: a single process needs no Dask, and it takes a second to import
    from dask.distributed import Client, LocalCluster, as_completed

    if scheduler is not None:
        cluster = None
        client = Client(scheduler)
    else:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.ERROR,
        )
        client = Client(cluster)
        share = max(1, len(os.sched_getaffinity(0)) // workers)
        client.run(torch.set_num_threads, share)
    try:
        futures = {client.submit(function, item, pure=False): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        client.close()
        if cluster is not None:
            cluster.close()
