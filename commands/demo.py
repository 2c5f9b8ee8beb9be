"""``tcsae demo``: all three stages on a real model and real text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from tcsae.commands.options import JsonOption
from tcsae.store.errors import Interrupted
from tcsae.store.remote import folder_here

app = typer.Typer()


@app.command(epilog="Example: tcsae demo demo")
def demo(
    folder: Annotated[
        Path, typer.Argument(help="Folder for the store, the run and the results.", callback=folder_here)
    ] = Path("demo"),
    as_json: JsonOption = False,
) -> None:
    """Harvest, train and evaluate on SmolLM2-135M and real text; run again to go on after an interruption."""
    import tomllib
    from importlib.resources import files

    from tcsae.evaluate import EvaluateConfig, table
    from tcsae.evaluate import evaluate as measure
    from tcsae.harvest import HarvestConfig
    from tcsae.harvest import harvest as run_model
    from tcsae.store import ActivationStore
    from tcsae.train import train as fit
    from tcsae.train.recipes import asked_config
    from tcsae.train.run import RUN_FILE

    settings = tomllib.loads((files("tcsae.data") / "demo.toml").read_text("utf-8"))
    store, run, results = folder / "store.zarr", folder / "run", folder / "results"
    log = logging.getLogger(__name__)
    try:
        log.info("1/3 harvest: %(model)s reads %(corpus)s", settings["harvest"])
        asked = {**settings["harvest"], "hooks": tuple(settings["harvest"]["hooks"])}
        run_model(HarvestConfig(store=store, resume=True, **asked))
        log.info("2/3 train: %s", ", ".join(settings["train"]["recipes"]))
        config = asked_config(settings["train"]["recipes"], None, [], settings["train"]["tokens"], None)
        trained = fit(ActivationStore.open(store), run, config, resume=(run / RUN_FILE).exists())
        log.info("3/3 evaluate: replaying the model")
        result = measure(EvaluateConfig(saes=(run,), out=results, store=store, **settings["evaluate"]))
    except Interrupted as error:
        raise Interrupted(f"{folder}: interrupted; `tcsae demo {folder}` goes on from there") from error
    if as_json:
        typer.echo((results / "summary.json").read_text().rstrip())
        return
    typer.echo(table(result))
    typer.echo(f"training_metrics.png: {trained.figure}")
    typer.echo(f"final_metrics.png:    {result.figure}")
