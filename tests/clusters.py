"""Dask clusters as a user's would be: a scheduler and its workers in processes of their own, on a free port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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


def _address(known: Path, scheduler: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and scheduler.poll() is None:
        try:
            return str(json.loads(known.read_text())["address"])
        except (FileNotFoundError, ValueError):  # not there, or half-written
            time.sleep(0.05)
    raise RuntimeError(f"no Dask scheduler within {START_SECONDS} s")
