"""SAEBench's own core evaluation of SAE folders on fixed rows of tokens: the other half of benchmarks/parity.py.

It runs in an environment of its own, where sae-bench is installed and tcsae need not be. One argument, a JSON object
with ``model`` (a folder in Hugging Face's form: GPT-NeoX or Llama), ``saes`` (folders in SAELens' format), ``rows``
(.npy), ``batch_size``, ``threads``, ``out``, the JSON file that it writes, and ``seen``, a folder for the activations
that each SAE was given (.npy). Nothing of SAEBench, SAELens or TransformerLens is changed: `run_evals` and
`calculate_misc_metrics` are called as `multiple_evals` calls them, with a store of activations that deals out the rows
in order, and for either half of the evaluation from the first row on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import numpy as np  # noqa: E402  # the variable above must be set first
import torch  # noqa: E402
from sae_bench.evals.core.eval_config import CoreEvalConfig  # noqa: E402
from sae_bench.evals.core.main import calculate_misc_metrics, run_evals  # noqa: E402
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # noqa: E402
from sae_lens import SAE  # noqa: E402
from transformer_lens import HookedTransformer  # noqa: E402
from transformer_lens.config import HookedTransformerConfig  # noqa: E402
from transformer_lens.loading_from_pretrained import convert_hf_model_config  # noqa: E402
from transformer_lens.pretrained.weight_conversions import (  # noqa: E402
    convert_llama_weights,
    convert_neox_weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


class Rows:
    """What `run_evals` asks of SAELens' ActivationsStore."""

    def __init__(self, rows: np.ndarray[Any, Any], batch_size: int) -> None:
        self._rows = torch.from_numpy(rows.astype(np.int64))
        self._at = 0
        self.context_size = rows.shape[1]
        self.store_batch_size_prompts = batch_size

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        """The next rows."""
        self._at += batch_size
        return self._rows[self._at - batch_size : self._at]

    def reset_input_dataset(self) -> None:
        """Begin again, as the name says."""
        self._at = 0


def hooked(folder: str) -> HookedTransformer:
    """The model in TransformerLens, as `from_pretrained_no_processing` makes it of a name that it knows."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = convert_hf_model_config(folder)
    settings |= {"model_name": Path(folder).name, "device": "cpu", "dtype": torch.float32}
    settings |= {"init_weights": False, "tokenizer_name": folder}
    cfg = HookedTransformerConfig.from_dict(settings)
    convert = convert_neox_weights if loaded.config.model_type == "gpt_neox" else convert_llama_weights
    model = HookedTransformer(cfg, tokenizer)
    model.load_and_process_state_dict(
        convert(loaded, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    probe = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = loaded(probe).logits
        difference = ((model(probe) - logits).abs().max() / logits.abs().max()).item()
    if difference > 1e-4:
        raise SystemExit(
            f"{folder}: logits in TransformerLens differ from transformers' own by {difference} of the largest"
        )
    return model


class Seen:
    """Stands in front of an SAE's `encode` and keeps what the last calls gave it."""

    def __init__(self, sae: SAE[Any], n_calls: int) -> None:
        self._encode = sae.encode
        self.inputs: deque[torch.Tensor] = deque(maxlen=n_calls)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the SAE's own method gives."""
        self.inputs.append(x.clone())
        return self._encode(x)


def main() -> None:
    """Evaluate every SAE and write one JSON object."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    rows, batch_size = np.load(asked["rows"]), asked["batch_size"]
    n_batches, rest = divmod(len(rows), batch_size)
    if rest:
        raise SystemExit(f"{len(rows)} rows are no whole number of batches of {batch_size}")
    model = hooked(asked["model"])
    found: dict[str, Any] = {
        name: version(name) for name in ("sae-bench", "sae-lens", "transformer-lens", "torch")
    }
    found = {"versions": found, "saes": {}}
    for folder in asked["saes"]:
        _, sae, _ = load_and_format_sae(Path(folder).name, SAE.load_from_disk(folder), "cpu")
        sae = sae.to(device="cpu", dtype=torch.float32)
        # its second half, sparsity and variance, is what encodes last, each batch once
        seen = Seen(sae, n_batches)
        sae.encode = seen
        metrics, features = run_evals(
            sae=sae,
            activation_store=Rows(rows, batch_size),
            model=model,
            eval_config=CoreEvalConfig(
                batch_size_prompts=batch_size,
                n_eval_reconstruction_batches=n_batches,
                n_eval_sparsity_variance_batches=n_batches,
                compute_kl=True,
                compute_ce_loss=True,
                compute_l2_norms=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
                compute_featurewise_density_statistics=True,
                compute_featurewise_weight_based_metrics=True,
                exclude_special_tokens_from_reconstruction=True,
            ),
            ignore_tokens={
                model.tokenizer.pad_token_id,
                model.tokenizer.eos_token_id,
                model.tokenizer.bos_token_id,
            },
        )
        metrics["misc_metrics"] = calculate_misc_metrics(features)
        np.save(Path(asked["seen"]) / f"{Path(folder).name}.npy", torch.cat([*seen.inputs]).numpy())
        found["saes"][Path(folder).name] = {"metrics": metrics, "features": features}
    # NaN and Infinity stay what they are: where SAEBench's figure is not finite there is nothing to compare
    Path(asked["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
