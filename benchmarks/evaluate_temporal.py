"""The temporal suite against encoding alone, over the same blocks of the same text, in one run.

python -P benchmarks/evaluate_temporal.py [--store STORE --sae FOLDER] [--rounds 5] [--tokens 46000] [--threads 2]

In each round everything is done once, one after the other; medians over the rounds are printed, ratios are medians of
the rounds' own ratios. Without a store and an SAE it makes its own: random rows of 576 dimensions in 85 documents and a
random encoder of 2,304 features, 31 of them on.

    encode      reading blocks and encode() alone
    pass        reading, encode() and every sum of the suite: the aim is at most 1 / 0.3 of encode
    figures     metrics of every feature without each document, averages, 2,000 draws, intervals, for one SAE; its cost
                does not depend on how long the text is
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tcsae.benchmarks.made import CONTEXT, HOOK, layout_of, provenance
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.temporal import temporal_figures
from tcsae.evaluate.temporal_encoders import SAEEncoder, random_directions, random_encoder
from tcsae.evaluate.temporal_features import figures
from tcsae.evaluate.temporal_pass import parts_of_text, temporal_sums
from tcsae.evaluate.temporal_references import threshold_for
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.store import ActivationStore, StoreWriter
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import load_sae

D_MODEL, D_SAE, BLOCK, L0 = 576, 2304, 460, 31.0
N_DOCUMENTS, N_BOOTSTRAP = 85, 2000
AIM = 0.3


def temporal_part(store: ActivationStore, sae: SAE, rounds: int = 5) -> None:
    """Print what the suite costs for ``sae`` on the test documents of ``store``."""
    hook = str(sae.metadata.get("hook_name") or store.hooks[0])
    held_out, encoder = HeldOut(store, hook, "test"), SAEEncoder(sae)

    def encode() -> None:
        for blocks in parts_of_text(held_out):
            for contexts in blocks:
                encoder(held_out.block(contexts))

    def summarise(sums: TemporalSums) -> None:
        temporal_figures(
            sums,
            figures(sums),
            block_size=sae.block_size,
            n_documents=sums.n_units,
            n_bootstrap=N_BOOTSTRAP,
            seed=0,
            print_="",
        )

    encode()
    sums = temporal_sums(encoder, held_out, seed=0).without_empty_units()
    seconds: dict[str, list[float]] = {"encode": [], "pass": [], "figures": []}
    for _ in range(rounds):
        seconds["encode"].append(timed(encode))
        seconds["pass"].append(timed(lambda: temporal_sums(encoder, held_out, seed=0)))
        seconds["figures"].append(timed(lambda: summarise(sums)))
    n, l0 = held_out.n_tokens, float(sums.once("firings").sum() / sums.n.sum())
    print(f"temporal: {n:,} tokens, {held_out.n_documents} documents, F = {sae.d_sae}, L0 = {l0:.1f}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<8} {median:6.2f} s  {n / median:8,.0f} tokens/s")
    alone = statistics.median(a / b for a, b in zip(seconds["encode"], seconds["pass"], strict=True))
    together = statistics.median(
        a / (b + c) for a, b, c in zip(seconds["encode"], seconds["pass"], seconds["figures"], strict=True)
    )
    print(f"speed of the pass: {alone:.2f} of encode (aim: at least {AIM}); with the figures {together:.2f}")


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def make_store(path: Path, n_rows: int) -> ActivationStore:
    """Random rows, neighbours alike, in documents of different lengths, all of them test documents."""
    generator = np.random.default_rng(0)
    shares = generator.lognormal(sigma=1.0, size=N_DOCUMENTS)
    borders = np.unique(np.r_[0, (np.cumsum(shares) / shares.sum() * n_rows).astype(int)])
    contexts = np.unique(np.r_[n_rows, *(np.arange(a, b, CONTEXT) for a, b in itertools.pairwise(borders))])
    tokens = generator.integers(1, 1000, n_rows).astype(np.int32)
    layout = layout_of(tokens, borders.astype(np.int64), contexts.astype(np.int64), lambda _: "test")
    rows = torch.from_numpy(generator.normal(size=(n_rows, D_MODEL))).float()
    rows[1:] += 0.7 * rows[:-1]
    made = provenance(D_MODEL, rows_per_chunk=4096, vocab_size=1000)
    with StoreWriter.create(path, layout, made) as writer:
        for chunk in range(writer.n_chunks):
            start, stop = writer.rows_of(chunk)
            writer.write(HOOK, chunk, rows[start:stop])
        writer.finish()
    return ActivationStore.open(path)


def make_sae(store: ActivationStore) -> SAE:
    """A random encoder with `L0` features on."""
    directions, mean = random_directions(D_MODEL, D_SAE, 0), torch.zeros(D_MODEL)
    held_out = HeldOut(store, HOOK, "test")
    threshold = threshold_for(SAEEncoder(random_encoder(directions, mean, 0.0, BLOCK)), held_out, L0)
    return random_encoder(directions, mean, threshold, BLOCK)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store")
    parser.add_argument("--sae", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=46_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.store and given.sae:
        temporal_part(ActivationStore.open(given.store), load_sae(given.sae), given.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store.zarr", given.tokens)
        temporal_part(store, make_sae(store), given.rounds)


if __name__ == "__main__":
    main()
