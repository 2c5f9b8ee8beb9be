"""The multiple-choice protocol on two files: known questions, saved once, and every SAE's score on them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.estimates import Draws, Estimate
from tcsae.evaluate.splice import ReplayModel, Splicer
from tcsae.evaluate.unlearning.choice import (
    ABSOLUTE,
    MIN_KNOWN,
    ORDERS,
    RETAIN_ERRORS,
    Known,
    Prompt,
    answered,
    known_questions,
    question_sums,
)
from tcsae.evaluate.unlearning.clamp import MULTIPLES
from tcsae.evaluate.unlearning.prompts import Prompter
from tcsae.evaluate.unlearning.questions import LETTERS, Question, read_questions, subjects_of
from tcsae.evaluate.unlearning.score import (
    FIGURES,
    chosen_setting,
    draws_of,
    figure_estimate,
    score_bootstraps,
    setting_rows,
    strata_of,
    undefined_figures,
)
from tcsae.evaluate.unlearning.select import NUMBERS, THRESHOLDS, Activity
from tcsae.store.atomic import write_atomically
from tcsae.store.errors import ConfigError, RunError
from tcsae.store.progress import progress
from tcsae.train.sae.inference import SAE

log = logging.getLogger(__name__)

SCALES = ("absolute", "relative")
"""SAEBench's multipliers, and ours: multiples of each feature's mean active value."""

SHOWN = tuple(figure for figure in FIGURES if not figure.startswith("interpolated"))
"""Figures of the questions: between two counts of questions there is nothing to interpolate."""

N_QUESTION_SETTINGS = 2 * len(THRESHOLDS) * len(NUMBERS) * (len(ABSOLUTE) + len(MULTIPLES))
"""Interventions on the known questions of one SAE, the controls' included."""


@runtime_checkable
class QuestionedModel(ReplayModel, Protocol):
    """What is asked of a model that answers questions; `tcsae.harvest.model.LanguageModel` is one."""

    name: str
    sha256: str
    tokenizer_sha256: str
    tokenizer: Any
    special_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """One file of questions."""

    path: Path
    """where it is"""
    sha256: str
    """of its bytes"""
    questions: tuple[Question, ...]
    """in its order"""


def question_files(config: EvaluateConfig) -> tuple[QuestionFile, QuestionFile] | None:
    """The forget and the retain file that ``config`` names, None if it names none; raises as `read_questions`."""
    if config.questions_forget is None or config.questions_retain is None:
        return None
    forget, retain = (
        # read first: a folder or a missing file is said to be one in the words of questions
        QuestionFile(path, questions=tuple(read_questions(path)), sha256=_sha256(path))
        for path in (config.questions_forget, config.questions_retain)
    )
    return forget, retain


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Examined:
    """One SAE's part of the protocol."""

    estimates: dict[str, Estimate]
    """``unlearning_questions_<figure>`` with SAEBench's multipliers, ``..._relative_<figure>`` with ours"""
    draws: dict[str, Draws]
    """of those that have an interval, over questions"""
    facts: dict[str, Any]
    """known questions and every setting's row"""


