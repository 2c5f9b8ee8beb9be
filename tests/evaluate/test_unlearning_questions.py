"""Questions: files, prompts, letters, the filter in 24 orders, and the score on what is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tcsae.evaluate import EvaluateConfig
from tcsae.evaluate.unlearning.choice import ORDERS, Known, known_questions
from tcsae.evaluate.unlearning.prompts import Prompter, user_text
from tcsae.evaluate.unlearning.questions import LETTERS, Question, read_questions
from tcsae.harvest.model import LanguageModel
from tcsae.store.errors import ConfigError, CorpusError

GOOD = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "simple_sums"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


# Files -------------------------------------------------------------------------------------------------


def test_the_answer_is_an_index_or_a_letter_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, "", GOOD | {"answer": "b"}, GOOD | {"answer": "D"})
    assert [one.answer for one in read_questions(path)] == [1, 1, 3]
    assert read_questions(path)[0] == Question("2 + 2?", ("3", "4", "5", "6"), 1, "simple_sums")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "q.jsonl:2: not JSON"),
        ("[1]", r"q.jsonl:2: expected an object with question \(text\), .* got \[1\]"),
        ({k: v for k, v in GOOD.items() if k != "question"}, "q.jsonl:2: question: .* no such field among"),
        (GOOD | {"question": "  "}, "q.jsonl:2: question: expected a text, got '  '"),
        (GOOD | {"subject": 3}, "q.jsonl:2: subject: expected a text, got 3"),
        (GOOD | {"choices": ["a", "b", "c"]}, "q.jsonl:2: choices: expected a list of 4 texts, got 3 of"),
        (GOOD | {"choices": ["a", "b", "c", 4]}, "q.jsonl:2: choices: expected a list of 4 texts"),
        (GOOD | {"choices": "abcd"}, "q.jsonl:2: choices: expected a list of 4 texts, got 'abcd'"),
        (GOOD | {"answer": 4}, "q.jsonl:2: answer: expected 0-3 or one of A, B, C, D, got 4"),
        (GOOD | {"answer": "E"}, "q.jsonl:2: answer: .* got 'E'"),
        (GOOD | {"answer": True}, "q.jsonl:2: answer: .* got True"),
    ],
    ids=["not JSON", "no object", "no question", "an empty question", "a subject that is no text",
         "three choices", "a choice that is no text", "choices in one text", "an answer of 4", "an answer of E",
         "an answer that is true"],
)  # fmt: skip
def test_a_line_that_is_no_question_is_named_with_its_field(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_questions(write(tmp_path / "q.jsonl", GOOD, row))


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none.jsonl: cannot be read .*expected JSON lines"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(CorpusError, match="q.jsonl: holds no question"):
        read_questions(write(tmp_path / "q.jsonl", ""))


@pytest.mark.parametrize(
    ("choice", "is_tricky"),
    [
        ("All of the above", True),
        ("None of these", True),
        ("Both A and B", True),
        ("A, C", True),
        ("A and a half", False),
        ("Vitamin B", False),
        ("All cells", False),
    ],
)
def test_a_choice_that_refers_to_others_is_tricky(choice: str, is_tricky: bool) -> None:
    assert Question("?", ("x", "y", "z", choice), 0, "s").is_tricky == is_tricky


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions_forget": Path("a")}, "expected both files or none"),
        ({"questions_forget": Path("a"), "questions_retain": Path("b")}, "got 0; its documents select"),
        (
            {"questions_forget": Path("a"), "questions_retain": Path("b"), "forget": ("x", "y")},
            "expected the one topic that they are about, got 2",
        ),
    ],
    ids=["one file", "no topic", "two topics"],
)
def test_questions_need_both_files_and_one_topic(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(saes=(Path("run"),), out=Path("out"), store="store", **changes)


# Prompts -----------------------------------------------------------------------------------------------


class WordTokenizer:
    """A tokenizer of words that a test can read: its ids are indices into `words`, 0 is the BOS."""

    bos_token_id = 0
    chat_template: str | None = None

    def __init__(self, *lacking: str) -> None:
        self.words = ["<bos>", "?"]
        self._lacking = lacking

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        # a word with the space before it, as real tokenizers have it: " A" is not "A"
        parts = [f" {part}" if at else part for at, part in enumerate(text.split(" "))]
        if parts[0] == "":
            parts = [*parts[1:]]
        return {"input_ids": [self._id(part) for part in parts]}

    def _id(self, word: str) -> int:
        if word in self._lacking:
            return 1
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[at] for at in ids)

    def apply_chat_template(self, chat: list[dict[str, str]], **asked: bool) -> str:
        assert asked == {"tokenize": False, "add_generation_prompt": True}
        return f"<bos> <user> {chat[0]['content']} <model> "


def test_a_plain_prompt_ends_in_answer_and_begins_with_the_bos() -> None:
    tokenizer = WordTokenizer()
    one = Question("2 + 2?", ("3", "4", "5", "6"), 1, "sums")
    ids = Prompter(tokenizer, "m").input_ids(one, (3, 2, 1, 0))
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:]) == user_text(one, (3, 2, 1, 0)) + "\nAnswer:"
    assert "A. 6\nB. 5\nC. 4\nD. 3" in tokenizer.decode(ids)


def test_a_chat_template_is_used_where_there_is_one_and_its_bos_is_not_doubled() -> None:
    tokenizer = WordTokenizer()
    tokenizer.chat_template = "there is one"
    one = Question("2 + 2?", ("3", "4", "5", "6"), 1, "sums")
    ids = Prompter(tokenizer, "m").input_ids(one, ORDERS[0])
    assert ids.count(0) == 1
    assert tokenizer.decode(ids).endswith("D. 6 <model> Answer: (")


def test_the_question_can_be_left_out() -> None:
    one = Question("2 + 2?", ("3", "4", "5", "6"), 1, "sums")
    assert "2 + 2?" not in user_text(one, ORDERS[0], with_question=False)
    assert user_text(one, ORDERS[0], with_question=False).count("\n") == 4


def test_a_letter_scores_the_larger_of_itself_and_itself_after_a_space() -> None:
    tokenizer = WordTokenizer()
    for letter in LETTERS:
        tokenizer(f"x {letter}", add_special_tokens=False)
        tokenizer(letter, add_special_tokens=False)
    prompter = Prompter(tokenizer, "m")
    log_probs = torch.full((len(tokenizer.words),), -9.0)
    log_probs[tokenizer.words.index("A")] = -2.0
    log_probs[tokenizer.words.index("C")] = -1.0
    scores = prompter.letter_scores(log_probs)
    assert scores.tolist() == [-2.0, -9.0, -1.0, -9.0]


def test_a_tokenizer_without_the_letters_is_refused(neox: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="no single token for the answer 'A'"):
        Prompter(neox.tokenizer, neox.name)


# The filter --------------------------------------------------------------------------------------------


def asked_by(
    questions: Sequence[Question], knows: Sequence[str], log: list[tuple[int, ...]] | None = None
) -> Any:
    """A model that answers each question in its manner."""

    def ask(which: Sequence[int], order: Sequence[int], with_question: bool) -> list[int]:
        if log is not None:
            log.append(tuple(which))
        letters = []
        for at in which:
            right = list(order).index(questions[at].answer)
            manner = knows[at]
            guesses = manner == "guesses" or with_question
            letters.append(
                {
                    "always A": 0,
                    "knows": right if guesses else (right + 1) % 4,
                    "guesses": right,
                    "not if it is D": 0 if right == 3 else right,
                    "not in the last order": 0 if tuple(order) == ORDERS[-1] and right else right,
                }[manner]
            )
        return letters

    return ask


def test_only_questions_that_are_right_in_all_24_orders_are_known() -> None:
    assert len(set(ORDERS)) == 24
    assert ORDERS[0] == (0, 1, 2, 3)
    manners = ["always A", "knows", "guesses", "not if it is D", "not in the last order", "guesses"]
    questions = [Question("?", ("a", "b", "c", "d"), at % 3, "s") for at in range(6)]
    questions[5] = Question("?", ("a", "b", "c", "All of the above"), 0, "s")
    done: list[int] = []
    known = known_questions(questions, asked_by(questions, manners), done.append)
    assert known.correct == (1, 2, 5)
    assert known.correct_iff_question == (1,)
    assert known.correct_no_tricks == (1, 2)
    assert known.n_questions == 6
    # question 0 has its answer at A in the file's order
    assert known.right_in_order == 6
    assert known.survivors[-1] == 3
    assert known.survivors[-2] == 4
    assert sum(done) == 6 * 48


def test_a_question_is_not_asked_again_once_it_is_lost() -> None:
    questions = [Question("?", ("a", "b", "c", "d"), 1, "s")] * 3
    log: list[tuple[int, ...]] = []
    done: list[int] = []
    known = known_questions(questions, asked_by(questions, ["always A"] * 3, log), done.append)
    assert known == Known(3, 0, (0,) * 24, (), (), ())
    assert log == [(0, 1, 2)]
    assert sum(done) == 3 * 48
