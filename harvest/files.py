"""Corpora in files: JSON lines, parquet, folders of text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tcsae.harvest.corpus import BadRow, Document, Rows
from tcsae.store.errors import CorpusError


def read_jsonl(path: Path) -> Rows:
    """One document a line; blank lines are no rows, but count in the lines' numbers, which begin at 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                # utf-8-sig: editors on Windows put a byte order mark before the first line
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield BadRow(where, "not UTF-8")
                continue
            except (ValueError, RecursionError):  # Python reads no whole number of more than 4,300 digits
                yield BadRow(where, "not JSON")
                continue
            if not isinstance(row, dict):
                yield BadRow(where, "not a JSON object")
                continue
            yield to_document(row, where, f"{path.name}:{number}", path.name)


def count_jsonl(path: Path) -> int:
    """Line ends in the file: its rows, give or take blank lines and a last line without an end."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def read_parquet(path: Path) -> Rows:
    """One document a row of a table with a ``text`` column; a row's number counts from 1."""
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: expected a parquet file, got {_said(error)}; write it again") from error
    with table:
        columns = table.schema_arrow.names
        if "text" not in columns:
            raise CorpusError(f"{path}: expected a column named text, got {', '.join(columns)}; rename it")
        wanted = [name for name in ("id", "text", "source", "topic") if name in columns]
        number = 0
        batches = table.iter_batches(batch_size=1024, columns=wanted)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise CorpusError(
                    f"{path}: cannot be read beyond row {number} ({_said(error)}); write it again"
                ) from error
            for row in rows:
                number += 1
                yield to_document(row, f"{path.name}, row {number}", f"{path.name}:{number}", path.name)


def count_parquet(path: Path) -> int | None:
    """Rows of the table; None if it is none, which reading it reports."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return None


def read_folder(folder: Path) -> Rows:
    """One document a .txt file at any depth, in the order of their paths; the path is the id."""
    source = (folder.resolve() if folder.name in ("", "..") else folder).name
    found, unreadable = _texts(folder)
    for error in unreadable:
        yield BadRow(str(error.filename), f"folder not readable: {error.strerror}")
    for name in found:
        try:
            text = (folder / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            yield BadRow(name, "not UTF-8")
            continue
        except OSError as error:
            yield BadRow(name, f"not readable: {error.strerror}")
            continue
        yield Document(id=name, text=text, source=source, topic=None)


def count_folder(folder: Path) -> int:
    """Text files at any depth."""
    return len(_texts(folder)[0])


def _texts(folder: Path) -> tuple[list[str], list[OSError]]:
    """Paths of the text files below ``folder``, in order, and what kept its folders from being listed."""
    unreadable: list[OSError] = []
    found = [
        Path(parent, name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder, onerror=unreadable.append)  # Path.rglob would pass over them
        for name in names
        if name.endswith(".txt")
    ]
    return sorted(found), unreadable


def to_document(row: dict[str, Any], where: str, default_id: str, default_source: str) -> Document | BadRow:
    """A document from a row's ``text`` and, where they are given, ``id``, ``source`` and ``topic``."""
    text = row.get("text")
    if text is None:
        return BadRow(where, "without text")
    if not isinstance(text, str):
        return BadRow(where, "with a text that is not a string")
    if not text.strip():
        return BadRow(where, "empty")
    topic = row.get("topic")
    return Document(
        id=_name(row.get("id"), default_id),
        text=text,
        source=_name(row.get("source"), default_source),
        topic=None if topic is None else str(topic),
    )


def _said(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _name(value: object, default: str) -> str:
    return default if value is None or value == "" else str(value)
