"""Multiple-choice questions in local JSON lines files: four choices, one right answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcsae.store.errors import CorpusError

LETTERS = ("A", "B", "C", "D")

FIELDS = "question (text), choices (4 texts), answer (0-3 or A-D), subject (text)"

TRICK = re.compile(
    r"(?i:\b(all|none|both|neither|any)\s+of\s+(the|these|those)\b)|\b[A-D]\s*(,|and|or|&)\s*[A-D]\b"
)
"""Choices that refer to other choices, such as "A and B" or "All of the above"."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question."""

    question: str
    """its text"""
    choices: tuple[str, ...]
    """four, in the order of the file"""
    answer: int
    """index of the right one, 0-3"""
    subject: str
    """such as ``biology`` or ``human_aging``"""

    @property
    def is_tricky(self) -> bool:
        """Whether a choice refers to other choices, so that their order matters."""
        return any(TRICK.search(choice) for choice in self.choices)


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON lines file; empty lines are skipped.

    Raises
    ------
    CorpusError
        no such file, no question in it, or a line that is not one: the line and the field are named
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); expected JSON lines with {FIELDS}") from error
    questions = [_question(line, f"{path}:{at}") for at, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise CorpusError(f"{path}: holds no question; expected JSON lines with {FIELDS}")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON ({error}); expected an object with {FIELDS}") from error
    if not isinstance(fields, dict):
        raise CorpusError(f"{where}: expected an object with {FIELDS}, got {line.strip()[:60]}")
    return Question(
        _text(fields, "question", where),
        _choices(fields.get("choices"), where),
        _answer(fields.get("answer"), where),
        _text(fields, "subject", where),
    )


def _text(fields: dict[str, Any], field: str, where: str) -> str:
    value = fields.get(field)
    if not isinstance(value, str) or not value.strip():
        raise CorpusError(f"{where}: {field}: expected a text, got {_shown(fields, field)}")
    return value


def _choices(value: Any, where: str) -> tuple[str, ...]:
    is_list = isinstance(value, list)
    if not is_list or len(value) != len(LETTERS) or not all(isinstance(one, str) for one in value):
        got = f"{len(value)} of {value!r}" if is_list else repr(value)
        raise CorpusError(f"{where}: choices: expected a list of {len(LETTERS)} texts, got {got}")
    return tuple(value)


def _answer(value: Any, where: str) -> int:
    if isinstance(value, str) and value.strip().upper() in LETTERS:
        return LETTERS.index(value.strip().upper())
    # True is an int to Python, not to whoever wrote it
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LETTERS):
        return value
    raise CorpusError(f"{where}: answer: expected 0-3 or one of {', '.join(LETTERS)}, got {value!r}")


def _shown(fields: dict[str, Any], field: str) -> str:
    return repr(fields[field]) if field in fields else f"no such field among {', '.join(fields) or 'none'}"


def subjects_of(questions: Sequence[Question]) -> list[str]:
    """Their subjects, each once, in order."""
    return list(dict.fromkeys(question.subject for question in questions))
