"""Text and SAEs on which some figures do not exist: those are null with a reason, the others are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate_subjects, table
from tcsae.evaluate.subjects import subject
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE

from .conftest import HOOK, VOCAB, made_by
from .test_run import an_sae

StoreFactory = Callable[..., ActivationStore]


@pytest.fixture
def evaluated(tmp_path: Path, neox: LanguageModel, make_store: StoreFactory) -> Callable[..., Evaluation]:
    """Evaluate an SAE on documents of given tokens, each in one context."""

    def run(documents: list[list[int]], sae: SAE) -> Evaluation:
        x = [neox.residuals(torch.tensor([[0, *tokens]]), [HOOK])[HOOK][0, 1:] for tokens in documents]
        store = make_store(
            torch.cat(x),
            [len(tokens) for tokens in documents],
            tokens=np.concatenate(documents),
            name=f"of-{len(documents)}.zarr",
            **made_by(neox),
        )
        config = EvaluateConfig(
            saes=(Path("sae"),),
            out=tmp_path / f"out-of-{len(documents)}",
            store=store.path,
            suites=("core",),
            split="all",
            n_bootstrap=100,
            device="cpu",
        )
        return evaluate_subjects([subject(sae, store, where="sae")], store, config, model=neox)

    return run


def body_of(evaluation: Evaluation) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (evaluation.out / "core" / f"{evaluation.rows[0].sae}.json").read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def test_contexts_of_one_token_predict_nothing_but_have_a_divergence(
    evaluated: Callable[..., Evaluation], neox: LanguageModel
) -> None:
    tokens = np.random.default_rng(0).integers(1, VOCAB, size=12)
    found = evaluated([[int(token)] for token in tokens], an_sae("tc16", 1.0, neox))
    (row,) = found.rows
    for metric in ("ce_clean", "ce_sae", "loss_recovered", "loss_recovered_mean"):
        estimate = row.estimates[metric]
        assert (estimate.value, estimate.low) == (None, None)
        assert (estimate.reason or "").startswith("undefined, because")
    for metric in ("kl_sae", "kl_score", "explained_variance", "l0"):
        estimate = row.estimates[metric]
        assert estimate.value is not None
        assert estimate.low is not None
    body = body_of(found)
    assert body["eval_result_metrics"]["model_performance_preservation"]["ce_loss_with_sae"] == -1
    assert "ce_loss_with_sae" in body["eval_result_unstructured"]["tcsae"]["undefined"]
    assert "tc16" in table(found)


def test_a_document_of_special_tokens_alone_adds_nothing(
    evaluated: Callable[..., Evaluation], neox: LanguageModel
) -> None:
    texts = np.random.default_rng(0).integers(1, VOCAB, size=(6, 10)).tolist()
    (row,) = evaluated([*texts, [0, 0, 0]], an_sae("tc16", 1.0, neox)).rows
    (without,) = evaluated(texts, an_sae("tc16", 1.0, neox)).rows
    # A batch of another shape may take another kernel of the matrix product: float32's rounding, no more.
    for metric in ("explained_variance", "ce_sae", "kl_sae"):
        assert row.estimates[metric].value == pytest.approx(without.estimates[metric].value, rel=1e-6)


def test_special_tokens_alone_leave_every_figure_undefined(
    evaluated: Callable[..., Evaluation], neox: LanguageModel
) -> None:
    (row,) = evaluated([[0, 0], [0, 0, 0]], an_sae("tc16", 1.0, neox)).rows
    assert row.estimates
    for one in row.estimates.values():
        assert one.value is None
        assert (one.reason or "").startswith("undefined, because")


def test_a_feature_that_never_fires_is_dead_and_its_undefined_details_are_counted(
    evaluated: Callable[..., Evaluation], neox: LanguageModel
) -> None:
    sae = an_sae("tc16", 1.0, neox)
    sae.b_enc[3] = -1e6
    sae.W_dec[5] = 0
    texts = np.random.default_rng(0).integers(1, VOCAB, size=(6, 10)).tolist()
    found = evaluated(texts, sae)
    body = body_of(found)
    dead, zero = body["eval_result_details"][3], body["eval_result_details"][5]
    assert (dead["feature_density"], dead["consistent_activation_heuristic"]) == (0, -1)
    assert (zero["encoder_decoder_cosine_sim"], zero["max_decoder_cosine_sim"]) == (-1, 0)
    counted = body["eval_result_unstructured"]["tcsae"]["undefined_details"]
    n_dead = sum(one["feature_density"] == 0 for one in body["eval_result_details"])
    assert counted["consistent_activation_heuristic"]["n_features"] == n_dead
    assert counted["encoder_decoder_cosine_sim"] == {
        "n_features": 1,
        "reason": "undefined, because the feature's encoder or decoder is zero",
    }
    assert found.rows[0].estimates["dead_fraction"].value == pytest.approx(n_dead / 24)