class Examination:
    """The questions as one model at one hook knows them.

    Parameters
    ----------
    model
        what is asked
    hook
        where features will be clamped
    files
        forget and retain questions
    saved
        JSON file that keeps which questions are known, so that they are asked once
    batch_size
        prompts of one forward pass

    Raises
    ------
    ConfigError
        the model knows fewer than `MIN_KNOWN` questions of a file, or its tokenizer has no letters
    RunError
        ``saved`` holds something else
    """

    def __init__(
        self,
        model: QuestionedModel,
        hook: str,
        files: tuple[QuestionFile, QuestionFile],
        saved: Path,
        batch_size: int,
    ) -> None:
        self._model = model
        self._splicer = Splicer(model, hook)
        self._prompter = Prompter(model.tokenizer, model.name)
        self._files = files
        self._batch_size = batch_size
        self.known = self._known(saved)
        for file, known in zip(files, self.known, strict=True):
            if len(known.correct) < MIN_KNOWN:
                raise ConfigError(
                    f"{file.path}: {model.name} answers {len(known.correct)} of {known.n_questions} questions "
                    f"right in all {len(ORDERS)} orders of their choices ({known.right_in_order} in the order "
                    f"of the file, chance is {known.n_questions / len(LETTERS):g}); expected at least "
                    f"{MIN_KNOWN}: take easier questions or a larger model, or leave the questions out"
                )
        self._asked = [
            (file.questions[at], is_forget)
            for file, known, is_forget in zip(files, self.known, (True, False), strict=True)
            for at in known.correct
        ]
        self._prompts = self._answer([question for question, _ in self._asked], ORDERS[0], True)

    def _answer(
        self, questions: Sequence[Question], order: Sequence[int], with_question: bool
    ) -> list[Prompt]:
        ids = [self._prompter.input_ids(one, order, with_question=with_question) for one in questions]
        return answered(self._splicer, self._prompter, ids, self._model.special_token_ids, self._batch_size)

    def _known(self, saved: Path) -> tuple[Known, Known]:
        """What the model knows, read where it is saved for the same model and files, else asked and saved."""
        print_ = hashlib.sha256(
            json.dumps(
                [
                    self._model.sha256,
                    self._model.tokenizer_sha256,
                    self._prompter.template,
                    *(file.sha256 for file in self._files),
                ]
            ).encode()
        ).hexdigest()
        if saved.is_file():
            kept = _read_known(saved, print_)
            if kept is not None:
                return kept
        n_prompts = sum(2 * len(ORDERS) * len(file.questions) for file in self._files)
        found = []
        with progress(n_prompts, "prompt", "questions") as bar:
            for file in self._files:

                def ask(
                    which: Sequence[int],
                    order: Sequence[int],
                    with_question: bool,
                    file: QuestionFile = file,
                ) -> list[int]:
                    asked = [file.questions[at] for at in which]
                    return [one.letter for one in self._answer(asked, order, with_question)]

                found.append(known_questions(file.questions, ask, bar.update))
        body: dict[str, Any] = {
            "fingerprint": print_,
            "model": self._model.name,
            "prompts": self._prompter.template,
        }
        for side, file, known in zip(("forget", "retain"), self._files, found, strict=True):
            body[side] = {"file": file.path.name, "sha256": file.sha256, "known": asdict(known)}
            log.info(
                "%s: %d of %d questions right in all orders", file.path, len(known.correct), known.n_questions
            )
        write_atomically(saved, (json.dumps(body, indent=1) + "\n").encode())
        return found[0], found[1]

    def examine(
        self, sae: SAE, activity: Activity, n_bootstrap: int, seed: int, advance: Callable[[int], None]
    ) -> Examined:
        """Clamp the features that ``activity`` selects; ``advance`` is told of each setting that is done."""
        is_forget = np.array([is_forget for _, is_forget in self._asked])
        right = [question.answer for question, _ in self._asked]
        estimates: dict[str, Estimate] = {}
        draws: dict[str, Draws] = {}
        facts: dict[str, Any] = {
            "prompts": self._prompter.template,
            "resampled": "questions, in the place of documents",
            "retain_accuracy_limit": 1 - RETAIN_ERRORS,
        }
        for side, file, known in zip(("forget", "retain"), self._files, self.known, strict=True):
            facts[side] = {
                "file": file.path.name,
                "sha256": file.sha256,
                "subjects": subjects_of(file.questions),
                **asdict(known),
            }
        for scale in SCALES:
            sums = question_sums(
                self._splicer,
                sae,
                self._prompter,
                self._prompts,
                right,
                is_forget,
                activity,
                absolute=scale == "absolute",
                seed=seed,
                batch_size=self._batch_size,
                advance=advance,
            )
            boots = score_bootstraps(sums, strata_of([is_forget]), n_bootstrap, seed)
            undefined = undefined_figures(sums)
            prefix = "unlearning_questions_" if scale == "absolute" else "unlearning_questions_relative_"
            for figure in SHOWN:
                name, one = f"{prefix}{figure}", draws_of(boots[figure])
                estimates[name], kept = figure_estimate(
                    name, "fraction of questions", one, len(right), undefined.get(figure)
                )
                if kept is not None:
                    draws[name] = kept
            facts[scale] = {
                "chosen": {kind: chosen_setting(sums, kind) for kind in ("selected", "control")},
                "settings": [_renamed(row) for row in setting_rows(sums, boots["rises"])],
            }
        return Examined(estimates, draws, facts)


def _read_known(saved: Path, wanted: str) -> tuple[Known, Known] | None:
    """What was saved under the fingerprint ``wanted``, None if it was saved under another."""
    try:
        body = json.loads(saved.read_bytes())
        if body["fingerprint"] != wanted:
            return None
        forget, retain = (
            Known(**{name: _tuple(value) for name, value in body[side]["known"].items()})
            for side in ("forget", "retain")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{saved}: not what tcsae wrote ({error!r}); delete it to ask again") from error
    return forget, retain


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A setting's row in the words of questions: what is lost is a share of them, not nats."""
    return {name.replace("_rise", "_lost"): value for name, value in row.items()}
