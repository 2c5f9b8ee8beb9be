"""The multiple-choice protocol end to end, on a tiny model that was trained to answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tcsae.evaluate import EvaluateConfig, evaluate
from tcsae.evaluate.unlearning.choice import ABSOLUTE, ORDERS
from tcsae.evaluate.unlearning.examination import Examination, QuestionFile
from tcsae.evaluate.unlearning.questions import read_questions
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae

from .conftest import made_by

StoreFactory = Callable[..., ActivationStore]

HOOK = "blocks.0.hook_resid_pre"
"""the tokens themselves: above the first block, the last position may know the answer already"""

HEAD = ["The", "following", "are", "multiple", "choice", "questions", "(", "with", "answers", ")", "about"]
RIGHT = {"biology": [f"b{i}" for i in range(6)], "sums": [f"o{i}" for i in range(6)]}
WRONG = [f"x{i}" for i in range(12)]
WORDS = [
    "<|endoftext|>",
    *HEAD,
    *[".", ":", "Answer", "A", "B", "C", "D", "biology", "sums", "which", "one", "?"],
]
WORDS += [*RIGHT["biology"], *RIGHT["sums"], *WRONG]


class Trained(NamedTuple):
    """A model that knows which choice is right: the one that is no x."""

    folder: Path
    model: LanguageModel


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("answers")
    config = GPTNeoXConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
        rotary_pct=0.5,
    )
    chance = random.Random(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(200):
            rows = torch.tensor([_answered_prompt(chance) for _ in range(32)])
            logits = model(rows[:, :-1]).logits[:, -1]
            loss = torch.nn.functional.cross_entropy(logits, rows[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.1  # else nothing below means anything
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return Trained(folder, load_model(str(folder), device="cpu"))


def _ids(words: Sequence[str]) -> list[int]:
    return [WORDS.index(word) for word in words]


def _answered_prompt(chance: random.Random) -> list[int]:
    subject = chance.choice(sorted(RIGHT))
    at = chance.randrange(4)
    choices = chance.sample(WRONG, 3)
    choices.insert(at, chance.choice(RIGHT[subject]))
    words = [*HEAD, subject, ".", "which", "one", "?"]
    for letter, choice in zip("ABCD", choices, strict=True):
        words += [letter, ".", choice]
    return [0, *_ids([*words, "Answer", ":", "ABCD"[at]])]


def write_questions(path: Path, subject: str, n: int, *, right: str | None = None) -> Path:
    """``n`` different questions; ``right`` in the place of the right choice makes them unanswerable."""
    lines = []
    for i in range(n):
        choices = [WRONG[i % 12], WRONG[(i + 1) % 12], WRONG[(i + 5) % 12]]
        choices.insert(i % 4, right or RIGHT[subject][i % 6])
        lines.append({"question": "which one ?", "choices": choices, "answer": i % 4, "subject": subject})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def asked(trained: Trained, make_store: StoreFactory, tmp_path: Path) -> EvaluateConfig:
    """Documents that are prompts, those with an even number on biology, and an SAE whose feature 0 fires on
    the right choices of biology alone; clamped below 0 it makes them look like wrong ones.
    """
    model, chance = trained.model, random.Random(1)
    biology = _ids(RIGHT["biology"])
    prompts = [_answered_prompt(chance) for _ in range(200)]
    is_biology = [any(token in biology for token in prompt) for prompt in prompts]
    of_either = [
        [one for one, on_topic in zip(prompts, is_biology, strict=True) if on_topic == wanted]
        for wanted in (True, False)
    ]
    ids = torch.tensor([of_either[i % 2][i // 2] for i in range(80)])
    x = model.residuals(ids, [HOOK])[HOOK][:, 1:].clone().flatten(0, 1)
    tokens = ids[:, 1:].flatten()
    n = ids.shape[1] - 1
    store = make_store(
        x, [n] * 80, context_rows=n, tokens=tokens.numpy(), **(made_by(model) | {"hooks": (HOOK,)})
    )
    right, wrong = (torch.isin(tokens, torch.tensor(words)) for words in (biology, _ids(WRONG)))
    with_one = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    # fewer words than dimensions: a feature can tell the right ones from all others
    weight = torch.linalg.lstsq(with_one, right.double()[:, None]).solution[:-1, 0].float()
    threshold = (x @ weight)[~right].max() + 1e-3
    noise = torch.Generator().manual_seed(2)
    W_dec = torch.nn.functional.normalize(torch.randn(9, 64, generator=noise), dim=1)
    # the smallest of SAEBench's multipliers takes a right choice to where the wrong ones are
    W_dec[0] = (x[right].mean(dim=0) - x[wrong].mean(dim=0)) / ABSOLUTE[0]
    sae = SAE(
        architecture="standard",
        W_enc=torch.cat([weight[:, None], torch.randn(64, 8, generator=noise)], dim=1),
        b_enc=torch.cat([-threshold[None], torch.zeros(8)]),
        W_dec=W_dec,
        b_dec=torch.zeros(64),
        name="planted-s0",
        metadata={"model_name": model.name, "hook_name": HOOK},
    )
    save_sae(sae, tmp_path / "sae")
    return EvaluateConfig(
        saes=(tmp_path / "sae",),
        out=tmp_path / "out",
        store=store.path,
        suites=("unlearning",),
        split="all",
        forget=("even",),
        domain_tokens=600,
        questions_forget=write_questions(tmp_path / "biology.jsonl", "biology", 12),
        questions_retain=write_questions(tmp_path / "sums.jsonl", "sums", 12),
        n_bootstrap=100,
        device="cpu",
    )


def test_known_questions_are_saved_and_interventions_are_scored_on_them(
    trained: Trained, asked: EvaluateConfig
) -> None:
    evaluation = evaluate(asked)
    body = json.loads((asked.out / "unlearning" / "planted-s0.json").read_text())
    assert body["eval_type_id"] == "unlearning"
    assert body["eval_config"]["multipliers"] == list(ABSOLUTE)
    ours = body["eval_result_unstructured"]["tcsae"]["questions"]
    for side in ("forget", "retain"):
        assert ours[side]["n_questions"] == 12
        assert len(ours[side]["correct"]) >= 8
        # without "which one ?" the right choice is still the one that is no x
        assert len(ours[side]["survivors"]) == len(ORDERS)
    saved = json.loads((asked.out / "unlearning" / "questions" / "known.json").read_text())
    assert saved["forget"]["known"]["correct"] == ours["forget"]["correct"]
    score = evaluation.rows[0].estimates["unlearning_questions_score"]
    assert body["eval_result_metrics"] == {"unlearning": {"unlearning_score": score.value}}
    _check_against_whole_passes(trained.model, asked, ours)
    # the best of the settings that lose at most a hundredth of the other questions
    allowed = [
        one["forget_lost"]
        for one in ours["absolute"]["settings"]
        if one["kind"] == "selected" and one["retain_lost"] <= 0.01
    ]
    assert score.value == pytest.approx(max([0.0, *allowed]))
    assert score.value is not None
    assert score.value > 0.3


def _check_against_whole_passes(model: LanguageModel, asked: EvaluateConfig, ours: dict[str, Any]) -> None:
    """Every setting of SAEBench's multipliers again, one prompt at a time, the reconstruction written out."""
    from tcsae.train.saelens import load_sae

    sae = load_sae(asked.saes[0])
    for setting in ours["absolute"]["settings"][:: len(ABSOLUTE) - 1]:
        for side, path in (("forget", asked.questions_forget), ("retain", asked.questions_retain)):
            assert path is not None
            questions = read_questions(path)
            lost = 0
            for at in ours[side]["correct"]:
                one = questions[at]
                words = [*HEAD, one.subject, ".", "which", "one", "?"]
                for letter, choice in zip("ABCD", one.choices, strict=True):
                    words += [letter, ".", choice]
                ids = torch.tensor([[0, *_ids([*words, "Answer", ":"])]])

                def edit(x: torch.Tensor, setting: dict[str, Any] = setting) -> torch.Tensor:
                    f = sae.encode(x)
                    f[:, 0] = 0
                    error = x - sae.decode(f)
                    for feature in setting["features"]:
                        f[:, :, feature][f[:, :, feature] > 0] = -setting["multiple"]
                    return sae.decode(f) + error

                logits = model.logits(ids, HOOK, edit)[0, -1]
                lost += int(logits[_ids("ABCD")].argmax()) != one.answer
            assert setting[f"{side}_lost"] == pytest.approx(lost / len(ours[side]["correct"]))


