"""The same function over many items, here or on Dask workers."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch

from tcsae.store.errors import ConfigError, WorkersLost

if TYPE_CHECKING:
    from dask.distributed import Client, Future

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

ANSWER_SECONDS = 10
"""how long a scheduler may take to answer"""

WORKER_SECONDS = 60
"""how long a scheduler may be without any worker, at first and later"""

LOOK_SECONDS = 1
"""how often it is looked whether there are workers still, while none of them has a result"""

_NO_CONNECTION = (
    "{}: expected it to be there until the end, got no connection any more; start one and run again"
)

_NO_WORKER = (
    "{}: expected at least one living worker, got none for {} s; see that they have the tcsae of this machine, use "
    "fewer if memory ran out, and start some and run again"
)

UNREADABLE = "deserialization of the task graph"
"""In Dask's message where a scheduler lacks the packages of a task."""

TASKS_AHEAD = 4
"""Tasks that are with the scheduler for each thread that can run one: enough that none waits, few enough that
a hundred thousand chunks are not all described to it at once."""


class Pool:
    """Where tasks run: in this process, one after the other, or on the workers of a Dask cluster.

    Made by `task_pool`. ``function`` must be importable by its name, as must the items' types, since they are sent
    to other processes; a scheduler's workers may call it in several threads at once. A worker that dies is replaced
    and its tasks are run again. What ``function`` raises is raised here; so is `WorkersLost` if one task's worker has
    died four times or all workers or the scheduler are gone, and `ConfigError` if the workers lack a package.
    """

    def __init__(self, client: Client | None = None, where: str = "") -> None:
        self._client = client
        self._where = where

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item with ``function(item)``, as results come in."""
        for number, result in self._numbered(function, items):
            yield items[number], result

    def map_in_order(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield ``function(item)`` in the items' order; results that come early are held back.

        What is added up from them is then the same bits on any number of workers.
        """
        early: dict[int, Result] = {}
        following = 0
        for number, result in self._numbered(function, items):
            early[number] = result
            while following in early:
                yield early.pop(following)
                following += 1

    def _numbered(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        if self._client is None:
            yield from enumerate(map(function, items))
            return
        # imported here: a single process needs no Dask, and it takes a second to import
        from concurrent.futures import CancelledError

        from dask.distributed import KilledWorker

        client = self._client
        todo = iter(enumerate(items))
        running: dict[Future, int] = {}

        def submit(n: int) -> None:
            running.update(
                {client.submit(function, item, pure=False): number for number, item in islice(todo, n)}
            )

        submit(max(1, TASKS_AHEAD * sum(client.nthreads().values())))
        while running:
            for future in _finished(client, running, self._where):
                number = running.pop(future)
                try:
                    result = future.result(timeout=WORKER_SECONDS)
                except (OSError, CancelledError) as error:
                    if future.status == "error":  # the function's own
                        raise
                    raise WorkersLost(
                        _NO_WORKER.format(self._where, WORKER_SECONDS)
                        if isinstance(error, TimeoutError)
                        else _NO_CONNECTION.format(self._where)
                    ) from error
                except KilledWorker as error:
                    raise WorkersLost(
                        f"{items[number]}: {error.allowed_failures + 1} workers died of it, the last one at "
                        f"{error.last_worker.address}; if memory ran out, run again with fewer workers"
                    ) from error
                except (ModuleNotFoundError, RuntimeError) as error:
                    if isinstance(error, RuntimeError) and UNREADABLE not in str(error):
                        raise
                    raise ConfigError(
                        f"{self._where}: expected the packages of this machine on the scheduler and every worker, got "
                        f"others ({str(error).splitlines()[0]}); install the same tcsae there"
                    ) from error
                submit(1)
                yield number, result


HERE = Pool()
"""This process."""


@contextmanager
def task_pool(
    *, workers: int = 1, scheduler: str | None = None, release: Callable[[], None] | None = None
) -> Iterator[Pool]:
    """The `Pool` of the workers asked for, for the block; those on this machine end with it.

    Parameters
    ----------
    workers
        processes on this machine, which share the threads that torch has here; 1: this process
    scheduler
        address of a running Dask scheduler, such as ``tcp://host:8786``, whose workers see the same files;
        takes precedence over ``workers``
    release
        called at the end in each worker of a scheduler, to drop what a function keeps in memory from one
        call to the next; workers on this machine end anyway. Tasks may still run then: it must not wait for them,
        since a worker answers nobody meanwhile

    Raises
    ------
    ConfigError
        no scheduler answers at the address, or it has no workers; less than one worker
    """
    if workers < 1:
        raise ConfigError(f"workers: expected at least 1, got {workers}")
    if workers == 1 and scheduler is None:
        yield HERE
        return
    where = "workers" if scheduler is None else f"scheduler {scheduler}"
    connect = _cluster(workers) if scheduler is None else _connection(scheduler, release)
    with _quiet_dask(), connect as client:
        # what waited within Dask for a result that is given up ends with an error that nobody asks for
        client.loop.asyncio_loop.set_exception_handler(lambda *_: None)
        yield Pool(client, where)


def map_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int = 1,
    scheduler: str | None = None,
    release: Callable[[], None] | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yield each item with ``function(item)`` from a pool of its own (see `Pool.map` and `task_pool`)."""
    with task_pool(workers=workers, scheduler=scheduler, release=release) as pool:
        yield from pool.map(function, items)


def check_scheduler(address: str) -> None:
    """Raise `ConfigError` if no Dask scheduler answers at ``address``, or one without workers."""
    with _quiet_dask(), _connection(address, None):
        pass


def _finished(client: Client, running: Iterable[Future], where: str) -> set[Future]:
    """Those of ``running`` that have a result or an error, at least one.

    Raises
    ------
    WorkersLost
        there will never be one
    """
    from concurrent.futures import CancelledError

    from dask.distributed import wait

    seen = time.monotonic()
    while True:
        try:
            return set(wait(list(running), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED").done)
        except CancelledError as error:
            raise WorkersLost(_NO_CONNECTION.format(where)) from error
        except TimeoutError:
            with suppress(OSError):  # one that is lost cancels what is running
                if client.nthreads():
                    seen = time.monotonic()
        if time.monotonic() - seen > WORKER_SECONDS:
            raise WorkersLost(_NO_WORKER.format(where, WORKER_SECONDS))


@contextmanager
def _cluster(workers: int) -> Iterator[Client]:
    """Processes on this machine, for the block."""
    import dask
    from dask.distributed import Client, LocalCluster

    threads = max(1, torch.get_num_threads() // workers)
    # Set before a worker starts, so that one which takes a dead one's place has them too.
    settings = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    with (
        _environment_restored(),
        dask.config.set({"distributed.nanny.pre-spawn-environ": settings}),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=":0",  # any free port: two clusters on a machine must not be in each other's way
            memory_limit=0,  # the system decides: at a share of the memory Dask would kill, restart and kill
            preload=__name__,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _connection(scheduler: str, release: Callable[[], None] | None) -> Iterator[Client]:
    """The workers of a scheduler that is there already, for the block."""
    from dask.distributed import Client

    expected = (
        f"scheduler: expected the address of a Dask scheduler, such as tcp://host:8786, got {scheduler!r}"
    )
    try:
        client = Client(scheduler, timeout=ANSWER_SECONDS)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{expected}: none answers there ({reason}); start one with `dask scheduler`"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError as error:
            raise ConfigError(f"{expected}, which has no workers; start some with `dask worker`") from error
        try:
            yield client
        finally:
            if release is not None and client.status == "running":
                try:
                    # what `Client.run` does, which waits for an answer for ever
                    client.sync(client._run, release, on_error="ignore", callback_timeout=ANSWER_SECONDS)
                except TimeoutError:
                    log.warning(
                        "%s: a worker has not let go after %d s and may still write; wait for it before you go on",
                        *(scheduler, ANSWER_SECONDS),
                    )
                except OSError:  # the scheduler has just gone
                    pass


def dask_setup(worker: object) -> None:  # noqa: ARG001  # Dask names the function and gives it the worker
    """Make a worker deaf to Ctrl-C, which a terminal sends to all processes: the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _quiet_dask() -> Iterator[None]:
    """Hide Dask's own log: a worker that died is no news to the user, since another does its work."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Undo what Dask does to this process's environment to hand it on to its workers."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
