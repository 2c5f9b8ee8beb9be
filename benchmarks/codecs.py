"""What the store's codecs cost a trained SAE, on held-out documents; writes data/codec_effect.json.

python -P benchmarks/codecs.py STORE RUN [--max-tokens 8192] [--out data/codec_effect.json]

Each codec is fitted as `tcsae store copy` fits it, to rows of the train split only, and applied to the test split:

    ratio, error           bytes of the raw rows over bytes of the coded ones; squared error over variance
    explained variance     SAE on decoded rows, held against the decoded rows: what is measured on such a copy
    ... of the raw rows    SAE on decoded rows, held against the raw rows
    loss recovered         the model is replayed on contexts of the test split with SAE(codec(x)) in place of x

Effects are differences from the same SAE on the store's own dtype, uncompressed. Their intervals are bootstrap
intervals over documents of the paired differences. One pass of the model below the hook serves all, so that the time
is that of (codecs + 1) x SAEs passes above it. What is printed is what is written, and only numbers that the store,
the run, the seed and the number of threads decide are.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tcsae.evaluate import reconstruction
from tcsae.evaluate.core import METRICS, Replay, replay_figures
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.intervals import Array, Bootstrap, bootstrap, interval, resample_counts
from tcsae.evaluate.subjects import Subject, find_saes, load_subject
from tcsae.harvest.model import load_model
from tcsae.store import ActivationStore
from tcsae.store.codecs import Codec, Raw, fit, make_codec, measured_ratio, relative_error
from tcsae.store.recode import SAMPLE_PIECES, SAMPLE_ROWS
from tcsae.store.spec import TORCH_DTYPES, Dtype
from tcsae.train.sae.inference import SAE

CODECS = ("lossless", "int8", "uniform")

DIGITS = 6
"""decimals written: fewer than float32 sums in another order could change"""


class Coded(SAE):
    """An SAE that reads its rows through a codec; with `Raw`, rounded to the store's dtype."""

    def __init__(self, sae: SAE, codec: Codec, dtype: Dtype) -> None:
        super().__init__(
            architecture=sae.architecture,
            **dict(sae.named_buffers()),
            k=sae.k,
            block_size=sae.block_size,
            name=sae.name,
        )
        self.codec = codec
        self.stored = TORCH_DTYPES[dtype]

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations of the decoded rows."""
        return super().encode(through(self.codec, x.to(self.stored)).float())


class Found(NamedTuple):
    """Bootstraps of the figures of one SAE under one codec, all with the same resamples."""

    decoded: Bootstrap
    """`reconstruction.METRICS`, against the decoded rows"""
    raw: Bootstrap
    """the same against the raw rows"""
    replay: Bootstrap
    """`METRICS` of the core suite"""


def through(codec: Codec, rows: Tensor) -> Tensor:
    """Rows in the store's dtype, encoded and decoded."""
    return codec.decode(codec.encode(rows), *rows.shape)


def train_sample(store: ActivationStore, hook: str) -> Tensor:
    """Rows of train documents among pieces spread over the store, as `tcsae store copy` takes them."""
    length = min(SAMPLE_ROWS // SAMPLE_PIECES, store.n_rows)
    starts = np.linspace(0, store.n_rows - length, SAMPLE_PIECES).astype(np.int64)
    rows = np.unique((starts[:, None] + np.arange(length)).ravel())
    document = np.searchsorted(store.document_offsets, rows, side="right") - 1
    rows = rows[np.isin(document, store.documents_in("train"))]
    return torch.cat([store.rows(int(at), int(at) + 1, hook) for at in rows])


def store_figures(sae: SAE, held_out: HeldOut, decoded: Tensor, counts: Array) -> tuple[Bootstrap, Bootstrap]:
    """`reconstruction.METRICS` of ``sae`` on ``decoded`` rows, held against them and against the raw ones.

    Which rows count is decided by the raw ones.
    """
    centre = torch.from_numpy(held_out.store.statistics(held_out.hook).mean)
    sums = np.zeros((2, held_out.n_documents, len(reconstruction.COLUMNS) + sae.d_in))
    at = 0
    for block in held_out.blocks():
        x = decoded[at : at + len(block.x)][block.kept].float()
        at += len(block.x)
        f = sae.encode(x)
        xh = sae.decode(f)
        for one, target in zip(sums, (x, block.x[block.kept]), strict=True):
            rows = reconstruction.token_sums(target, f, xh, centre, sae.block_size)
            np.add.at(one, block.document[block.kept].numpy(), rows.numpy())
    against_decoded, against_raw = (
        bootstrap(one, lambda sums: reconstruction.figures(sums, sae.d_in), counts) for one in sums
    )
    return against_decoded, against_raw


def difference(name: str, one: Found, base: Found, part: str) -> dict[str, float | None]:
    """Effect on one figure with its interval."""
    metrics = METRICS if part == "replay" else reconstruction.METRICS
    at = [metric.name for metric in metrics].index(name)
    new, old = getattr(one, part), base.replay if part == "replay" else base.raw
    found = interval(
        float(new.value[at] - old.value[at]),
        new.draws[:, at] - old.draws[:, at],
        new.leave_one_out[:, at] - old.leave_one_out[:, at],
    )
    return {end: _rounded(getattr(found, end)) for end in ("value", "low", "high")}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS) + 0.0


