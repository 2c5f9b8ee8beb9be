"""Peak memory of reading a store and of training on it, for a small and a large store, in one run.

python -P benchmarks/memory.py [--gigabytes 1,10] [--tokens 1000000] [--folder DIR]

Each store is read, and trained on, in a process of its own; training takes equally many steps on both. The figure to
look at is the peak of resident memory (VmHWM, what ru_maxrss says too): it counts the pages of mapped files, which the
kernel could take back, since those count for batch systems and for Dask's limits. The anonymous part of it, which only
swapping could take away, is sampled every few milliseconds. Stores are random rows of 512 float16 in a temporary folder
(11 GB by default) that is removed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tcsae.benchmarks.made import HOOK, even_layout, provenance
from tcsae.benchmarks.store import CHUNK, file_system
from tcsae.store import ActivationStore, StoreWriter

D_MODEL = 512
BATCH = 4096
WINDOWS = 20_000
SETTINGS = ("expansion=0.25", "k=8", "aux_k=16", "batch_tokens=4096")
"""of a small SAE: what grows with the store is looked for, not what grows with the SAE"""


class Peak(NamedTuple):
    """Most memory that a process had at once, in bytes."""

    resident: int
    """everything, pages of mapped files included"""
    anonymous: int
    """what is in no file"""


def make(path: Path, gigabytes: float) -> None:
    """Write a store of so many bytes of activations."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(CHUNK, D_MODEL, generator=generator).half()
    n_rows = round(gigabytes * 1e9 / (2 * D_MODEL))
    made = provenance(D_MODEL, rows_per_chunk=CHUNK, vocab_size=50_000)
    tokens = np.random.default_rng(0).integers(1, made.vocab_size, n_rows, dtype=np.int32)
    with StoreWriter.create(path, even_layout(tokens), made) as writer:
        for chunk in range(writer.n_chunks):
            start, stop = writer.rows_of(chunk)
            writer.write(HOOK, chunk, rows[: stop - start])
        writer.finish()


def read(path: Path) -> None:
    """Copy every batch of the store in order, then random windows of 64 rows."""
    store = ActivationStore.open(path)
    out = torch.empty(BATCH, D_MODEL, dtype=torch.float16)
    for start in range(0, store.n_rows - BATCH + 1, BATCH):
        out.copy_(store.rows(start, start + BATCH))
    windows = store.windows(64, np.random.default_rng(0))
    for _, (_, window) in zip(range(WINDOWS), windows, strict=False):
        out[:64].copy_(window)


def peak(command: list[str]) -> Peak:
    """Run a command and watch its memory; its peak resident memory only grows, so the last look has it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = Peak(0, 0)
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        found = {name: value.split()[:1] for name, _, value in (line.partition(":") for line in lines)}
        if "VmHWM" in found:  # a process that has just ended has none
            now = Peak(1024 * int(*found["VmHWM"]), 1024 * int(*found["RssAnon"]))
            most = Peak(*map(max, most, now))
        time.sleep(0.005)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return most


def main() -> None:
    """Make the stores, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", default="1,10", help="sizes of the stores")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to train on")
    parser.add_argument("--recipe", default="tc16")
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read)
        return
    sizes = [float(size) for size in options.gigabytes.split(",")]
    peaks: dict[str, list[Peak]] = {"reading": [], "training": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(f"stores of {options.gigabytes} GB on {file_system(Path(folder))}")
        for size in sizes:
            store = Path(folder) / f"{size:g}.zarr"
            make(store, size)
            peaks["reading"].append(peak([sys.executable, "-P", __file__, "--read", str(store)]))
            training = [sys.executable, "-P", "-m", "tcsae.cli", "train", str(store), str(store) + ".run"]
            training += ["--recipe", options.recipe, "--tokens", str(options.tokens), "--device", "cpu"]
            training += [part for setting in SETTINGS for part in ("--set", setting)]
            peaks["training"].append(peak(training))
    for name, found in peaks.items():
        print(f"\n{name}, peak memory, MB")
        for field in Peak._fields:
            values = [getattr(p, field) / 1e6 for p in found]
            shown = "".join(f"{size:8g} GB: {value:7.0f}" for size, value in zip(sizes, values, strict=True))
            print(f"  {field:<12}{shown}   growth {values[-1] / values[0] - 1:7.1%}")


if __name__ == "__main__":
    main()
