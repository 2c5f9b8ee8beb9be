"""Questions as a model reads them, and the probability that it gives each letter.

An instruct model is asked through its tokenizer's chat template and answers after ``Answer: (``, as SAEBench
has it; a model without a template completes ``Answer:``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.unlearning.questions import LETTERS, Question
from tcsae.store.errors import ConfigError

INSTRUCTION = "The following are multiple choice questions (with answers) about {subject}."


def user_text(question: Question, order: Sequence[int], *, with_question: bool = True) -> str:
    """What the user asks: at letter i stands choice ``order[i]``.

    >>> one = Question("2 + 2?", ("3", "4", "5", "6"), 1, "simple_sums")
    >>> print(user_text(one, (1, 0, 2, 3)))
    The following are multiple choice questions (with answers) about simple sums.
    2 + 2?
    A. 4
    B. 3
    C. 5
    D. 6
    """
    lines = [INSTRUCTION.format(subject=question.subject.replace("_", " "))]
    if with_question:
        lines.append(question.question)
    lines += [f"{letter}. {question.choices[at]}" for letter, at in zip(LETTERS, order, strict=True)]
    return "\n".join(lines)


class Prompter:
    """Token ids of prompts, and of the letters, for one tokenizer.

    Raises
    ------
    ConfigError
        a letter is no single token
    """

    def __init__(self, tokenizer: Any, model: str) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._letters = [self._letter_ids(letter, model) for letter in LETTERS]

    @property
    def template(self) -> str:
        """How the prompts are made, in words."""
        return "the tokenizer's chat template, then 'Answer: ('" if self.has_template else "plain, 'Answer:'"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _letter_ids(self, letter: str, model: str) -> list[int]:
        """Ids of "A" and of " A", of those that are one token."""
        found = []
        for text in (letter, f" {letter}"):
            ids = self._ids(text)
            # a tokenizer without the letter gives its unknown token, or drops the space
            if len(ids) == 1 and self._tokenizer.decode(ids).strip() == letter:
                found.append(ids[0])
        if not found:
            raise ConfigError(
                f"{model}: its tokenizer has no single token for the answer {letter!r}, so multiple-choice "
                "questions cannot be scored; leave --questions-forget and --questions-retain out"
            )
        return list(dict.fromkeys(found))

    def input_ids(self, question: Question, order: Sequence[int], *, with_question: bool = True) -> list[int]:
        """The prompt, BOS in front where the tokenizer has one."""
        text = user_text(question, order, with_question=with_question)
        if self.has_template:
            chat = [{"role": "user", "content": text}]
            asked = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = self._ids(asked + "Answer: (")
        else:
            ids = self._ids(f"{text}\nAnswer:")
        bos = self._tokenizer.bos_token_id
        # templates of many models begin with the BOS themselves
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def letter_scores(self, log_probs: Float[Tensor, " vocab"]) -> Float[Tensor, " letter"]:
        """Log of max(p("A"), p(" A")) for each letter, over the whole vocabulary."""
        return torch.stack([log_probs[ids].max() for ids in self._letters])