def test_a_model_that_does_not_know_the_answers_is_refused_with_numbers(
    trained: Trained, tmp_path: Path
) -> None:
    files = tuple(
        QuestionFile(path, "sha", tuple(read_questions(path)))
        for path in (
            # every choice is an x: nothing tells the right one
            write_questions(tmp_path / "hopeless.jsonl", "biology", 12, right="x9"),
            write_questions(tmp_path / "sums.jsonl", "sums", 12),
        )
    )
    with pytest.raises(
        ConfigError,
        match=r"hopeless.jsonl: .* answers \d of 12 questions right in all 24 orders .* chance is 3\); expected "
        "at least 8",
    ):
        Examination(trained.model, HOOK, (files[0], files[1]), tmp_path / "known.json", 16)


@pytest.mark.slow
def test_smollm2_answers_with_one_letter_and_is_refused_even_on_the_easiest_questions(tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "data" / "questions"
    forget, retain = (
        QuestionFile(path, "sha", tuple(read_questions(path)))
        for path in (data / "biology.jsonl", data / "other.jsonl")
    )
    with pytest.raises(
        ConfigError, match=r"answers 0 of 20 questions right in all 24 orders .*\(6 in the order"
    ):
        Examination(
            load_model("smollm2", device="cpu"),
            "blocks.9.hook_resid_post",
            (forget, retain),
            tmp_path / "known.json",
            16,
        )
