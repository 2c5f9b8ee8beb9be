"""What the parts of benchmarks/train.py share: stores of random rows, our arms, runs of them, and taking turns."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tcsae.store import ActivationStore, Layout, Provenance, StoreWriter, split_of
from tcsae.store.layout import documents_table
from tcsae.train import ArmConfig, TrainConfig
from tcsae.train.batches import Rows
from tcsae.train.config import Precision
from tcsae.train.training import Training

HOOK = "blocks.0.hook_resid_post"
CHUNK = 2**17
CONTEXT = 127
K = 32
CPU = torch.device("cpu")
LOADED = 8
"""batches that are held in memory where loading is left out"""
Case = Callable[[], float]
"""seconds of one step"""


def make_store(path: Path, n_rows: int, d_model: int) -> ActivationStore:
    """Random rows in documents of four contexts of 127."""
    documents = np.unique(np.append(np.arange(0, n_rows, 4 * CONTEXT), n_rows))
    contexts = np.unique(np.append(np.arange(0, n_rows, CONTEXT), n_rows))
    ids = [str(i) for i in range(len(documents) - 1)]
    of_documents = {
        "id": ids,
        "source": ["benchmark"] * len(ids),
        "topic": ["none"] * len(ids),
        "split": [split_of(name) for name in ids],
        "n_tokens": np.diff(documents).tolist(),
        "sha256": [""] * len(ids),
    }
    tokens = np.random.default_rng(0).integers(1, 1000, n_rows).astype(np.int32)
    made = Provenance(
        model="benchmark",
        model_revision="",
        model_sha256="",
        tokenizer_sha256="",
        hooks=(HOOK,),
        d_model=d_model,
        context_length=CONTEXT + 1,
        bos_token_id=0,
        special_token_ids=(0,),
        vocab_size=1000,
        dtype="float16",
        precision="float32",
        rows_per_chunk=CHUNK,
        corpus="benchmark",
        corpus_sha256="",
        max_tokens=None,
        versions={},
        created="2026-01-01",
    )
    generator = torch.Generator().manual_seed(0)
    layout = Layout(tokens, documents, contexts, documents_table(of_documents))
    with StoreWriter.create(path, layout, made) as writer:
        for chunk in range(writer.n_chunks):
            start, stop = writer.rows_of(chunk)
            writer.write(HOOK, chunk, torch.randn(stop - start, d_model, generator=generator).half())
        writer.finish()
    return ActivationStore.open(path)


def arms(options: argparse.Namespace) -> dict[str, ArmConfig]:
    """Ours, by the name in the tables."""
    plain = ArmConfig(
        name="batchtopk",
        expansion=options.features / options.d_model,
        k=K,
        block_share=0.0,
        dead_after=10**9,
    )
    contrast = replace(plain, block_share=0.2, alpha=0.1, ramp_share=0.0)
    return {
        "BatchTopK": plain,
        "block split": replace(plain, name="block", block_share=0.2),
        "tc16, 256 anchors, ring 16384": replace(contrast, name="tc256", anchors=256),
        "tc16, 512 anchors, ring 16384": replace(contrast, name="tc512", anchors=512),
    }


def training(
    store: ActivationStore, batch: int, *some: ArmConfig, precision: Precision = "float32", ring: bool = True
) -> Training:
    """A run of these arms with a full ring, which takes steps and never ends."""
    config = TrainConfig(arms=some, tokens=10**6 * batch, batch_tokens=batch, precision=precision)
    made = Training(store, config, CPU)
    if ring:
        for i in range(-(-made.ring.size // 4096)):
            made.feed(config.steps + i, 4096)
    return made


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def stepping(run: Training) -> Case:
    """One ordinary step of a run."""
    return lambda: seconds_of(lambda: run.step(detailed=False))


def loading(run: Training) -> Case:
    """What a step of a run does besides its arms' steps, with nothing else to do meanwhile.

    What the run's thread has read ahead is read again, so that all of it is timed.
    """
    ahead = run.loader._ahead

    def load() -> None:
        run.loader.next()
        if run.feeds_ring:
            run.feed(run.done, run.config.ring_feed)

    def settled() -> float:
        ahead._thread.submit(int).result()  # after whatever is being read
        ahead.forget()
        return seconds_of(load)

    return settled


def loaded(run: Training) -> Training:
    """``run`` with its data already in memory: normalised batches of its store, nothing for the ring."""
    batches = [
        Rows(*(part.clone() if isinstance(part, torch.Tensor) else part for part in run.loader.next()))
        for _ in range(LOADED)
    ]
    again = itertools.cycle(batches)
    run.loader.close()
    run.loader.next = lambda: next(again)  # type: ignore[method-assign]  # for this measurement alone
    run.feeds_ring = False
    return run


def alternate(cases: Mapping[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in each round, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for nth in range(rounds + 1):
        for name, work in cases.items():
            value = work()
            if nth:
                taken[name].append(value)
    return taken


def ratio(upper: list[float], lower: list[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def median_with_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and the order statistics that it lies between in 95 % of samples: lower, median, upper.

    How many values are below the true median is a count of heads, whose deviation is half the root of their number.
    """
    ranked, reach = sorted(values), round(1.96 * len(values) ** 0.5 / 2)
    middle = len(ranked) // 2
    return (
        ranked[max(middle - reach, 0)],
        statistics.median(ranked),
        ranked[min(middle + reach, len(ranked) - 1)],
    )
