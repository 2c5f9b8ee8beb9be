"""Training steps of our arms against the machine's own limits and the peers' training steps, in one run.

python -P benchmarks/train.py [--features 4096] [--d-model 512] [--batch 4096] [--threads 2] [--peers-python PATH]
                              [--rounds 7] [--large-rows 10000000] [--parts steps,arms,growth,memory]

In each round every contestant takes one step, one after the other; medians over the rounds are printed, ratios are
medians of the rounds' own ratios, since what else the machine does changes from round to round. Our steps are whole:
loading the batch and feeding the ring are in them. The peers' (benchmarks/peers/train_peers.py) load nothing. All take
random rows, k = 32 and Adam; no feature counts as dead, so nobody's auxiliary loss costs anything.

Two limits, both measured in the same rounds, D = d_model, F = features:

    dense   5 encoder products of 2 D F FLOP a token: encoder, decoder, and the gradients of the code, of W_dec and of
            W_enc, which is what a step costs that knows nothing of sparsity
    floor   1 encoder product, and fused Adam over 2 D F parameters
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tcsae.store import ActivationStore, Layout, Provenance, StoreWriter, split_of
from tcsae.store.layout import documents_table
from tcsae.train import ArmConfig, TrainConfig
from tcsae.train.batches import Rows
from tcsae.train.config import Precision
from tcsae.train.precision import dtype_for, linear_for
from tcsae.train.ring import PIECE
from tcsae.train.temporal import LANES
from tcsae.train.training import Training

HOOK = "blocks.0.hook_resid_post"
CHUNK = 2**17
CONTEXT = 127
K = 32
LOADED = 8
"""batches that are held in memory where loading is left out"""
PAIRS = 40
"""steps with and without loading: one differs from the next by more than loading costs"""
CPU = torch.device("cpu")
PEER = Path(__file__).parent / "peers" / "train_peers.py"
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
    """What a step of a run does besides its arms' steps, with nothing else to do meanwhile."""

    def load() -> None:
        run.loader.next()
        if run.feeds_ring:
            run.feed(run.done, run.config.ring_feed)

    return lambda: seconds_of(load)


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


@contextmanager
def peers(python: str | None, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Case]]:
    """The peers' steps, each of which runs in the other process; none where there is no ``python``."""
    if python is None:
        print("peers: n/a, no --peers-python was given")
        yield {}
        return
    asked = {name: getattr(options, name) for name in ("d_model", "features", "batch", "threads")} | {"k": K}
    with (folder / "peers.err").open("w") as errors:
        process = subprocess.Popen(
            [python, "-P", str(PEER), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def step(name: str) -> float:
        requests.write(name + "\n")
        return float(answers.readline())

    try:
        found = json.loads(answers.readline())
        print("peers: " + ", ".join(f"{name} {version}" for name, version in found["ready"].items()))
        for name, reason in found["missing"].items():
            print(f"  {name}: n/a, {reason}")
        yield {name: (lambda name=name: step(name)) for name in found["steps"]}
    finally:
        requests.close()
        process.wait()


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
            profile(ours, base, taken, precision, options.rounds)


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
        low, middle, high = statistics.quantiles(more, n=4)
        print(
            f"  loading makes a step of {name} {middle:+.1%} longer than with its data in memory (bar: 2 %; middle "
            f"half of {PAIRS} pairs of steps: {low:+.1%} to {high:+.1%})"
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
    taken = alternate(runs, max(2, options.rounds // 2))
    together = taken.pop("all in one pass")
    alone = [sum(values) for values in zip(*taken.values(), strict=True)]
    print(
        f"\narms in one pass, {', '.join(taken)}: {1e3 * statistics.median(together):.0f} ms, "
        f"{ratio(together, alone):.3f} of the sum of their steps alone (bar: 1)"
    )


def growing(store: ActivationStore, folder: Path, options: argparse.Namespace) -> None:
    """What loading costs where the store is larger: 8 numbers a row, the index as long as any store's.

    Nothing is computed meanwhile, behind which a run would hide its reading.
    """
    sizes = (1_000_000, options.large_rows)
    step = stepping(training(store, options.batch, arms(options)["BatchTopK"], precision="auto", ring=False))
    base = statistics.median(alternate({"": step}, options.rounds)[""])
    runs = {}
    for n in sizes:
        store = make_store(folder / f"{n}.zarr", n, 8)
        # A chunk is checked when it is first read and never again, so that is no part of a step's cost.
        store.gather(np.array([start for start, _ in store.chunk_rows()]))
        arm = ArmConfig(name="a", k=2, block_share=0.0)
        runs[f"{n:,}"] = loading(training(store, options.batch, arm, ring=False))
    taken = alternate(runs, 20)
    small, large = taken.values()
    more = statistics.median(b - a for a, b in zip(small, large, strict=True))
    found = ", ".join(f"{1e3 * statistics.median(v):.2f} ms from {n} rows" for n, v in taken.items())
    print(
        f"\nloading a step's data, 8 numbers a row: {found}; the difference is {more / base:+.1%} of a BatchTopK "
        "step (bar: 5 %)"
    )


def memory(store: Path, options: argparse.Namespace) -> None:
    """Peak memory per added arm, each number of arms in a process of its own."""
    peak = {}
    for n in (1, 4):
        command = [sys.executable, "-P", __file__, "--memory-of", str(n), "--store", str(store)]
        for name in ("d_model", "features", "batch", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        peak[n] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    per_arm = (peak[4] - peak[1]) / 3
    parameters = 2 * options.features * options.d_model + options.features + options.d_model
    # Weights, their gradients and two moments; the activations are in the one buffer that the arms share.
    expected = 4 * 4 * parameters
    print(
        f"\nmemory per added arm: {per_arm / 2**20:,.0f} MiB; weights, gradients and both moments are "
        f"{expected / 2**20:,.0f} MiB; {peak[1] / 2**20:,.0f} MiB with one arm"
    )


def memory_of(path: Path, n: int, options: argparse.Namespace) -> None:
    """Print this process's largest resident memory in bytes after some steps of ``n`` arms."""
    plain = arms(options)["BatchTopK"]
    run = training(
        ActivationStore.open(path),
        options.batch,
        *(replace(plain, name=f"a{i}") for i in range(n)),
        precision="auto",
    )
    for _ in range(3):
        run.step(detailed=False)
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    print(int(status.split()[0]) * 1024)


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
    parser.add_argument("--parts", default="steps,arms,growth,memory", help="what to measure, with commas")
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
        if "growth" in parts:
            growing(store, folder, options)
        if "memory" in parts:
            memory(folder / "store.zarr", options)


if __name__ == "__main__":
    main()
