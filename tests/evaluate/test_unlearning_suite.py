"""Unlearning end to end, on a model, documents and an SAE in which one feature carries a topic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate, table
from tcsae.evaluate.unlearning.clamp import MULTIPLES, Setting
from tcsae.evaluate.unlearning.parts import Parts
from tcsae.evaluate.unlearning.score import TopicSums
from tcsae.evaluate.unlearning.topics import TopicReplay, draw_domains
from tcsae.evaluate.unlearning_plot import UnlearningRow, frontier, read_unlearning_rows
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, RunError, StoreMismatch, UnknownName
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae

from .conftest import HOOK, VOCAB, made_by

StoreFactory = Callable[..., ActivationStore]

N_DENSE = 24
"""Features that fire on everything, after the planted one."""


class Planted(NamedTuple):
    """Documents with an even number hold tokens of one half of the vocabulary, those with an odd number of
    the other half; feature 0 fires on rows of even documents alone, the others on rows of both."""

    store: ActivationStore
    sae: SAE


class _Made(NamedTuple):
    x: torch.Tensor
    lengths: list[int]
    tokens: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def made(neox: LanguageModel) -> _Made:
    """Activations and tokens of 48 documents of 14 to 30 tokens, in contexts of 15.

    The tokens are those of one half of the vocabulary that the model itself finds likely, so that disturbing
    it makes them less so.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = np.random.default_rng(1).integers(14, 31, size=48).tolist()
    allowed = torch.zeros(48, VOCAB, dtype=torch.bool)
    allowed[::2, 1 : VOCAB // 2] = True
    allowed[1::2, VOCAB // 2 :] = True
    rows, tokens = [], []
    for _ in range(2):
        ids = torch.zeros(48, 1, dtype=torch.int64)
        while ids.shape[1] < 16:
            p = torch.softmax(neox.logits(ids)[:, -1].masked_fill(~allowed, -torch.inf), dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
        rows.append(neox.residuals(ids, [HOOK])[HOOK][:, 1:].clone())
        tokens.append(ids[:, 1:])
    x, text = torch.cat(rows, dim=1), torch.cat(tokens, dim=1)
    return _Made(
        torch.cat([x[at, :n] for at, n in enumerate(lengths)]),
        lengths,
        torch.cat([text[at, :n] for at, n in enumerate(lengths)]).numpy(),
    )


@pytest.fixture
def planted(make_store: StoreFactory, neox: LanguageModel, made: _Made) -> Planted:
    store = make_store(made.x, made.lengths, context_rows=15, tokens=made.tokens, **made_by(neox))
    return Planted(store, _planted_sae(made.x, store, neox))


def _planted_sae(x: torch.Tensor, store: ActivationStore, model: LanguageModel) -> SAE:
    document = np.repeat(np.arange(store.n_documents), np.diff(store.document_offsets))
    is_even = torch.from_numpy(document % 2 == 0)
    with_one = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    weight = torch.linalg.lstsq(with_one, is_even.double()[:, None]).solution[:-1, 0].float()
    threshold = (x @ weight)[~is_even].max() + 1e-3
    generator = torch.Generator().manual_seed(2)
    W_enc = torch.cat([weight[:, None], torch.randn(16, N_DENSE, generator=generator)], dim=1)
    W_dec = torch.nn.functional.normalize(torch.randn(N_DENSE + 1, 16, generator=generator), dim=1)
    W_dec[0] *= 20 * x.norm(dim=1).mean()
    return SAE(
        architecture="standard",
        W_enc=W_enc,
        b_enc=torch.cat([-threshold[None], torch.zeros(N_DENSE)]),
        W_dec=W_dec,
        b_dec=torch.zeros(16),
        name="planted-s0",
        metadata={"model_name": model.name, "hook_name": HOOK},
    )


def config_of(planted: Planted, folder: Path, *saes: SAE, **changes: Any) -> EvaluateConfig:
    for sae in saes or (planted.sae,):
        save_sae(sae, folder / "run" / "sae" / sae.name)
    fields: dict[str, Any] = {
        "saes": (folder / "run",),
        "out": folder / "out",
        "store": planted.store.path,
        "suites": ("unlearning",),
        "split": "all",
        "forget": ("even",),
        "domain_tokens": 10_000,
        "batch_size": 8,
        "n_bootstrap": 200,
        "device": "cpu",
    }
    return EvaluateConfig(**(fields | changes))


def ours(evaluation: Evaluation, sae: str = "planted-s0") -> dict[str, Any]:
    body = json.loads((evaluation.out / "unlearning" / f"{sae}.json").read_text())
    found: dict[str, Any] = body["eval_result_unstructured"]["tcsae"]
    return found


# The planted topic -------------------------------------------------------------------------------------


def test_the_planted_feature_alone_is_found_raises_its_topics_loss_and_leaves_the_rest_as_it_was(
    planted: Planted, tmp_path: Path
) -> None:
    evaluation = evaluate(config_of(planted, tmp_path))
    (topic,) = ours(evaluation)["topics"]
    settings = [one for one in topic["settings"] if one["kind"] == "selected"]
    assert len(settings) == 4 * len(MULTIPLES)
    assert {tuple(one["features"]) for one in settings} == {(0,)}
    assert {one["retain_rise"] for one in settings} == {0.0}  # to the last bit
    rises = [one["forget_rise"] for one in settings[: len(MULTIPLES)]]
    assert min(rises) > 0.05
    estimates = evaluation.rows[0].estimates
    assert estimates["unlearning_score_even"].value == pytest.approx(max(rises))
    assert estimates["unlearning_score"].value == estimates["unlearning_score_even"].value
    low, honest = estimates["unlearning_score_even"].low, estimates["unlearning_honest_even"].value
    assert low is not None
    assert low > 0.02
    assert honest is not None
    assert honest > 0.05
    assert estimates["unlearning_honest_retain_even"].value == 0.0
    assert "selected, threshold 0.001: 1 of 10" in topic["fewer_features_than_wanted"]
    # a random feature that fires as often raises the loss of both
    controls = [one for one in topic["settings"] if one["kind"] == "control"]
    assert min(one["retain_rise"] for one in controls if one["multiple"] == 50.0) > 0.02


def test_the_other_topic_has_no_feature_and_the_mean_over_both_is_undefined_with_the_reason(
    planted: Planted, tmp_path: Path
) -> None:
    evaluation = evaluate(config_of(planted, tmp_path, forget=("even", "odd")))
    estimates = evaluation.rows[0].estimates
    assert estimates["unlearning_score_odd"].value is None
    assert "no feature that fires on the forget documents has a density below 0.01" in str(
        estimates["unlearning_score_odd"].reason
    )
    assert estimates["unlearning_score"].reason == "undefined, because it is for odd"
    assert estimates["unlearning_score_even"].value is not None
    assert "no feature that fires" in table(evaluation).replace("\n  ", " ")


# Against an independent computation --------------------------------------------------------------------


def slow_rise(
    planted: Planted,
    model: LanguageModel,
    contexts: np.ndarray[Any, Any],
    features: list[int],
    to: list[float],
) -> tuple[float, float, float]:
    """Mean rise and the accuracies without and with, token by token, from whole passes and both decodings."""
    sae, store = planted.sae, planted.store
    n, losses, hits = 0, [0.0, 0.0], [0, 0]
    for context in contexts:
        start, stop = store.context_offsets[context], store.context_offsets[context + 1]
        tokens = [0, *store.tokens[start:stop].tolist()]
        ids = torch.tensor([tokens])

        def edit(x: torch.Tensor, tokens: list[int] = tokens) -> torch.Tensor:
            y = x.clone()
            for t, token in enumerate(tokens):
                if token == 0:
                    continue
                f = sae.encode(x[0, t])
                error = x[0, t] - sae.decode(f)
                for feature, value in zip(features, to, strict=True):
                    if f[feature] > 0:
                        f[feature] = value
                y[0, t] = sae.decode(f) + error
            return y

        both = model.logits(ids)[0], model.logits(ids, HOOK, edit)[0]
        for t in range(len(tokens) - 1):
            if tokens[t] == 0 or tokens[t + 1] == 0:
                continue
            n += 1
            for which, logits in enumerate(both):
                losses[which] -= torch.log_softmax(logits[t].double(), dim=-1)[tokens[t + 1]].item()
                hits[which] += int(logits[t].argmax()) == tokens[t + 1]
    return (losses[1] - losses[0]) / n, hits[0] / n, hits[1] / n


def test_rises_and_accuracies_are_those_of_whole_passes_token_by_token(
    planted: Planted, neox: LanguageModel, tmp_path: Path
) -> None:
    config = config_of(planted, tmp_path, domain_tokens=250, batch_size=3)
    (topic,) = ours(evaluate(config))["topics"]
    _, (drawn,) = draw_domains(planted.store, config)
    mean_of = {one["feature"]: one["mean_active"] for one in topic["features"]}
    for setting in topic["settings"]:
        if setting["multiple"] != 5.0 or setting["n_wanted"] != 20 or setting["threshold"] != 0.01:
            continue
        to = [-5.0 * mean_of[feature] for feature in setting["features"]]
        for domain, contexts in (("forget", drawn.scored_forget), ("retain", drawn.scored_retain)):
            rise, before, after = slow_rise(planted, neox, contexts, setting["features"], to)
            assert setting[f"{domain}_rise"] == pytest.approx(rise, abs=2e-5)
            assert topic["domains"][domain]["accuracy"] == pytest.approx(before)
            assert setting[f"{domain}_accuracy"] == pytest.approx(after)


def test_no_document_both_selects_and_is_scored(planted: Planted, tmp_path: Path) -> None:
    _, (drawn,) = draw_domains(planted.store, config_of(planted, tmp_path))
    document = planted.store.document_of_context
    selecting = set(document[drawn.select_forget]) | set(document[drawn.select_retain])
    scored = set(document[drawn.scored_forget]) | set(document[drawn.scored_retain])
    assert not selecting & scored
    assert {d % 2 for d in document[drawn.scored_forget]} == {0}
    assert {d % 2 for d in document[drawn.scored_retain]} == {1}


def test_clamping_to_what_is_there_changes_nothing_to_the_last_bit(
    planted: Planted, neox: LanguageModel, tmp_path: Path
) -> None:
    silent = SAE(
        architecture="standard",
        W_enc=planted.sae.W_enc,
        b_enc=torch.full((N_DENSE + 1,), -1e6),
        W_dec=planted.sae.W_dec,
        b_dec=torch.ones(16),
        name="silent-s0",
        metadata=planted.sae.metadata,
    )
    found = ours(evaluate(config_of(planted, tmp_path, silent)), "silent-s0")
    (topic,) = found["topics"]
    assert {one["forget_rise"] for one in topic["settings"]} == {0.0}
    assert {one["retain_rise"] for one in topic["settings"]} == {0.0}
    assert {one["n_used"] for one in topic["settings"]} == {0}
    assert found["estimates"]["unlearning_score_even"]["value"] is None


# Files, resuming, refusals -----------------------------------------------------------------------------


def test_an_interrupted_call_keeps_its_finished_topics_and_ends_with_the_same_figures(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(config_of(planted, tmp_path, forget=("odd", "even"), out=tmp_path / "whole"))
    config = config_of(planted, tmp_path, forget=("odd", "even"))
    measured: list[str] = []
    sums = TopicReplay.sums

    def stop_at_the_second(self: TopicReplay, sae: SAE, one: Any, *rest: Any) -> Any:
        measured.append(one.domain.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return sums(self, sae, one, *rest)

    monkeypatch.setattr(TopicReplay, "sums", stop_at_the_second)
    with pytest.raises(Exception, match="run the same command again"):
        evaluate(config)
    assert len(list((config.out / "unlearning" / "planted-s0.parts").iterdir())) == 1
    resumed = evaluate(config)
    assert measured == ["odd", "even", "even"]
    assert not (config.out / "unlearning" / "planted-s0.parts").exists()
    assert ours(resumed)["topics"] == ours(whole)["topics"]
    assert ours(resumed)["estimates"] == ours(whole)["estimates"]
    for name, one in whole.rows[0].draws.items():
        np.testing.assert_array_equal(resumed.rows[0].draws[name].draws, one.draws)


def test_the_file_has_saebenchs_envelope_and_the_picture_is_drawn_from_it(
    planted: Planted, tmp_path: Path
) -> None:
    evaluation = evaluate(config_of(planted, tmp_path))
    body = json.loads((evaluation.out / "unlearning" / "planted-s0.json").read_text())
    assert body["eval_type_id"] == "tcsae_unlearning"
    assert body["eval_config"]["forget"] == ["even"]
    assert body["eval_config"]["multiples_of_mean_active"] == list(MULTIPLES)
    assert evaluation.unlearning_figure is not None
    assert evaluation.unlearning_figure.read_bytes().startswith(b"\x89PNG")
    rows = read_unlearning_rows([evaluation.out / "unlearning" / "planted-s0.json"])
    assert len(rows) == 8 * len(MULTIPLES)
    assert {row.topic for row in rows} == {"even"}
    assert "unlearning, planted-s0, even: " in table(evaluation)


def test_a_file_of_another_suite_is_no_picture_of_unlearning(tmp_path: Path) -> None:
    path = tmp_path / "core.json"
    path.write_text('{"eval_result_unstructured": {"tcsae": {}}}')
    with pytest.raises(RunError, match="core.json: not a result of --suite unlearning"):
        read_unlearning_rows([path])


def test_the_staircase_rises_and_begins_at_the_untouched_model() -> None:
    points = [(0.03, 0.2), (-0.01, 0.1), (0.02, 0.05), (0.03, 0.4), (0.5, 0.3), (0.6, 0.9)]
    rows = [UnlearningRow("a", "a", "t", "selected", forget, retain, 9) for retain, forget in points]
    assert frontier(rows) == ([0.0, 0.0, 0.03, 0.6], [0.0, 0.1, 0.4, 0.9])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"forget": ("evn",)}, UnknownName, "'evn'; did you mean: even"),
        ({"forget": ("by hand",)}, StoreMismatch, "0 documents outside that select"),
        ({"domain_tokens": 40}, ConfigError, "40 tokens are contexts of .* raise --domain-tokens"),
        ({"split": "test"}, StoreMismatch, "documents in it that are scored"),
    ],
    ids=["an unknown topic", "nothing to retain", "too few tokens", "too few held-out documents"],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    planted: Planted, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = config_of(planted, tmp_path, **changes)
    with pytest.raises(error, match=message):
        evaluate(config)
    assert not config.out.exists()


def test_the_command_line_unlearns_a_topic(planted: Planted, tmp_path: Path, neox_folder: Path) -> None:
    config = config_of(planted, tmp_path)
    command = [
        sys.executable, "-P", "-m", "tcsae.cli", "evaluate", str(tmp_path / "run"), str(config.out), "--store",
        str(planted.store.path), "--suite", "unlearning", "--split", "all", "--forget", "even",
        "--domain-tokens", "300",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "unlearning, planted-s0, even: " in done.stdout
    assert "unlearning.png" in done.stdout


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "a.parts", "print")
    assert parts.read("even") is None
    sums = TopicSums(
        settings=(Setting("selected", 0.01, 10, 1.0, (3, 4)),),
        is_forget=np.array([True, False]),
        n=np.ones(2),
        loss=np.ones(2),
        hits=np.zeros(2),
        rise=np.array([[0.5], [0.0]]),
        hits_with=np.zeros((2, 1)),
    )
    parts.write("even", sums)
    kept = parts.read("even")
    assert kept is not None
    assert kept.settings == sums.settings
    np.testing.assert_array_equal(kept.rise, sums.rise)
    assert Parts(tmp_path / "a.parts", "another print").read("even") is None
    (path,) = (tmp_path / "a.parts").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="delete it to measure again"):
        parts.read("even")
