"""A harvest that is killed again and again until its store is there; test_kills.py runs this as a script.

One process imports the libraries, loads the model and forks a child for each harvest. A harvest in a child is
the whole of `harvest`, but for the loading of the model, which is in memory. Torch runs on one thread, so there
is no other that a fork would lose. For each kill a line is printed: the phase it fell in, and how many
half-written files it left.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tcsae.harvest import HarvestConfig, harvest, load_model, run
from tcsae.store.metadata import ROOT
from tcsae.tests.fixtures import HOOKS

LIMIT = 120.0
"""seconds after which a harvest counts as hanging"""


@dataclass(frozen=True)
class Child:
    """A harvest in a process of its own."""

    pid: int

    @classmethod
    def start(cls, config: HarvestConfig) -> Child:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                harvest(config)
                code = 0
            finally:
                os._exit(code)
        return cls(pid)

    def wait(self, is_time: Callable[[], bool]) -> bool:
        """Wait until ``is_time``; False if the harvest has ended before."""
        limit = time.monotonic() + LIMIT
        while not is_time():
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                if status:
                    sys.exit(f"a harvest ended with status {status}")
                return False
            if time.monotonic() > limit:
                self.kill()
                sys.exit("a harvest hangs")
            time.sleep(0.0002)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def chunk_files(store: Path) -> int:
    """Chunk files that are there."""
    return sum(1 for _ in store.glob("activations/*/c/*/0"))


def rehearse(config: HarvestConfig) -> tuple[float, float, float, int]:
    """Harvest without a kill: seconds until the plan is there, a chunk file, and the end; the files' number."""
    times = []
    child = Child.start(config)
    began = time.monotonic()
    child.wait((config.store / ROOT).exists)
    times.append(time.monotonic())
    n_files = 0

    def seen() -> bool:
        nonlocal n_files
        n = chunk_files(config.store)
        if n > n_files:
            n_files = n
            times.append(time.monotonic())
        return False

    child.wait(seen)
    return times[0] - began, (times[-1] - times[0]) / n_files, time.monotonic() - times[-1], n_files


def main() -> None:
    """Kill as often as asked in each phase, at a random moment of it, then let a harvest end."""
    folder, model, corpus, seed, *counts = sys.argv[1:]
    in_planning, in_chunks, in_finish = map(int, counts)
    torch.set_num_threads(1)
    loaded = load_model(model)
    run.load_model = lambda *_, **__: loaded
    config = HarvestConfig(
        store=Path(folder) / "whole.zarr",
        model=model,
        corpus=corpus,
        hooks=HOOKS,
        context_length=64,
        dtype="float32",
        rows_per_chunk=250,
        resume=True,
    )
    planning, a_file, finish, n_files = rehearse(config)
    config = replace(config, store=Path(folder) / "killed.zarr")
    generator = random.Random(int(seed))

    def attempt(is_time: Callable[[], bool], longest: float) -> None:
        child = Child.start(config)
        until = generator.uniform(0, longest)
        if not child.wait(is_time):
            return
        at = time.monotonic() + until
        if not child.wait(lambda: time.monotonic() >= at):
            return
        child.kill()
        there = chunk_files(config.store)
        phase = "finish" if there == n_files else "chunks" if (config.store / ROOT).exists() else "planning"
        n_partial = len(list(config.store.rglob("*.partial")))
        sys.stdout.write(f"{phase} {n_partial}\n")

    for _ in range(in_planning):
        attempt(lambda: True, planning)
    for _ in range(in_chunks):
        there = chunk_files(config.store)
        attempt(lambda there=there: chunk_files(config.store) > there, a_file)
    for _ in range(in_finish):
        attempt(lambda: chunk_files(config.store) == n_files, finish)
    Child.start(config).wait(lambda: False)


if __name__ == "__main__":
    main()
