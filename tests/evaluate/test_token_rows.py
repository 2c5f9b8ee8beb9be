"""Rows of a file instead of a store's documents: order, batches, figures, refusals."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate, table
from tcsae.evaluate.token_rows import read_token_rows
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, StoreMismatch, TcsaeError
from tcsae.train.saelens import CONFIG_FILE, save_sae

from .conftest import HOOK, VOCAB
from .test_run import an_sae

N_ROWS, CONTEXT = 10, 12


def some_ids(n_rows: int = N_ROWS) -> np.ndarray:
    """Rows with a BOS in front and one special token inside."""
    ids = np.random.default_rng(0).integers(1, VOCAB, size=(n_rows, CONTEXT))
    ids[:, 0] = 0
    ids[0, 5] = 0
    return ids


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", some_ids())
    return tmp_path / "rows.npy"


@pytest.fixture
def sae_folder(tmp_path: Path, neox: LanguageModel) -> Path:
    save_sae(an_sae("tc16", 1.0, neox), tmp_path / "sae")
    return tmp_path / "sae"


def config_of(sae: Path, rows: Path, model_folder: Path, **changes: Any) -> EvaluateConfig:
    fields: dict[str, Any] = {
        "saes": (sae,),
        "out": rows.parent / "out",
        "tokens": rows,
        "model": str(model_folder),
        "suites": ("core",),
        "batch_size": 4,
        "n_bootstrap": 100,
        "device": "cpu",
    }
    return EvaluateConfig(**(fields | changes))


@pytest.fixture
def evaluation(sae_folder: Path, rows: Path, neox_folder: Path) -> Evaluation:
    return evaluate(config_of(sae_folder, rows, neox_folder))


def body_of(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((evaluation.out / "core" / "tc16-s0.json").read_text())
    return found


# Rows and figures --------------------------------------------------------------------------------------


def test_batches_are_the_rows_in_order_and_the_last_may_be_smaller(rows: Path) -> None:
    batches = read_token_rows(rows).batches(4, (0,))
    assert [len(batch.length) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), torch.from_numpy(some_ids()))
    assert torch.equal(torch.cat([batch.keep for batch in batches]), torch.from_numpy(some_ids() != 0))
    assert [document for batch in batches for document in batch.document] == list(range(N_ROWS))


def test_figures_are_those_of_the_models_own_activations_at_the_rows_kept_tokens(
    evaluation: Evaluation, neox: LanguageModel
) -> None:
    ids = torch.from_numpy(some_ids())
    x = neox.residuals(ids, [HOOK])[HOOK][ids != 0].double()
    sae = an_sae("tc16", 1.0, neox)
    r = (x - sae(x.float()).double()).square().sum(dim=1)
    expected = 1 - r.sum() / (x - x.mean(dim=0)).square().sum()
    (row,) = evaluation.rows
    assert row.estimates["explained_variance"].value == pytest.approx(expected.item(), rel=1e-5)
    assert row.estimates["mse"].value == pytest.approx(r.mean().item(), rel=1e-5)
    assert row.estimates["explained_variance"].n_documents == N_ROWS
    # SAEBench divides by the kept tokens of each batch, special ones left out: 43 (one inside), 44, 22
    assert body_of(evaluation)["eval_result_metrics"]["reconstruction_quality"]["mse"] == pytest.approx(
        sum(part.sum().item() / len(part) for part in r.split([43, 44, 22])) / len(r), rel=1e-5
    )


def test_the_mean_ablation_puts_the_mean_of_the_rows_kept_tokens_at_the_hook(
    evaluation: Evaluation, neox: LanguageModel
) -> None:
    ids = torch.from_numpy(some_ids())
    keep = ids != 0
    mean = neox.residuals(ids, [HOOK])[HOOK][keep].mean(dim=0)
    log_probs = neox.logits(ids, HOOK, lambda x: torch.where(keep[..., None], mean, x)).log_softmax(dim=-1)
    ce = -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    expected = ce[keep[:, :-1] & keep[:, 1:]].mean().item()
    (row,) = evaluation.rows
    assert row.estimates["ce_mean"].value == pytest.approx(expected, rel=1e-5)
    facts = body_of(evaluation)["eval_result_unstructured"]["tcsae"]["replay"]
    assert facts["mean_ablation"] == "mean over these rows' kept tokens"


def test_with_a_store_the_mean_and_the_model_are_the_stores_and_the_text_is_the_rows(
    sae_folder: Path, rows: Path, neox_folder: Path, neox_store: ActivationStore
) -> None:
    config = config_of(sae_folder, rows, neox_folder, store=neox_store.path, model=None)
    body = body_of(evaluate(config))
    assert body["eval_result_metrics"]["token_stats"]["total_tokens_eval_reconstruction"] == N_ROWS * CONTEXT
    ours = body["eval_result_unstructured"]["tcsae"]
    assert ours["replay"]["mean_ablation"] == "mean over the store's train split"
    assert ours["conditions"]["store"] == neox_store.id


def test_the_file_says_which_rows_and_the_table_that_they_are_rows(
    evaluation: Evaluation, rows: Path
) -> None:
    body = body_of(evaluation)
    conditions = body["eval_result_unstructured"]["tcsae"]["conditions"]
    assert conditions["tokens_sha256"] == read_token_rows(rows).sha256
    assert conditions["store"] is None
    assert body["eval_config"]["dataset"] == "rows.npy"
    assert body["sae_cfg_dict"]["context_size"] == CONTEXT
    assert body["sae_cfg_dict"]["prepend_bos"] is True
    assert "10 rows; in brackets 95 % bootstrap intervals over rows" in table(evaluation)


def test_other_rows_are_measured_again_and_the_same_ones_are_not(
    evaluation: Evaluation, sae_folder: Path, rows: Path, neox_folder: Path
) -> None:
    first = body_of(evaluation)["eval_id"]
    assert body_of(evaluate(config_of(sae_folder, rows, neox_folder)))["eval_id"] == first
    np.save(rows, some_ids()[::-1])
    assert body_of(evaluate(config_of(sae_folder, rows, neox_folder)))["eval_id"] != first


def test_one_row_gives_figures_without_intervals_and_says_why(
    sae_folder: Path, rows: Path, neox_folder: Path
) -> None:
    np.save(rows, some_ids(1))
    (row,) = evaluate(config_of(sae_folder, rows, neox_folder)).rows
    for metric in ("explained_variance", "loss_recovered"):
        estimate = row.estimates[metric]
        assert (estimate.low, estimate.high) == (None, None)
        assert estimate.value is not None
        assert estimate.reason == "no interval, because there is only one row to resample"
    assert not [one.reason for one in row.estimates.values() if "document" in (one.reason or "")]


# Refusals ----------------------------------------------------------------------------------------------


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", "b")
    return buffer.getvalue()


def saved(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, array, allow_pickle=True)


def cut_short(path: Path) -> None:
    np.save(path, some_ids())
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(lambda path: None, "no such file", id="missing"),
        pytest.param(lambda path: path.write_bytes(b"0 1 2\n"), "not a .npy file", id="text"),
        pytest.param(lambda path: path.write_bytes(a_zip()), "not a .npy file", id="an npz"),
        pytest.param(saved(np.array([[1, 2], None], dtype=object)), "never opened", id="pickled objects"),
        pytest.param(cut_short, "cannot be read", id="cut short"),
        pytest.param(saved(np.arange(8)), "has 1 dimensions", id="one dimension"),
        pytest.param(saved(np.ones((2, 4))), "holds float64", id="not integers"),
        pytest.param(saved(np.ones((2, 4), dtype=bool)), "holds bool", id="truth values"),
        pytest.param(saved(np.ones((0, 4), dtype=np.int64)), "at least one row", id="no row"),
        pytest.param(saved(np.ones((3, 1), dtype=np.int64)), "of at least two tokens", id="one token a row"),
        pytest.param(saved(np.full((2, 4), VOCAB)), "row 0, column 0: token 61 is not in 0..60", id="an unknown id"),
        pytest.param(saved(np.full((2, 4), -1)), "token -1 is not in", id="a negative id"),
        pytest.param(saved(np.ones((2, 65), dtype=int)), "at most 64", id="longer than the model reads"),
        pytest.param(saved(np.zeros((2, 4), dtype=int)), "every token is one of the special", id="special alone"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_rows_of_tokens_is_refused_in_one_line(
    sae_folder: Path, tmp_path: Path, neox_folder: Path, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "rows.npy"
    write(path)
    with pytest.raises(ConfigError, match=message) as raised:
        evaluate(config_of(sae_folder, path, neox_folder))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"tokens": None}, "store: expected --store", id="neither store nor rows"),
        pytest.param(
            {"suites": ("core", "temporal")}, "--suite core alone, got temporal", id="another suite"
        ),
        pytest.param({"model": None}, "expected --model", id="no model"),
    ],
)
def test_settings_without_a_store_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(Path("sae"), Path("rows.npy"), Path("model"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"hook_name": "blocks.7.hook_resid_post"}, "reads hook 'blocks.7", id="no such hook"),
        pytest.param(
            {"model_name": "gpt2", "tcsae": {}}, "trained on model 'gpt2'", id="another model's name"
        ),
        pytest.param({"tcsae": {"model_sha256": "0" * 64}}, "with weights 000000", id="other weights"),
        pytest.param({"hook_name": None}, "does not say which hook", id="no hook"),
        pytest.param({"hook_head_index": 2}, "reads head 2", id="one head"),
    ],
)
def test_an_sae_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, rows: Path, neox: LanguageModel, neox_folder: Path, changes: dict[str, Any], message: str
) -> None:
    sae = an_sae("tc16", 1.0, neox)
    sae.metadata = sae.metadata | changes
    save_sae(sae, tmp_path / "sae")
    with pytest.raises(StoreMismatch, match=message):
        evaluate(config_of(tmp_path / "sae", rows, neox_folder))


def test_a_folder_of_saelens_own_without_our_metadata_is_evaluated(
    sae_folder: Path, rows: Path, neox_folder: Path
) -> None:
    config = json.loads((sae_folder / CONFIG_FILE).read_text())
    config["metadata"] = {
        "sae_lens_version": "6.54.12",
        "model_name": f"EleutherAI/{neox_folder.name}",
        "hook_name": HOOK,
    }
    (sae_folder / CONFIG_FILE).write_text(json.dumps(config))
    (row,) = evaluate(config_of(sae_folder, rows, neox_folder)).rows
    assert (row.sae, row.arm, row.seed) == ("sae", "sae", None)
    assert row.estimates["loss_recovered"].value is not None


def test_a_nan_in_an_sae_is_refused(
    sae_folder: Path, rows: Path, neox: LanguageModel, neox_folder: Path
) -> None:
    sae = an_sae("tc16", 1.0, neox)
    sae.W_dec[3, 2] = float("nan")
    save_sae(sae, sae_folder)
    with pytest.raises(TcsaeError, match="NaN"):
        evaluate(config_of(sae_folder, rows, neox_folder))
