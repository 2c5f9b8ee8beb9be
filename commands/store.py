"""``tcsae store``: look at a store, check, copy and describe it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from tcsae.commands.options import JsonOption, ResumeOption, print_result
from tcsae.store.errors import ConfigError, ModelNotFound, StoreCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable

    from tcsae.store import ActivationStore

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at, check, copy and describe a store."
)


@app.command(epilog="Example: tcsae store info acts.zarr")
def info(
    store: Annotated[str, typer.Argument(help="A finished store: a folder or a URL.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a store holds: model, corpus, rows, documents, topics, hooks and their norms, a few beginnings."""
    from tcsae.store import ActivationStore, describe

    opened = ActivationStore.open(store)
    print_result(describe(opened, _decoder(opened)), as_json)


@app.command(epilog="Example: tcsae store verify acts.zarr --workers 2")
def verify(
    store: Annotated[str, typer.Argument(help="Folder of a finished store.")],
    workers: Annotated[int, typer.Option(help="Processes that read chunks.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler instead.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a store and compare it with what the store says of itself; exit 1 if it differs."""
    from tcsae.store.verify import verify as check

    found = check(store, workers=workers, scheduler=scheduler)
    if as_json:
        print_result(found, as_json)
    for problem in [] if as_json else found.problems:
        typer.echo(problem)
    if not found.is_good:
        n = len(found.problems)
        raise StoreCorrupt(
            f"{store}: {n} problem{'s' if n > 1 else ''}, {found.chunks} chunks looked at; copy the files named again "
            "from a good store, or mend chunks with `tcsae harvest ... --resume`"
        )
    if not as_json:
        typer.echo(f"{store}: {found.chunks} chunks, {found.rows:,} rows: as it says")


@app.command(epilog="Example: tcsae store copy acts.zarr s3://lab/acts.zarr --compress uniform --resume")
def copy(
    src: Annotated[str, typer.Argument(help="A finished store: a folder or a URL (s3://, http://, ...).")],
    dst: Annotated[str, typer.Argument(help="Where to: a folder or a URL (not http).")],
    hook: Annotated[list[str] | None, typer.Option(help="Only this hook; repeat for several.")] = None,
    documents: Annotated[
        str | None, typer.Option(help="Only documents A:B, B not included.", metavar="A:B")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Only rows A:B, widened to whole documents.", metavar="A:B")
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(help="lossless, int8 (about 2 x), uniform (about 3.5 x), or raw; as it is if left out."),
    ] = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a store, whole or in part, verified at the far end before it counts as complete."""
    from tcsae.store.copy import copy_store

    print_result(
        copy_store(
            src,
            dst,
            hooks=tuple(hook) if hook else None,
            documents=_span("--documents", documents),
            rows=_span("--rows", rows),
            codec=compress,
            resume=resume,
        ),
        as_json,
    )


@app.command(epilog="Example: tcsae store card acts.zarr --out acts.zarr/README.md")
def card(
    store: Annotated[str, typer.Argument(help="A finished store: a folder or a URL.")],
    out: Annotated[
        str | None, typer.Option(help="File to write, a path or a URL; stdout if left out.")
    ] = None,
) -> None:
    """Write the README.md of a store: what it is, from what it was made, how to read it."""
    from tcsae.store import ActivationStore
    from tcsae.store.card import write_card
    from tcsae.store.places import write_file

    opened = ActivationStore.open(store)
    text = write_card(opened, _decoder(opened))
    if out is None:
        typer.echo(text.rstrip())
    else:
        write_file(out, text.encode())


def _decoder(store: ActivationStore) -> Callable[[list[int]], str] | None:
    """Token ids to text by the tokenizer of the store's model, if that is on this machine."""
    from tcsae.harvest.decode import local_decoder

    made = store.provenance
    if made.truth is not None:
        return None  # no tokenizer made its tokens
    try:
        return local_decoder(made.model, made.model_revision, made.tokenizer_sha256)
    except ModelNotFound as error:
        logging.getLogger(__name__).info("examples: no text: %s", error)
        return None


def _span(option: str, given: str | None) -> tuple[int, int] | None:
    """A:B as two numbers."""
    if given is None:
        return None
    try:
        start, stop = map(int, given.split(":"))
    except ValueError:
        raise ConfigError(f"{option}: expected A:B, two whole numbers, got {given!r}") from None
    return start, stop
