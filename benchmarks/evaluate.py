"""What evaluating costs beside what it cannot do without, in one run.

python -P benchmarks/evaluate.py --run RUN [--model smollm2] [--store STORE] [--rounds 5] [--threads 2]

RUN holds SAEs of the model, as `tcsae demo` trains them; STORE is theirs. Medians over the rounds, which take turns;
ratios are medians of the rounds' own ratios, since what else the machine does changes from round to round.

    core, one SAE   the core suite's replay of 16 rows of 128 tokens, with every figure of ours and SAEBench's, against
                    the three forward passes that it needs: clean, spliced and ablated, logits at every position. As
                    SAEBench does it, each of the three is a whole pass.
    ten SAEs        one call of evaluate on such a batch for ten SAEs, against ten times a call for one of them, which
                    are taken in turn. With loading the model, as on the command line, and with a model that is there.

With --store the temporal suite is measured as well (benchmarks/evaluate_temporal.py).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch

from tcsae.benchmarks.evaluate_temporal import temporal_part
from tcsae.evaluate import EvaluateConfig, evaluate, evaluate_subjects
from tcsae.evaluate.core_replay import Replay
from tcsae.evaluate.splice import ReplayModel
from tcsae.evaluate.subjects import Origin, find_saes, load_subject
from tcsae.evaluate.token_rows import TokenRows, read_token_rows
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import load_sae, save_sae

ROWS, CONTEXT, N_SAES = 16, 128, 10


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def line(name: str, times: Sequence[float], ratios: Sequence[float] | None = None, bar: str = "") -> None:
    """One line of a table: median, range and, against the line above, the median of the rounds' ratios."""
    ratio = "" if ratios is None else f"x {statistics.median(ratios):6.3f}"
    spread = f"({min(times):7.3f} to {max(times):7.3f})"
    print(f"  {name:<58} {statistics.median(times):8.3f} s {spread}  {ratio}  {bar}".rstrip(), flush=True)


def core_part(model: LanguageModel, hook: str, sae: SAE, rows: TokenRows, rounds: int) -> None:
    """The replay of one SAE against the passes that it needs."""
    (batch,) = rows.batches(ROWS, model.special_token_ids)
    keep = batch.keep[..., None]
    mean = torch.zeros(sae.d_in)

    def spliced(x: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, sae(x), x)

    def passes() -> None:
        model.logits(batch.input_ids)
        model.logits(batch.input_ids, hook, spliced)
        model.logits(batch.input_ids, hook, lambda x: torch.where(keep, 0.0, x))

    def replay() -> None:
        Replay(cast(ReplayModel, model), hook, mean, [sae], len(rows.ids), reconstructs=True).add(batch)

    x = model.residuals(batch.input_ids, [hook])[hook].clone()
    found: dict[str, list[float]] = {"passes": [], "replay": [], "below": [], "above": []}
    replay()
    for _ in range(rounds):
        found["passes"].append(seconds(passes))
        found["replay"].append(seconds(replay))
        found["below"].append(seconds(lambda: model.residuals(batch.input_ids, [hook])))
        found["above"].append(seconds(lambda: model.logits_from(batch.input_ids, hook, x)))
    ratios = [a / b for a, b in zip(found["replay"], found["passes"], strict=True)]
    print(f"core, one SAE ({sae.name}), {ROWS} rows of {CONTEXT} tokens, {hook}")
    line("three whole forward passes", found["passes"])
    line("core's replay, all figures", found["replay"], ratios, "(bar: at most 1.15)")
    line("of it: layers up to the hook, once", found["below"])
    line("of it: layers above the hook, once clean and once an SAE", found["above"])


def ten_part(folders: Sequence[Path], rows: Path, model: LanguageModel, out: Path, rounds: int) -> None:
    """Ten SAEs in one call against ten calls."""
    number, name = 0, model.name

    def config(saes: Sequence[Path]) -> EvaluateConfig:
        nonlocal number
        number += 1
        return EvaluateConfig(
            saes=tuple(saes), out=out / str(number), tokens=rows, model=name, suites=("core",)
        )

    def loaded(saes: Sequence[Path]) -> Callable[[], object]:
        subjects = [load_subject(folder, Origin.of_model(model)) for folder in saes]
        asked = config(saes)
        return lambda: evaluate_subjects(subjects, None, asked, rows=read_token_rows(rows), model=model)

    print(f"\n{len(folders)} SAEs in one call, {ROWS} rows of {CONTEXT} tokens")
    for loads, what in ((True, "loading the model in each call"), (False, "the model loaded before")):
        ten_calls, one_call = [], []
        for at in range(rounds):
            one = [folders[at % len(folders)]]
            single = partial(evaluate, config(one)) if loads else loaded(one)
            ten_calls.append(len(folders) * seconds(single))
            one_call.append(seconds(partial(evaluate, config(folders)) if loads else loaded(folders)))
        ratios = [a / b for a, b in zip(one_call, ten_calls, strict=True)]
        line(f"{len(folders)} calls of one SAE, {what}", ten_calls)
        line(f"one call of {len(folders)} SAEs", one_call, ratios, "(bar: below 0.5)")


def copies(run: Path, folder: Path, n: int) -> list[Path]:
    """The run's SAEs over and over under names of their own, until there are ``n``."""
    folders = find_saes(run)
    made = []
    for at in range(n):
        sae = load_sae(folders[at % len(folders)])
        sae.name = f"sae{at}"
        ours = {**sae.metadata.get("tcsae", {}), "arm": sae.name}
        sae.metadata = {**sae.metadata, "tcsae": ours}
        save_sae(sae, folder / sae.name)
        made.append(folder / sae.name)
    return made


def main() -> None:
    """Run all parts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run, or an SAE's folder")
    parser.add_argument("--model", default="smollm2", help="the model of its SAEs")
    parser.add_argument("--store", type=Path, help="the run's store, for the temporal suite")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default="core,ten,temporal", help="some of core,ten,temporal")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    parts = asked.parts.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "core" in parts or "ten" in parts:
            model = load_model(asked.model)
            ids = np.random.default_rng(0).integers(10, model.vocab_size, size=(ROWS, CONTEXT))
            ids[:, 0] = model.bos_token_id
            np.save(folder / "rows.npy", ids)
            sae = load_sae(find_saes(asked.run)[0])
            if "core" in parts:
                hook = sae.metadata["hook_name"]
                core_part(model, hook, sae, read_token_rows(folder / "rows.npy"), asked.rounds)
            if "ten" in parts:
                saes = copies(asked.run, folder / "saes", N_SAES)
                ten_part(saes, folder / "rows.npy", model, folder / "out", asked.rounds)
        if "temporal" in parts and asked.store is not None:
            print()
            temporal_part(ActivationStore.open(asked.store), load_sae(find_saes(asked.run)[0]), asked.rounds)


if __name__ == "__main__":
    main()
