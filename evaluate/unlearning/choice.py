"""The multiple-choice protocol: which questions the untouched model really knows, and which are lost.

A question is known if the model is right in all 24 orders of its choices. Interventions are scored on the
known questions in the order of the file, where the untouched model is right by construction:

    score = 1 - min over settings of the accuracy on the forget questions
            with accuracy on the retain questions >= 0.99

This is SAEBench's definition, and with its absolute multipliers SAEBench's figure. Its setting is chosen on
the questions it is scored on, so the honest form stands beside it (`score`), and random features as a control.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.evaluate.splice import Splicer
from tcsae.evaluate.unlearning.clamp import MULTIPLES, settings_of
from tcsae.evaluate.unlearning.prompts import Prompter
from tcsae.evaluate.unlearning.questions import LETTERS, Question
from tcsae.evaluate.unlearning.replay import ClampedReplay, batch_of
from tcsae.evaluate.unlearning.score import TopicSums
from tcsae.evaluate.unlearning.select import Activity
from tcsae.train.sae.inference import SAE

ORDERS = tuple(itertools.permutations(range(len(LETTERS))))
"""All 24; the first is the order of the file."""

ABSOLUTE = (25.0, 50.0, 100.0, 200.0)
"""SAEBench's multipliers: features are clamped to minus these, whatever their scale."""

RETAIN_ERRORS = 0.01
"""Share of the retain questions that may be lost."""

MIN_KNOWN = 8
"""Questions of either file that the model must know for a score to be given: an honest one halves them."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt with the untouched model's activations at the hook."""

    input_ids: Int64[Tensor, " position"]
    """BOS included"""
    keep: Bool[Tensor, " position"]
    """where features may be clamped: neither the first position nor a special token"""
    x: Float[Tensor, "position d_model"]
    """activations at the hook"""
    letter: int
    """index of the letter that the model gives"""


@dataclass(frozen=True, slots=True)
class Known:
    """Which questions of a file the model knows, by index."""

    n_questions: int
    """in the file"""
    right_in_order: int
    """right in the order of the file; a quarter of them is chance"""
    survivors: tuple[int, ...]
    """still right after the first order, the second, ..., all 24"""
    correct: tuple[int, ...]
    """right in all 24 orders"""
    correct_iff_question: tuple[int, ...]
    """of these, not right in all 24 orders when the question itself is left out"""
    correct_no_tricks: tuple[int, ...]
    """of the correct ones, those without choices such as "All of the above" """


Ask = Callable[[Sequence[int], Sequence[int], bool], Sequence[int]]
"""(indices of questions, order of choices, with the question) -> index of the letter given to each."""


def known_questions(questions: Sequence[Question], ask: Ask, advance: Callable[[int], None]) -> Known:
    """Ask every question in all 24 orders until it is answered wrongly once.

    ``advance`` is told of prompts that are done or need not be asked: 48 a question in all.
    """

    def right_in_all(asked: Sequence[int], with_question: bool) -> list[tuple[int, ...]]:
        rounds = []
        alive = tuple(asked)
        for at, order in enumerate(ORDERS):
            letters = ask(alive, order, with_question) if alive else ()
            right = tuple(
                q for q, letter in zip(alive, letters, strict=True) if order[letter] == questions[q].answer
            )
            # a question that is lost needs none of the orders that are left
            advance(len(alive) + (len(alive) - len(right)) * (len(ORDERS) - 1 - at))
            alive = right
            rounds.append(alive)
        return rounds

    rounds = right_in_all(range(len(questions)), True)
    correct = rounds[-1]
    advance((len(questions) - len(correct)) * len(ORDERS))
    guessed = set(right_in_all(correct, False)[-1])
    return Known(
        n_questions=len(questions),
        right_in_order=len(rounds[0]),
        survivors=tuple(len(alive) for alive in rounds),
        correct=correct,
        correct_iff_question=tuple(q for q in correct if q not in guessed),
        correct_no_tricks=tuple(q for q in correct if not questions[q].is_tricky),
    )


@torch.no_grad()
def answered(
    splicer: Splicer,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    special_token_ids: Sequence[int],
    batch_size: int,
) -> list[Prompt]:
    """Each prompt through the untouched model, in the order given; longest first inside."""
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    found: dict[int, Prompt] = {}
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        blank = [_blank(prompts[at], special_token_ids) for at in part]
        batch = batch_of(blank)
        x = splicer.activations(batch)
        log_probs = splicer.log_probs(batch, x)
        for row, (at, one) in enumerate(zip(part, blank, strict=True)):
            length = len(one.input_ids)
            letter = int(prompter.letter_scores(log_probs[row, length - 1]).argmax())
            found[at] = Prompt(one.input_ids, one.keep, x[row, :length].clone(), letter)
    return [found[at] for at in range(len(prompts))]


def _blank(input_ids: Sequence[int], special_token_ids: Sequence[int]) -> Prompt:
    ids = torch.tensor(list(input_ids))
    keep = ~torch.isin(ids, torch.tensor(list(special_token_ids), dtype=ids.dtype))
    keep[0] = False
    return Prompt(ids, keep, torch.empty(len(ids), 0), -1)


def question_sums(
    splicer: Splicer,
    sae: SAE,
    prompter: Prompter,
    prompts: Sequence[Prompt],
    right: Sequence[int],
    is_forget: Bool[np.ndarray, " question"],
    activity: Activity,
    *,
    absolute: bool,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> TopicSums:
    """Every setting on the known questions; a question stands for a document, losing it for a rise of 1.

    ``right`` is the letter of each prompt's right choice; ``absolute`` clamps to SAEBench's -25 to -200, else
    to -m times each feature's mean active value.
    """
    settings = settings_of(activity, seed, ABSOLUTE if absolute else MULTIPLES)
    features = sorted({feature for setting in settings for feature in setting.features})
    replay = ClampedReplay(splicer, sae, prompts, features, batch_size)
    lost = np.zeros((len(prompts), len(settings)))
    for at, setting in enumerate(settings):
        scale = np.ones(sae.d_sae) if absolute else activity.mean_active
        to = [-setting.multiple * float(scale[feature]) for feature in setting.features]
        for question, log_probs in replay.rerun(setting.features, to):
            letter = int(prompter.letter_scores(log_probs[-1]).argmax())
            lost[question, at] = float(letter != right[question])
        advance(1)
    return TopicSums(
        settings=tuple(settings),
        is_forget=is_forget,
        n=np.ones(len(prompts)),
        loss=np.zeros(len(prompts)),
        hits=np.ones(len(prompts)),
        rise=lost,
        hits_with=1.0 - lost,
        limit=RETAIN_ERRORS,
    )
