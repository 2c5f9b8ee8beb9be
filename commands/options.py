"""What several commands share: options, and how a result is printed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tcsae.store.readable import json_of, lines_of

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
DeviceOption = Annotated[str, typer.Option(help="torch device; auto: a GPU if there is one.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted call stopped.")]


def print_result(result: Any, as_json: bool) -> None:
    """A dataclass as one JSON object, or a line a field."""
    typer.echo(json_of(result) if as_json else "\n".join(lines_of(result)))
