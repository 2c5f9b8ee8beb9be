"""``tcsae evaluate`` and ``tcsae compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcsae.commands.options import DeviceOption, JsonOption
from tcsae.store.remote import folder_here

app = typer.Typer()


@app.command(epilog="Example: tcsae evaluate run results --store acts.zarr")
def evaluate(
    run: Annotated[list[Path], typer.Argument(help="Run folders, SAE folders, folders in SAELens' format.")],
    out: Annotated[Path, typer.Argument(help="Folder of the results.", callback=folder_here)],
    store: Annotated[
        str | None,
        typer.Option(
            help="The store that the SAEs were trained on, or one of the same model: a folder or URL."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the store's model is found now, if elsewhere; without a store, the model."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="Some of core,temporal,probing,unlearning,truth; truth by itself where the store has one."
        ),
    ] = "core,temporal",
    split: Annotated[str, typer.Option(help="Documents to use: test, train or all.")] = "test",
    max_tokens: Annotated[int, typer.Option(help="Tokens replayed through the model.")] = 8192,
    tokens: Annotated[
        Path | None,
        typer.Option(help="Replay these rows instead: .npy, integers [rows, context], BOS included."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts of one forward pass.")] = 16,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Evaluate beside the SAEs: identity, pca:K, random, untrained; repeatable."),
    ] = None,
    forget: Annotated[
        list[str] | None, typer.Option(help="Topic or source to unlearn; repeat for several.")
    ] = None,
    domain_tokens: Annotated[
        int, typer.Option(help="Tokens that unlearning scores on, inside a topic and outside it.")
    ] = 2048,
    questions_forget: Annotated[
        Path | None, typer.Option(help="JSON lines of multiple-choice questions on the topic to unlearn.")
    ] = None,
    questions_retain: Annotated[Path | None, typer.Option(help="The same on anything else.")] = None,
    seed: Annotated[int, typer.Option(help="Of the replayed contexts' draw and of the resamples.")] = 0,
    temporal_reference: Annotated[
        list[str] | None,
        typer.Option(help="Hold the temporal figures against: raw, random, averaged; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Dask processes on this machine for the temporal suite.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler for it, such as tcp://host:8786.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Replay the model with SAEs spliced in; reconstruction, sparsity, KL and temporal consistency."""
    from tcsae.evaluate import EvaluateConfig, table
    from tcsae.evaluate import evaluate as measure

    result = measure(
        EvaluateConfig(
            saes=tuple(run),
            out=out,
            store=store,
            model=model,
            suites=tuple(suite.split(",")),  # type: ignore[arg-type]  # the config rejects unknown names
            split=split,  # type: ignore[arg-type]  # the same
            max_tokens=max_tokens,
            tokens=tokens,
            batch_size=batch_size,
            references=tuple(reference or ()),
            forget=tuple(forget or ()),
            domain_tokens=domain_tokens,
            questions_forget=questions_forget,
            questions_retain=questions_retain,
            device=device,
            seed=seed,
            temporal_references=tuple(temporal_reference or ()),  # type: ignore[arg-type]  # the same
            workers=workers,
            scheduler=scheduler,
        )
    )
    if as_json:
        typer.echo((out / "summary.json").read_text().rstrip())
    else:
        typer.echo(table(result))
        typer.echo(f"figure: {result.figure or result.unlearning_figure or 'none'}")


@app.command(epilog="Example: tcsae compare results more-results --report comparison")
def compare(
    out: Annotated[list[Path], typer.Argument(help="Evaluation folders, measured on one store alike.")],
    report: Annotated[
        Path, typer.Option(help="Folder for report.html, tables and figures.", callback=folder_here)
    ],
    l0: Annotated[
        float | None,
        typer.Option(
            help="L0 to compare arms of several k at; 40, or the middle of what all reach, if left out."
        ),
    ] = None,
    primary: Annotated[
        str | None, typer.Option(help="Metric of the primary endpoint, if not the registered one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare evaluated SAEs over seeds and documents at equal L0; tables, figures and a report, nothing measured."""
    from tcsae.evaluate import compare as hold_against
    from tcsae.evaluate.compare.terminal import terminal

    found = hold_against(out, report, l0=l0, primary=primary)
    typer.echo((report / "compare.json").read_text().rstrip() if as_json else terminal(found))
