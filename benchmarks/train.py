"""Training steps of our arms against the machine's own limits and the peers' training steps, in one run.

python -P benchmarks/train.py [--features 4096] [--d-model 512] [--batch 4096] [--threads 2] [--peers-python PATH]
                              [--rounds 7] [--large-rows 10000000] [--parts steps,arms,growth,loading,memory]

In each round every contestant takes one step, one after the other; medians over the rounds are printed, ratios are
medians of the rounds' own ratios, since what else the machine does changes from round to round. Our steps are whole:
loading the batch and feeding the ring are in them. The peers' (benchmarks/peers/train_peers.py) load nothing. All take
random rows, k = 32 and Adam; no feature counts as dead, so nobody's auxiliary loss costs anything.

Two limits, both measured in the same rounds, D = d_model, F = features:

    dense   5 encoder products of 2 D F FLOP a token: encoder, decoder, and the gradients of the code, of W_dec and of
            W_enc, which is what a step costs that knows nothing of sparsity
    floor   1 encoder product, and fused Adam over 2 D F parameters

T-SAE takes pairs of neighbouring tokens and reconstructs one of each. It has two rows: a batch of B tokens in B / 2
pairs, both tokens counted, which suits it best, and one of B pairs, of which the reconstructed token counts.

The parts: ``steps`` is this table, ``arms`` several arms in one pass, ``growth`` and ``loading`` the cost of a larger
store and where it arises (benchmarks/training/growth.py), ``memory`` what a run holds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from tcsae.benchmarks.training.common import make_store
from tcsae.benchmarks.training.growth import growth, loading_profile, stores_of_8
from tcsae.benchmarks.training.memory import memory, memory_of
from tcsae.benchmarks.training.steps import side_by_side, steps


def main() -> None:
    """Make the stores in a temporary folder, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large-rows", type=int, default=10_000_000)
    parser.add_argument("--peers-python", help="a Python with sae-lens, eai-sparsify and dictionary-learning")
    parser.add_argument(
        "--parts", default="steps,arms,growth,loading,memory", help="what to measure, with commas"
    )
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.memory_of:
        memory_of(options.store, options.memory_of, options)
        return
    parts = options.parts.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder / "store.zarr", 40 * options.batch, options.d_model)
        if "steps" in parts:
            steps(store, options, folder)
        if "arms" in parts:
            side_by_side(store, options)
        if {"growth", "loading"} & set(parts):
            both = stores_of_8(folder, options.large_rows)
            if "growth" in parts:
                growth(store, both, options)
            if "loading" in parts:
                loading_profile(store, both, options)
        if "memory" in parts:
            memory(folder / "store.zarr", options)


if __name__ == "__main__":
    main()
