"""``tcsae train``, and what is done with its recipes and its SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcsae.commands.options import DeviceOption, JsonOption, ResumeOption, print_result
from tcsae.store.remote import folder_here

app = typer.Typer()


@app.command(epilog="Example: tcsae train acts.zarr run --recipe block --recipe tc16 --tokens 1000000")
def train(
    store: Annotated[str, typer.Argument(help="A finished store: a folder or a URL.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run, to be created.", callback=folder_here)],
    recipe: Annotated[
        list[str] | None, typer.Option(help="An arm by name; repeat. See tcsae recipes.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file, such as another run's config.toml.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value or arm.key=value; repeat.", metavar="KEY=VALUE"),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2: every arm once per seed.")] = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, memory, FLOP and time; write nothing.")
    ] = False,
    log: Annotated[str, typer.Option(help="Also log to tensorboard or wandb, or tensorboard,wandb.")] = "",
    plot: Annotated[
        bool,
        typer.Option(
            "--plot",
            help="Draw training_metrics.png of RUN, finished or not, from what it has logged; no more.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train SAEs on a store, all arms and seeds side by side in one pass over it."""
    from tcsae.store import ActivationStore
    from tcsae.train import dry_run as plan
    from tcsae.train import plot_run
    from tcsae.train import train as fit
    from tcsae.train.recipes import asked_config
    from tcsae.train.run import own_config
    from tcsae.train.writers import check_writers

    if plot:
        print_result(plot_run(run), as_json)
        return
    log_to = tuple(name.strip() for name in log.split(",")) if log else ()
    if resume and not recipe and not settings and all(one is None for one in (config, tokens, seeds)):
        # what the message of an interrupted run asks for
        asked = own_config(run)
    else:
        asked = asked_config(recipe or [], config, settings or [], tokens, seeds)
    opened = ActivationStore.open(store)
    if dry_run:
        check_writers(log_to)
        print_result(plan(opened, asked, device=device), as_json)
    else:
        print_result(fit(opened, run, asked, resume=resume, device=device, log_to=log_to), as_json)


@app.command(epilog="Example: tcsae export run/sae/tc16-s0 tc16-for-saelens --format saelens")
def export(
    sae: Annotated[Path, typer.Argument(help="An SAE folder, or a run for all of its SAEs.")],
    folder: Annotated[Path, typer.Argument(help="Folder to be created.", callback=folder_here)],
    form: Annotated[str, typer.Option("--format", help="saelens: cfg.json and safetensors.")] = "saelens",
    as_json: JsonOption = False,
) -> None:
    """Write SAEs as folders that peers load, away from the run."""
    from tcsae.train.export import export as write

    print_result(write(sae, folder, form), as_json)


@app.command(epilog="Example: tcsae recipes tc16")
def recipes(name: Annotated[str | None, typer.Argument(help="One recipe, in full.")] = None) -> None:
    """List the named arms that train takes, or print one of them as TOML."""
    from tcsae.train.recipes import load_recipe, load_recipes, recipe_names
    from tcsae.train.settings import to_toml

    if name is not None:
        typer.echo(to_toml(load_recipes([name])).rstrip())
        return
    names = recipe_names()
    width = max(map(len, names))
    for one in names:
        typer.echo(f"{one:<{width}}  {load_recipe(one).explanation}")