@torch.no_grad()
def measure(store: ActivationStore, subjects: list[Subject], max_tokens: int, seed: int) -> dict[str, Any]:
    """All that is written."""
    hook, made = subjects[0].hook, store.provenance
    held_out = HeldOut(store, hook, "test")
    dtype = made.dtype
    sample = train_sample(store, hook)
    codecs: dict[str, Codec] = {"raw": Raw(dtype)}
    codecs |= {name: make_codec(name, dtype, fit(name, sample, dtype)) for name in CODECS}
    rows = torch.cat([block.x for block in held_out.blocks()]).to(TORCH_DTYPES[dtype])
    decoded = {name: through(codec, rows) for name, codec in codecs.items()}
    exact = {name for name in codecs if torch.equal(decoded[name], rows)}
    kinds = ["raw", *(name for name in codecs if name not in exact)]

    batches = held_out.batches(max_tokens, 16, seed)
    n_replayed = 1 + max(document for batch in batches for document in batch.document)
    mean = torch.from_numpy(store.statistics(hook).mean).float()
    model = load_model(made.model, precision=made.precision)
    coded = [Coded(one.sae, codecs[kind], dtype) for one in subjects for kind in kinds]
    replay = Replay(model, hook, mean, coded, n_replayed)
    for batch in batches:
        replay.add(batch)

    n_bootstrap = 2000
    of_all = resample_counts(held_out.n_documents, n_bootstrap, seed)
    of_replayed = resample_counts(n_replayed, n_bootstrap, seed)
    found: dict[tuple[str, str], Found] = {}
    for at in range(len(coded)):
        one, kind = subjects[at // len(kinds)], kinds[at % len(kinds)]
        found[one.name, kind] = Found(
            *store_figures(one.sae, held_out, decoded[kind], of_all),
            bootstrap(replay.sums(at), replay_figures, of_replayed),
        )
    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // made.rows_per_chunk))
    effects = {}
    for name in CODECS:
        kind = "raw" if name in exact else name
        ratios = [measured_ratio(codecs[name], rows[torch.from_numpy(part)]) for part in parts]
        effects[name] = {
            "ratio": round(len(ratios) / sum(1 / ratio for ratio in ratios), 3),
            "relative_error": _rounded(relative_error(codecs[name], rows)),
            "saes": {
                one.name: {
                    "explained_variance": difference("explained_variance", now, base, "decoded"),
                    "explained_variance_of_raw": difference("explained_variance", now, base, "raw"),
                    "loss_recovered": difference("loss_recovered", now, base, "replay"),
                }
                for one in subjects
                for now, base in [(found[one.name, kind], found[one.name, "raw"])]
            },
        }
    return {
        "format_version": 1,
        "made_by": "benchmarks/codecs.py",
        "versions": {name: version(name) for name in ("tcsae", "torch", "transformers", "numcodecs")},
        "model": made.model,
        "model_sha256": made.model_sha256,
        "hook": hook,
        "corpus": made.corpus,
        "store": store.id,
        "dtype": dtype,
        "context_length": made.context_length,
        "n_documents": held_out.n_documents,
        "n_rows": len(rows),
        "n_documents_replayed": n_replayed,
        "n_tokens_replayed": int(replay.n_kl.sum()),
        "n_bootstrap": n_bootstrap,
        "seed": seed,
        "saes": {one.name: _about(one, found[one.name, "raw"]) for one in subjects},
        "codecs": effects,
    }


def _about(one: Subject, base: Found) -> dict[str, Any]:
    """An SAE, and its figures without a codec."""
    ours = one.sae.metadata.get("tcsae") or {}
    store_names = [metric.name for metric in reconstruction.METRICS]
    replay_names = [metric.name for metric in METRICS]
    return {
        "arm": one.arm,
        "seed": one.seed,
        "architecture": one.sae.architecture,
        "features": one.sae.d_sae,
        "training_tokens": ours.get("tokens"),
        "recipe": dict(one.settings),
        "l0": round(float(base.raw.value[store_names.index("l0")]), 2),
        "explained_variance": _rounded(float(base.raw.value[store_names.index("explained_variance")])),
        "loss_recovered": _rounded(float(base.replay.value[replay_names.index("loss_recovered")])),
    }


def show(found: dict[str, Any]) -> None:
    """The table."""
    print(
        f"{found['model']}, {found['hook']}, {found['corpus']}: {found['n_documents']} test documents "
        f"({found['n_rows']:,} rows), {found['n_documents_replayed']} of them replayed "
        f"({found['n_tokens_replayed']:,} tokens); store {found['store']}"
    )
    for name, sae in found["saes"].items():
        print(
            f"  {name}: {sae['architecture']}, {sae['features']:,} features, k = {sae['recipe'].get('k')}, "
            f"L0 {sae['l0']}, explained variance {sae['explained_variance']:.4f}, loss recovered "
            f"{sae['loss_recovered']:.4f}"
        )
    print(f"\n{'codec':<10}{'ratio':>6}{'error':>9}  {'SAE':<10}", end="")
    print(
        "".join(f"{title:<31}" for title in ("explained variance", "... of the raw rows", "loss recovered"))
    )
    for codec, effect in found["codecs"].items():
        for name, figures in effect["saes"].items():
            cells = (f"{f['value']:+.5f} [{f['low']:+.5f}, {f['high']:+.5f}]" for f in figures.values())
            print(f"{codec:<10}{effect['ratio']:6.2f}{effect['relative_error']:9.5f}  {name:<10}", end="")
            print("".join(f"{cell:<31}" for cell in cells))


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("run", type=Path, help="a run, or one SAE's folder")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens replayed through the model")
    parser.add_argument("--seed", type=int, default=0, help="of the contexts' draw and of the resamples")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data" / "codec_effect.json")
    options = parser.parse_args()
    store = ActivationStore.open(options.store)
    subjects = [load_subject(folder, store) for folder in find_saes(options.run)]
    found = measure(store, subjects, options.max_tokens, options.seed)
    options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
