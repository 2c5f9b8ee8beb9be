"""What loading costs where the store is larger, alone and beside steps that compute, and where its time goes.

The two stores have 8 numbers a row and an index as long as any store's of so many rows: 100 million rows of 512 are 102
GB. Whole steps are therefore those of an SAE of the benchmark's size whose batches are in memory, while the run's own
thread reads the batches of such a store as it would any.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tcsae.benchmarks.training.common import (
    Case,
    alternate,
    arms,
    loaded,
    loading,
    make_store,
    stepping,
    training,
)
from tcsae.benchmarks.training.phases import Phases
from tcsae.store import ActivationStore
from tcsae.store.mapped import HookChunks
from tcsae.train import ArmConfig
from tcsae.train.batches import Rows, WindowLoader
from tcsae.train.read_ahead import ReadAhead
from tcsae.train.training import Training
from tcsae.train.window_reader import WindowReader

SMALL_ROWS = 1_000_000
LOADS = 20
"""of each store in a round"""
STEPS = 12
"""whole steps beside each store in a round"""

READING = "the batch's place in the epoch, all else"
OUTERMOST = {
    READING: (WindowReader, "batch"),
    "main thread: waiting for the read": (ReadAhead, "take"),
    "main thread: normalising": (WindowLoader, "_rows"),
}
INNER = {
    "order of a new epoch": (WindowReader, "_load_epoch"),
    "windows: their contexts and first rows": (WindowReader, "_windows"),
    "rows: documents, positions, special tokens": (WindowReader, "_read"),
    "rows: in runs, by chunk": (ActivationStore, "gather"),
    "chunks: their paths, checks of identity": (HookChunks, "copy"),
    "chunks: open": (os, "open"),
    "chunks: fstat": (os, "fstat"),
    "chunks: preadv": (os, "preadv"),
    "chunks: close": (os, "close"),
    "token ids": (ActivationStore, "tokens_at"),
}


def stores_of_8(folder: Path, large_rows: int) -> dict[str, ActivationStore]:
    """Both stores by their number of rows.

    A chunk is checked when it is first read and never again, so that is no part of a step's cost and done here.
    """
    found = {}
    for n in (SMALL_ROWS, large_rows):
        store = make_store(folder / f"{n}.zarr", n, 8)
        store.gather(np.array([start for start, _ in store.chunk_rows()]))
        found[f"{n:,} rows"] = store
    return found


def growth(store: ActivationStore, both: Mapping[str, ActivationStore], options: argparse.Namespace) -> None:
    """Print what the larger store costs more, in each round and over all."""
    step = {
        "": stepping(training(store, options.batch, arms(options)["BatchTopK"], precision="auto", ring=False))
    }
    alone: dict[str, Case] = {name: loading(_of_8(of_8, options)) for name, of_8 in both.items()}
    beside: dict[str, Case] = {name: stepping(_beside(store, of_8, options)) for name, of_8 in both.items()}
    loads: dict[str, list[float]] = {name: [] for name in both}
    wholes: dict[str, list[float]] = {name: [] for name in both}
    share, longer = [], []
    for _ in range(options.rounds):
        (base,) = alternate(step, 3).values()
        taken, whole = alternate(alone, LOADS), alternate(beside, STEPS)
        for found, seconds in ((loads, taken), (wholes, whole)):
            for name, values in seconds.items():
                found[name].append(statistics.median(values))
        (small, large), (with_small, with_large) = taken.values(), whole.values()
        more = statistics.median(b - a for a, b in zip(small, large, strict=True))
        share.append(more / statistics.median(base))
        longer.append(statistics.median(b / a - 1 for a, b in zip(with_small, with_large, strict=True)))
    print(
        f"\ngrowth, {options.rounds} rounds, in brackets the rounds' least and most; bar: 5 % of a BatchTopK step"
    )
    print(f"  loading a step's data alone, 8 numbers a row: {_milliseconds(loads)}")
    print(f"  the difference is {_over_rounds(share)} of a BatchTopK step of D {options.d_model}")
    print(
        f"  BatchTopK steps of D {options.d_model} with their batch in memory while these are read: "
        f"{_milliseconds(wholes)}"
    )
    print(
        f"  beside the larger store they take {_over_rounds(longer)} longer ({STEPS} pairs of steps a round)"
    )


def loading_profile(
    store: ActivationStore, both: Mapping[str, ActivationStore], options: argparse.Namespace
) -> None:
    """Print where the time of loading goes, alone and beside steps that compute."""
    cases = {f"{name}, alone": loading(_of_8(of_8, options)) for name, of_8 in both.items()}
    cases |= {f"{name}, beside steps": stepping(_beside(store, of_8, options)) for name, of_8 in both.items()}
    n = {name: LOADS if name.endswith("alone") else STEPS for name in cases}
    phases = {name: Phases() for name in cases}
    for nth in range(options.rounds + 1):
        for name, case in cases.items():
            found = phases[name] if nth else Phases()  # the first round warms up
            with found.watching(OUTERMOST, INNER):
                for _ in range(n[name]):
                    case()
    print(
        f"\nloading {options.batch} tokens in windows, 8 numbers a row, {options.rounds} rounds; ms and calls for a "
        "batch that is read, each function's own time"
    )
    print(f"  {'':<46}" + "".join(f"{name.replace(' rows', ''):>27}" for name in cases))
    # What is read ahead is read again where loading is alone, so batches are counted, not steps.
    read = [phases[name].calls[READING] for name in cases]
    for label in (*INNER, *OUTERMOST):
        times = n.values() if label.startswith("main") else read
        of = [count * (options.rounds if label.startswith("main") else 1) for count in times]
        _line(
            label,
            [1e3 * phases[name].seconds[label] / count for name, count in zip(cases, of, strict=True)],
            [phases[name].calls[label] / count for name, count in zip(cases, of, strict=True)],
        )
    whole = [sum(phases[name].seconds[label] for label in (*INNER, READING)) for name in cases]
    _line(
        "all in the reading thread", [1e3 * total / count for total, count in zip(whole, read, strict=True)]
    )
    faults = [phases[name].faults[READING] / count for name, count in zip(cases, read, strict=True)]
    _line("page faults of the reading thread", faults)


def _line(label: str, values: Sequence[float], calls: Sequence[float] = ()) -> None:
    shown = [f"{count:5.1f} x" for count in calls] or [""] * len(values)
    print(f"  {label:<46}" + "".join(f"{v:19.3f}{c:>8}" for v, c in zip(values, shown, strict=True)))


def _of_8(store: ActivationStore, options: argparse.Namespace) -> Training:
    """A run of which nothing but the loader is wanted."""
    return training(store, options.batch, ArmConfig(name="a", k=2, block_share=0.0), ring=False)


def _beside(store: ActivationStore, of_8: ActivationStore, options: argparse.Namespace) -> Training:
    """A run of BatchTopK whose batches are in memory, and which reads and drops those of ``of_8``."""
    run = loaded(training(store, options.batch, arms(options)["BatchTopK"], precision="auto", ring=False))
    loader, held = _of_8(of_8, options).loader, run.loader.next

    def read() -> Rows:
        loader.next()
        return held()

    run.loader.next = read  # type: ignore[method-assign]  # for this measurement alone
    return run


def _milliseconds(found: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(
        f"{1e3 * statistics.median(v):.2f} ms [{1e3 * min(v):.2f} to {1e3 * max(v):.2f}] from {name}"
        for name, v in found.items()
    )


def _over_rounds(found: Sequence[float]) -> str:
    return f"{statistics.median(found):+.1%} [{min(found):+.1%} to {max(found):+.1%}]"
