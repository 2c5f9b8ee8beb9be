"""Steps of ours and of the peers beside the machine's limits, what loading costs, where the contrast's time goes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from tcsae.benchmarks.training.common import (
    CPU,
    Case,
    K,
    alternate,
    arms,
    loaded,
    loading,
    median_with_interval,
    ratio,
    seconds_of,
    stepping,
    training,
)
from tcsae.benchmarks.training.peers import peers
from tcsae.store import ActivationStore
from tcsae.train.config import Precision
from tcsae.train.precision import dtype_for, linear_for
from tcsae.train.ring import PIECE
from tcsae.train.temporal import LANES
from tcsae.train.training import Training

TSAE = {
    "T-SAE, B tokens in pairs": "both tokens of a pair counted, though it reconstructs one of them: what suits it best",
    "T-SAE, B pairs": "the token counted that it reconstructs, as many as ours",
}
"""rows of the table, and what is a token there"""
PAIRS = 120
"""steps with and without loading: one differs from the next by more than loading costs"""


def product(options: argparse.Namespace, precision: Precision) -> Case:
    """One encoder product."""
    x, W = torch.randn(options.batch, options.d_model), torch.randn(options.features, options.d_model)
    b, out = torch.zeros(options.features), torch.empty(options.batch, options.features)
    multiply = linear_for(precision, CPU)
    return lambda: seconds_of(lambda: multiply(x, W, b, out))


def adam(options: argparse.Namespace) -> Case:
    """One fused Adam step over an encoder and a decoder."""
    weights = [torch.nn.Parameter(torch.randn(options.features, options.d_model)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, lr=1e-6, fused=True)
    return lambda: seconds_of(optimizer.step)


def steps(store: ActivationStore, options: argparse.Namespace, folder: Path) -> None:
    """Print the table of steps."""
    batch = options.batch
    precisions: list[Precision] = ["float32"]
    if linear_for("auto", CPU) is not linear_for("float32", CPU):
        precisions.append("bfloat16")
    with peers(options.peers_python, options, folder) as others:
        for precision in precisions:
            ours = {
                name: training(store, batch, arm, precision=precision) for name, arm in arms(options).items()
            }
            cases = {
                "one encoder product": product(options, precision),
                "Adam": adam(options),
                "loading the data of a step": loading(ours["BatchTopK"]),
                **{name: stepping(run) for name, run in ours.items()},
                **others,
            }
            taken = alternate(cases, options.rounds)
            base, gemm = taken["BatchTopK"], taken["one encoder product"]
            floor = [a + b for a, b in zip(gemm, taken["Adam"], strict=True)]
            flop = 2 * batch * options.d_model * options.features
            print(
                f"\nsteps, {precision}: D {options.d_model}, F {options.features}, B {batch}, k {K}, "
                f"{options.threads} threads, {options.rounds} rounds; one encoder product runs at "
                f"{flop / statistics.median(gemm) / 1e9:,.0f} GFLOP/s"
            )
            print(f"  {'':<32}{'tokens/s':>9}{'ms':>9}   of dense limit   times floor   times our BatchTopK")
            for name, values in taken.items():
                middle = statistics.median(values)
                print(
                    f"  {name:<32}{batch / middle:9,.0f}{1e3 * middle:9.1f}   {5 * ratio(gemm, values):14.2f}"
                    f"   {ratio(values, floor):11.2f}   {ratio(values, base):19.2f}"
                )
            share = ratio(taken["loading the data of a step"], base)
            print(f"  loading with nothing to compute meanwhile takes {share:.1%} of a BatchTopK step")
            cost_of_loading(store, options, precision)
            against_tsae(taken)
            profile(ours, base, taken, precision, options.rounds)


def against_tsae(taken: Mapping[str, list[float]]) -> None:
    """Print how many times as fast as T-SAE our contrastive arms are, by both ways of counting its tokens."""
    for peer, counted in TSAE.items():
        for name in (name for name in taken if name.startswith("tc") and peer in taken):
            print(
                f"  {name.split(', ring')[0]}: {ratio(taken[peer], taken[name]):.2f} times T-SAE's step (aim: 8), "
                f"{counted}"
            )


def cost_of_loading(store: ActivationStore, options: argparse.Namespace, precision: Precision) -> None:
    """Print by how much a step is longer that loads its data, whatever of it is hidden behind what computes."""
    for name in ("BatchTopK", "tc16, 256 anchors, ring 16384"):
        arm = arms(options)[name]
        cases = {
            "loads": stepping(training(store, options.batch, arm, precision=precision)),
            "has it": stepping(loaded(training(store, options.batch, arm, precision=precision))),
        }
        taken = alternate(cases, PAIRS)
        more = [a / b - 1 for a, b in zip(taken["loads"], taken["has it"], strict=True)]
        low, middle, high = median_with_interval(more)
        print(
            f"  loading makes a step of {name} {middle:+.1%} [{low:+.1%}, {high:+.1%}] longer than with its data in "
            f"memory (bar: 2 %; median of {PAIRS} pairs of steps and its 95 % interval)"
        )


def profile(
    ours: Mapping[str, Training],
    base: list[float],
    taken: Mapping[str, list[float]],
    precision: Precision,
    rounds: int,
) -> None:
    """Print what the contrast's products cost alone, in the pieces of the step, beside the whole term."""
    dtype = dtype_for(precision, CPU)
    for name, run in ours.items():
        (arm,) = run.arms
        if arm.config.alpha == 0:
            continue
        batch = run.loader.next()
        (pairs,) = run._pairs(batch, run.done).values()
        n_queries = len(np.union1d(pairs.anchor, pairs.positive))
        width = -(-arm.sae.block_size // LANES) * LANES
        n_keys, d_model = run.ring.activations.shape
        x, W = torch.randn(PIECE, d_model, dtype=dtype), torch.randn(width, d_model, dtype=dtype)
        code, query = torch.empty(PIECE, width, dtype=dtype), torch.rand(n_queries, width, dtype=dtype)
        bias, logits = torch.zeros(width, dtype=dtype), torch.zeros(n_queries, PIECE, dtype=dtype)
        slope = torch.empty_like(query)
        pieces = range(n_keys // PIECE)

        def all_pieces(work: Callable[[], object], pieces: range = pieces) -> Case:
            return lambda: seconds_of(lambda: [work() for _ in pieces])

        parts = {
            "codes of the ring": (
                2 * n_keys * d_model * width,
                all_pieces(lambda x=x, W=W, b=bias, out=code: torch.addmm(b, x, W.T, out=out)),
            ),
            "logits": (
                2 * n_queries * n_keys * width,
                all_pieces(lambda q=query, k=code, out=logits: torch.mm(q, k.T, out=out)),
            ),
            "their gradient": (
                2 * n_queries * n_keys * width,
                all_pieces(lambda p=logits, k=code, out=slope: torch.mm(p, k, out=out)),
            ),
            "exponentials": (0, all_pieces(lambda p=logits: p.zero_().exp_())),
        }
        found = alternate({part: case for part, (_, case) in parts.items()}, rounds)
        term = statistics.median(a - b for a, b in zip(taken[name], base, strict=True))
        print(
            f"  {name}: {n_queries} tokens in pairs, block H {width}; beyond a BatchTopK step {1e3 * term:.0f} ms"
        )
        for part, values in found.items():
            middle = statistics.median(values)
            rate = f", {parts[part][0] / middle / 1e9:,.0f} GFLOP/s" if parts[part][0] else ""
            print(f"    {part:<30}{1e3 * middle:9.1f} ms{rate}")
        products = sum(statistics.median(found[part]) for part, (flop, _) in parts.items() if flop)
        base_time = statistics.median(base)
        print(f"    with its products alone the step would be {1 + products / base_time:.2f} of BatchTopK's")


def side_by_side(store: ActivationStore, options: argparse.Namespace) -> None:
    """Several arms in one pass against each alone."""
    some = list(arms(options).values())[:3]
    runs = {arm.name: stepping(training(store, options.batch, arm, precision="auto")) for arm in some}
    runs["all in one pass"] = stepping(training(store, options.batch, *some, precision="auto"))
    taken = alternate(runs, 4 * options.rounds)
    together = taken.pop("all in one pass")
    alone = [sum(values) for values in zip(*taken.values(), strict=True)]
    low, middle, high = median_with_interval([a / b for a, b in zip(together, alone, strict=True)])
    print(
        f"\narms in one pass, {', '.join(taken)}: {1e3 * statistics.median(together):.0f} ms, {middle:.3f} "
        f"[{low:.3f}, {high:.3f}] of the sum of their steps alone (bar: 1; {len(together)} rounds, 95 % interval)"
    )
