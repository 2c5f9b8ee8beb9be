"""What a run holds in memory, by what it is for, and how much of it each added arm takes."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tcsae.benchmarks.training.common import arms, training
from tcsae.store import ActivationStore
from tcsae.train.training import Training

SCRIPT = Path(__file__).parents[1] / "train.py"
ARMS = (1, 4)
STEPS = 10
"""until the allocator keeps as much as it will"""


def memory(store: Path, options: argparse.Namespace) -> None:
    """Print the table, each number of arms in a process of its own."""
    found = []
    for n in ARMS:
        command = [sys.executable, "-P", str(SCRIPT), "--memory-of", str(n), "--store", str(store)]
        for name in ("d_model", "features", "batch", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    few, many = found
    added = ARMS[1] - ARMS[0]
    print(
        f"\nmemory in MiB, D {options.d_model}, F {options.features}, B {options.batch}, after {STEPS} steps"
    )
    print(f"  {'':<66}{'one arm':>9}{f'{ARMS[1]} arms':>9}   an added arm")
    for name in few:
        one, all_of_them = few[name] / 2**20, many[name] / 2**20
        print(f"  {name:<66}{one:9.1f}{all_of_them:9.1f}{(all_of_them - one) / added:15.1f}")
    parameters = 2 * options.features * options.d_model + options.features + options.d_model
    per_arm = (many["process: largest so far"] - few["process: largest so far"]) / added
    print(
        f"memory per added arm: {per_arm / 2**20:,.0f} MiB at the processes' largest; its weights, gradients and both "
        f"moments are {16 * parameters / 2**20:,.0f} MiB, without the gradients {12 * parameters / 2**20:,.0f} MiB"
    )


def memory_of(path: Path, n: int, options: argparse.Namespace) -> None:
    """Print, as JSON, the bytes of each kind in this process, which steps ``n`` arms."""
    plain = arms(options)["BatchTopK"]
    before = _status("VmRSS")
    run = training(
        ActivationStore.open(path),
        options.batch,
        *(replace(plain, name=f"a{i}") for i in range(n)),
        precision="auto",
    )
    largest_gradients = [0]
    parameters = [parameter for arm in run.arms for parameter in arm.sae.parameters()]

    def look(*_: object) -> None:
        there = _bytes_of(p.grad for p in parameters if p.grad is not None)
        largest_gradients[0] = max(largest_gradients[0], there)

    for arm in run.arms:
        arm.optimizer.register_step_pre_hook(look)
    for _ in range(STEPS):
        run.step(detailed=False)
    peak, resident = _status("VmHWM"), _status("VmRSS")
    held = _held(run)
    of_steps = _allocated_in_a_step(run)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    lasting = _status("VmRSS")
    copies = options.features * options.d_model * 2 if run.around.dtype == torch.bfloat16 else 0
    found = held | {
        "within a step: gradients, of the arms that have some": largest_gradients[0],
        "within a step: the encoder in bfloat16, for one product": copies,
        "within a step: everything that it allocates, at its highest": of_steps,
        "process: before the run is made (libraries)": before,
        "process: run's tensors, and Python's objects, after a step": lasting - before,
        "process: freed memory that malloc keeps, after a step": resident - lasting,
        "process: largest so far": peak,
    }
    print(json.dumps(found))


def _held(run: Training) -> dict[str, int]:
    """Bytes of the tensors that are there between two steps, by what they are for."""
    parameters = [parameter for arm in run.arms for parameter in arm.sae.parameters()]
    moments = [
        value for arm in run.arms for state in arm.optimizer.state.values() for value in state.values()
    ]
    found = {
        "weights": _bytes_of(parameters),
        "both moments": _bytes_of(moments),
        "gradients between steps": _bytes_of(p.grad for p in parameters if p.grad is not None),
        "dead counters, thresholds and averages": _bytes_of(
            tensor for arm in run.arms for tensor in (*arm.sae.buffers(), *arm.own_tensors().values())
        ),
        "pre-activations [B, F], one buffer": _bytes_of([run.around.buffer]),
        "ring": _bytes_of(run.ring.state_dict().values()),
    }
    found["batches, as stored twice and normalised; other tensors"] = _bytes_of(_all_tensors()) - sum(
        found.values()
    )
    return found


def _all_tensors() -> list[Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        # some of what is asked for its class is a deprecated module that says so
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the tensors' storages, each counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _allocated_in_a_step(run: Training) -> int:
    """The most bytes of tensors that a step has beyond what was there before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run.step(detailed=False)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    more = most = 0
    for _, change in changes:
        more += change
        most = max(most, more)
    return most


def _status(name: str) -> int:
    """Bytes that Linux says of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
