"""Reference SAEs: components, random directions, untrained weights, and what cannot be made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.references import pca_sae, principal_components, random_sae, reference_sample
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, UnknownName
from tcsae.train.config import ArmConfig
from tcsae.train.saelens import load_sae, save_sae

from .conftest import HOOK
from .test_run import an_sae

StoreFactory = Callable[..., ActivationStore]


@pytest.fixture
def held_out(make_store: StoreFactory) -> HeldOut:
    """Twelve documents of 30 rows, far from 0 and wide in two directions; one outlier, one special token."""
    x = torch.randn(360, 8, generator=torch.Generator().manual_seed(0))
    x[:, 2] *= 5
    x[:, 6] *= 3
    x += 20
    x[100] *= 1000
    return HeldOut(make_store(x, [30] * 12, dtype="float32"), "blocks.0.hook_resid_post", "all")


def kept_rows(held_out: HeldOut) -> torch.Tensor:
    x = held_out.store.rows(0, 360)
    return torch.cat([x[1:100], x[101:]]).double()


def test_components_are_those_of_a_singular_value_decomposition_of_all_kept_rows(held_out: HeldOut) -> None:
    seen: list[int] = []
    components, mean = principal_components(
        held_out.blocks(rows=64), torch.full((8,), 19.0, dtype=torch.float64), 3, seen.append
    )
    x = kept_rows(held_out)
    assert torch.allclose(mean, x.mean(dim=0), atol=1e-9)
    expected = np.linalg.svd((x - x.mean(dim=0)).numpy())[2][:3]
    overlap = np.abs(np.sum(components.numpy() * expected, axis=1))
    assert overlap == pytest.approx([1, 1, 1], abs=1e-8)
    assert sum(seen) == 360


def test_pca_reconstructs_what_the_projection_does_and_as_many_features_are_active(held_out: HeldOut) -> None:
    components, mean = principal_components(held_out.blocks(), torch.zeros(8).double(), 2, lambda _: None)
    sae, x = pca_sae(components, mean), kept_rows(held_out)
    projected = (x - mean) @ components.T @ components + mean
    assert torch.allclose(sae(x.float()).double(), projected, atol=1e-3)
    f = sae.encode(x.float())
    assert f.shape[1] == 4
    assert (f != 0).sum(dim=1).tolist() == [2] * len(x)


def test_random_directions_are_tied_but_for_one_gain_that_no_other_beats() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) + 3
    sae = random_sae(x, d_sae=24, k=3, seed=0)
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(norms, norms[:1], rtol=1e-5)
    assert torch.allclose(sae.W_dec / norms[:, None], sae.W_enc.T, atol=1e-6)
    assert float((sae.encode(x) != 0).sum(dim=1).double().mean()) <= 3
    mean = x.mean(dim=0)

    def error(factor: float) -> float:
        return float((x - mean - factor * (sae(x) - mean)).square().sum())

    assert error(1.0) <= min(error(0.99), error(1.01))
    assert torch.equal(random_sae(x, 24, 3, seed=0).W_enc, sae.W_enc)
    assert not torch.equal(random_sae(x, 24, 3, seed=1).W_enc, sae.W_enc)


def test_the_sample_is_of_train_documents_without_outliers_and_special_tokens(held_out: HeldOut) -> None:
    train = HeldOut(held_out.store, held_out.hook, "train")
    sample = reference_sample(held_out.store, held_out.hook, seed=0)
    starts = held_out.store.document_offsets[train.documents]
    kept = {row for start in starts for row in range(int(start), int(start) + 30)} - {0, 100}
    assert len(sample) == len(kept)
    expected = held_out.store.rows(0, 360)[sorted(kept)]
    assert torch.equal(sample.sum(dim=1).sort().values, expected.sum(dim=1).sort().values)


# In an evaluation --------------------------------------------------------------------------------------

RECIPE = asdict(ArmConfig(name="tc16", architecture="batchtopk", expansion=1.5, k=4, block_share=0.25))


def config_of(folder: Path, of: ActivationStore, *kinds: str, **changes: Any) -> EvaluateConfig:
    fields: dict[str, Any] = {
        "saes": (folder,),
        "out": folder.parent / "out",
        "store": of.path,
        "suites": ("core",),
        "references": kinds,
        "split": "all",
        "max_tokens": 200,
        "batch_size": 4,
        "n_bootstrap": 100,
        "device": "cpu",
    }
    return EvaluateConfig(**(fields | changes))


@pytest.fixture
def folder(tmp_path: Path, neox: LanguageModel) -> Path:
    sae = an_sae("tc16", 1.0, neox)
    sae.metadata["tcsae"]["recipe"] = RECIPE
    save_sae(sae, tmp_path / "sae")
    return tmp_path / "sae"


def value(evaluation: Evaluation, sae: str, metric: str) -> float:
    (row,) = [row for row in evaluation.rows if row.sae == sae]
    found = row.estimates[metric].value
    assert found is not None
    return found


def test_references_stand_beside_the_sae_with_the_figures_that_are_known(
    folder: Path, neox_store: ActivationStore
) -> None:
    found = evaluate(config_of(folder, neox_store, "identity", "pca:16", "pca:2", "random", "untrained"))
    assert [row.arm for row in found.rows[1:]] == [
        f"reference {name}" for name in ("identity", "pca-16", "pca-2", "random", "untrained")
    ]
    for complete in ("identity", "pca-16"):
        assert value(found, complete, "explained_variance") == pytest.approx(1, abs=1e-6)
        assert value(found, complete, "loss_recovered") == pytest.approx(1, abs=1e-3)
        assert value(found, complete, "l0") == pytest.approx(16, abs=0.01)
    assert 0 < value(found, "pca-2", "explained_variance") < 1
    assert value(found, "random", "l0") == pytest.approx(value(found, "tc16-s0", "l0"), abs=1)
    untrained = load_sae(folder.parent / "out" / "references" / "untrained")
    assert untrained.architecture == "jumprelu"
    # tied at the beginning, which training would have ended
    assert torch.allclose(untrained.W_enc.T, untrained.W_dec, atol=1e-6)
    assert value(found, "untrained", "l0") == pytest.approx(4, abs=1)


def test_references_are_kept_and_made_again_only_from_something_else(
    folder: Path, neox_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(config_of(folder, neox_store, "pca:2"))

    def refuse(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("tcsae.evaluate.references._make", refuse)
    evaluate(config_of(folder, neox_store, "pca:2"))
    with pytest.raises(AssertionError, match="made again"):
        evaluate(config_of(folder, neox_store, "pca:2", seed=1))


def test_references_at_rows_of_tokens_need_a_store_only_where_they_say_so(
    folder: Path, tmp_path: Path, neox_folder: Path, neox_store: ActivationStore
) -> None:
    ids = np.random.default_rng(0).integers(1, 61, size=(6, 12))
    np.save(tmp_path / "rows.npy", ids)
    without = {"store": None, "tokens": tmp_path / "rows.npy", "model": str(neox_folder)}
    found = evaluate(config_of(folder, neox_store, "identity", "random", **without))
    assert value(found, "identity", "explained_variance") == pytest.approx(1, abs=1e-6)
    # of 24 features about half are negative, so of the 11 largest some are too, and are not counted
    assert value(found, "random", "l0") == pytest.approx(value(found, "tc16-s0", "l0"), abs=2)
    for kind in ("pca:2", "untrained"):
        with pytest.raises(ConfigError, match="needs a store"):
            evaluate(config_of(folder, neox_store, kind, **without))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        pytest.param("pca", ConfigError, "expected pca:K", id="no number"),
        pytest.param("pca:0", ConfigError, "at least 1", id="no component"),
        pytest.param("pca:x", ConfigError, "expected pca:K", id="not a number"),
        pytest.param("random:3", ConfigError, "takes no number", id="a number too many"),
        pytest.param("identify", UnknownName, "identity", id="a typing error"),
    ],
)
def test_a_reference_that_does_not_exist_is_refused(kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EvaluateConfig(saes=(Path("run"),), out=Path("out"), store=Path("store"), references=(kind,))


def test_more_components_than_dimensions_are_refused(folder: Path, neox_store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="at most pca:16"):
        evaluate(config_of(folder, neox_store, "pca:17"))


def test_an_sae_that_does_not_say_how_it_was_trained_has_no_untrained_weights(
    folder: Path, neox_store: ActivationStore
) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["tcsae"] = {}
    (folder / "cfg.json").write_text(json.dumps(config))
    # its model is named as a folder, which the store's is too
    assert config["metadata"]["hook_name"] == HOOK
    with pytest.raises(ConfigError, match="does not say how it was trained"):
        evaluate(config_of(folder, neox_store, "untrained"))
