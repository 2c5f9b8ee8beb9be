"""SAELens' cache-activations runner, timed on request: the other half of benchmarks/harvest.py --saelens-python.

It runs in an environment of its own, where sae-lens is installed and tcsae need not be: the two want different
versions of transformer_lens. One argument, a JSON object with

    home           a folder that holds the model at EleutherAI/pythia-70m: HookedTransformer takes only names that it
                   knows, and seen from there that one is a local folder, so no hub is asked
    tokens         .npy of token ids [sequence, position]: a pretokenised dataset, its faster way
    text           .jsonl whose rows' "text" has at least as many sequences, which the runner is to tokenise itself
    hooks          {kind of model: names of the hooks there}
    batch_size, threads, scratch
    clock          name of the function of time that is read: perf_counter, or process_time, the processor's time
    precision      dtype of the model; activations are stored in float32, since its datasets know no bfloat16

Once the models are loaded it writes one line, ``{"ready": versions}``. Then, for each line ``[kind, hook, way]`` that
it reads, it runs that runner, from the first sequence on, into an empty folder and writes ``{"seconds": ...,
"model": ...}``: the whole of run() and the part of it in the model. Both are timed from outside; nothing of SAELens is
changed.
``way`` is "tokens", which spares it what it can be spared, or "text": as it comes, its prepended BOS and its shuffle
left as they are by default.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

# read by the libraries when they are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

MODEL = "EleutherAI/pythia-70m"


def main() -> None:
    """Load the models, then answer requests until the input ends."""
    asked = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # loading a model prints
        serve(asked, answers)


def serve(asked: dict[str, Any], answers: Any) -> None:
    """As the module says."""
    import datasets
    import numpy as np
    import torch
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    datasets.disable_progress_bars()
    torch.set_num_threads(asked["threads"])
    os.chdir(asked["home"])
    ids = np.load(asked["tokens"])
    n_sequences, context_size = ids.shape
    d_model = json.loads((Path(MODEL) / "config.json").read_text())["hidden_size"]
    into = Path(asked["scratch"])
    clock = getattr(time, asked["clock"])

    rows = [json.loads(line) for line in Path(asked["text"]).read_text(encoding="utf-8").splitlines()]
    sources = {
        "tokens": datasets.Dataset.from_dict({"tokens": ids.tolist()}),
        "text": datasets.Dataset.from_dict({"text": [row["text"] for row in rows]}),
    }
    # the given sequences have their BOS
    spared = {"tokens": {"prepend_bos": False, "shuffle": False}, "text": {}}

    def runner(kind: str, hook: str, way: str) -> CacheActivationsRunner:
        config = CacheActivationsRunnerConfig(
            dataset_path="given as an object",
            model_name=MODEL,
            model_class_name=kind,
            model_from_pretrained_kwargs={"dtype": getattr(torch, asked["precision"])},
            model_batch_size=asked["batch_size"],
            hook_name=hook,
            d_in=d_model,
            training_tokens=ids.size,
            context_size=context_size,
            new_cached_activations_path=str(into),
            # a buffer is filled whatever training_tokens says, so it is to hold the tokens exactly
            buffer_size_gb=(ids.size * d_model * 4 + 0.5) / 1e9,
            dtype="float32",
            device="cpu",
            **spared[way],
        )
        return CacheActivationsRunner(config, override_dataset=sources[way])

    runners = {
        (kind, hook, way): runner(kind, hook, way)
        for kind, hooks in asked["hooks"].items()
        for hook in hooks
        for way in (sources if hook == hooks[-1] else ["tokens"])
    }
    names = ("sae-lens", "transformer-lens", "transformers", "torch")
    print(json.dumps({"ready": {name: version(name) for name in names}}), file=answers, flush=True)
    for line in sys.stdin:
        one = runners[tuple(json.loads(line))]
        one.activations_store.iterable_sequences = one.activations_store._iterate_tokenized_sequences()
        shutil.rmtree(into, ignore_errors=True)
        inside = [0.0]
        run_with_cache = type(one.model).run_with_cache

        def watched(*args: Any, **options: Any) -> Any:
            began = clock()
            found = run_with_cache(one.model, *args, **options)  # noqa: B023  # called in this turn
            inside[0] += clock() - began  # noqa: B023
            return found

        one.model.run_with_cache = watched
        began = clock()
        made = one.run()
        seconds = clock() - began
        assert len(made) == n_sequences, f"{len(made)} sequences, expected {n_sequences}"
        print(json.dumps({"seconds": seconds, "model": inside[0]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
