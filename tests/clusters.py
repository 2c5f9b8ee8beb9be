"""Dask clusters as a user's would be: a scheduler and its workers in processes of their own, on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import psutil

START_SECONDS = 60


@dataclass
class DaskCluster:
    """One scheduler and its workers."""

    address: str
    scheduler: psutil.Process
    starters: list[psutil.Process] = field(default_factory=list)
    """of the workers: with a nanny the nanny, else the worker itself"""

    def workers(self) -> list[psutil.Process]:
        """The processes that run tasks."""
        found = []
        for one in self.starters:
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                spawned = [child for child in one.children() if "spawn_main" in " ".join(child.cmdline())]
                found += spawned or [one]
        return found


@contextmanager
def dask_cluster(
    folder: Path,
    *,
    n_workers: int = 1,
    nanny: bool = True,
    preload: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[DaskCluster]:
    """Run a scheduler and workers for the block, all of them in ``folder``; ``preload`` scripts run in each."""
    known = folder / "scheduler.json"
    more = [word for script in preload for word in ("--preload", str(script))]
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> psutil.Process:
        with (folder / f"dask-{len(started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dask", *words, *more],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
                stdout=log,
                stderr=log,
            )
        started.append(process)
        return psutil.Process(process.pid)

    try:
        here = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
        scheduler = start("scheduler", *here, "--port", "0", "--scheduler-file", str(known))
        cluster = DaskCluster(_address(known, started[0]), scheduler)
        for _ in range(n_workers):
            cluster.starters.append(
                start(
                    "worker",
                    cluster.address,
                    *here,
                    "--nanny" if nanny else "--no-nanny",
                    *("--nthreads", "1", "--memory-limit", "0", "--local-directory", str(folder)),
                )
            )
        yield cluster
    finally:
        below = [child for p in started if p.poll() is None for child in psutil.Process(p.pid).children(True)]
        for process in reversed(started):
            process.kill()
            process.wait(timeout=10)
        for child in below:
            if child.is_running():
                child.kill()
        psutil.wait_procs(below, timeout=10)


def holding(folder: Path, module: str, function: str) -> Path:
    """A script for workers in ``folder``: the function makes the file ``begun`` there and waits for a file ``go``."""
    script = folder / "holding.py"
    script.write_text(
        f"""
import time
from pathlib import Path
import {module} as module

def holding(whole):
    def held(*args, **options):
        Path("begun").touch()
        while not Path("go").exists():
            time.sleep(0.01)
        return whole(*args, **options)
    return held

if module.{function}.__name__ != "held":  # Dask runs this twice
    module.{function} = holding(module.{function})
"""
    )
    return script


@contextmanager
def ctrl_c_while_held(folder: Path) -> Iterator[None]:
    """Interrupt the block, as Ctrl-C would, once a function of `holding` has begun.

    It is let go only when the block has ended; a block that waits for it fails.
    """
    go, ended, handler = folder / "go", Event(), signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not (folder / "begun").exists():
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)
        if not ended.wait(START_SECONDS):
            go.touch()

    interrupter = Thread(target=interrupt)
    interrupter.start()
    try:
        yield
    finally:
        ended.set()
        interrupter.join()
        signal.signal(signal.SIGINT, handler)
        assert not go.exists(), "Ctrl-C waited for the task that was running"
        go.touch()


def asked_of_workers(cluster: DaskCluster, question: str) -> list[object]:
    """What each worker answers to a Python expression."""
    from dask.distributed import Client

    with Client(cluster.address) as client:
        return list(client.run(eval, question).values())


def objects_of(type_name: str) -> str:
    """The question how many objects of a type there are, those in cycles that nothing leads to excepted."""
    listed = "__import__('gc').collect() * [] or __import__('gc').get_objects()"
    return f"sum(type(one).__name__ == {type_name!r} for one in {listed})"


def until_workers_say(cluster: DaskCluster, question: str, answer: object) -> None:
    """Wait until all workers answer so."""
    until = time.monotonic() + START_SECONDS
    while asked_of_workers(cluster, question) != [answer] * len(cluster.starters):
        assert time.monotonic() < until, question
        time.sleep(0.1)


def _address(known: Path, scheduler: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and scheduler.poll() is None:
        try:
            return str(json.loads(known.read_text())["address"])
        except (FileNotFoundError, ValueError):  # not there, or half-written
            time.sleep(0.05)
    raise RuntimeError(f"no Dask scheduler within {START_SECONDS} s")
