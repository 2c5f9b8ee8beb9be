"""The command line: each command, in `tcsae.commands`, parses, calls one function and prints.

Results go to stdout (with ``--json`` one JSON object and nothing else), progress and logs to stderr. Exit
status 0: done; 1: a mistake of the user's or of the data, in one line; 2: usage; 130: interrupted, state saved.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import typer

# Before torch is loaded: spinning threads halve the speed when another process takes part of a core
# (docs/decisions/004).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tcsae.commands import demo, evaluate, harvest, store, train
from tcsae.store.errors import Interrupted, TcsaeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Temporal contrastive sparse autoencoders: harvest a language model's activations in token order, "
    "train SAEs on them, evaluate them in the model.",
)
for group in (harvest, train, evaluate, demo):
    app.add_typer(group.app)
app.add_typer(store.app, name="store")


def main() -> None:
    """Entry point of ``tcsae``: every error on purpose becomes one line on stderr.

    Of several processes that torchrun has started the first alone prints.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    if not _is_first():
        logging.getLogger().setLevel(logging.ERROR)
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the end)
    hub, cloud = ("httpx", "huggingface_hub", "datasets"), ("aiobotocore", "botocore", "s3fs")
    for noisy in (*hub, *cloud, "transformers", "transformer_lens", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except Interrupted as error:
        _end(str(error), 130)
    except TcsaeError as error:
        _end(" ".join(str(error).split()), 1)
    except OSError as error:
        if (line := _line_of(error)) is None:
            raise
        _end(line, 1)
    except KeyboardInterrupt:
        _end("interrupted before anything was begun", 130)


def _line_of(error: OSError) -> str | None:
    """What the system refused, if that is a matter of paths, rights and space; None if it is another."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'disk'}: the disk is full; free some space and run the same command again"
    if error.filename is None or error.strerror is None:
        return None
    name = error.filename if error.filename2 is None else error.filename2
    return (
        f"{name}: {error.strerror.lower()}; see that the path is right and that you may read and write there"
    )


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _end(message: str, status: int) -> NoReturn:
    if _is_first():
        sys.stderr.write(f"tcsae: {message}\n")
    else:
        # torchrun ends all processes as soon as one has ended: the first gets the time to have its say.
        time.sleep(5)
    sys.exit(status)


if __name__ == "__main__":
    main()
