"""Store-only figures: repaired definitions, outliers, resampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tcsae.evaluate import reconstruction
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.references import identity_sae, mean_sae, zero_sae
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE

StoreFactory = Callable[..., ActivationStore]
NAMES = [metric.name for metric in reconstruction.METRICS]


def figures_of(sae: SAE, held_out: HeldOut) -> dict[str, float]:
    centre = torch.zeros(sae.d_in, dtype=torch.float64)
    found = reconstruction.store_sums(sae, held_out.blocks(rows=64), held_out.units(4096), centre)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = reconstruction.figures(found.sums.sum(axis=0), sae.d_in)
    return dict(zip(NAMES, values.tolist(), strict=True))


def a_sae(d_in: int = 8, d_sae: int = 20) -> SAE:
    generator = torch.Generator().manual_seed(3)
    return SAE(
        architecture="standard",
        W_enc=torch.randn(d_in, d_sae, generator=generator),
        b_enc=torch.randn(d_sae, generator=generator) - 1,
        W_dec=torch.randn(d_sae, d_in, generator=generator) / 8,
        b_dec=torch.randn(d_in, generator=generator),
        block_size=6,
    )


@pytest.fixture
def held_out(make_store: StoreFactory) -> HeldOut:
    """Twelve documents of 30 rows, mean far from 0, one outlier row and one special token (row 0's 0)."""
    x = torch.randn(360, 8, generator=torch.Generator().manual_seed(0)) + 5
    x[100] *= 1000
    return HeldOut(make_store(x, [30] * 12, dtype="float32"), "blocks.0.hook_resid_post", "all")


def kept_rows(held_out: HeldOut) -> torch.Tensor:
    x = held_out.store.rows(0, 360)
    return torch.cat([x[1:100], x[101:]]).double()


def test_figures_are_those_of_the_definitions_on_all_kept_tokens_at_once(held_out: HeldOut) -> None:
    sae, x = a_sae(), kept_rows(held_out)
    f = sae.encode(x.float())
    xh = sae.decode(f).double()
    r = (x - xh).square().sum(dim=1)
    expected = {
        "explained_variance": 1 - r.sum() / (x - x.mean(dim=0)).square().sum(),
        "mse": r.mean(),
        "mse_per_dimension": r.mean() / 8,
        "cosine_similarity": torch.cosine_similarity(x, xh).mean(),
        "l2_ratio": (xh.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": xh.square().sum() / (x * xh).sum(),
        "l0": (f != 0).double().sum(dim=1).mean(),
        "l0_H": (f[:, :6] != 0).double().sum(dim=1).mean(),
        "l0_L": (f[:, 6:] != 0).double().sum(dim=1).mean(),
        "l1": f.double().sum(dim=1).mean(),
    }
    assert figures_of(sae, held_out) == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-6)


def test_outliers_are_left_out_and_counted(held_out: HeldOut) -> None:
    found = reconstruction.store_sums(
        a_sae(), held_out.blocks(), held_out.units(99), torch.zeros(8, dtype=torch.float64)
    )
    assert (found.n_kept, found.n_outliers) == (358, 1)


def test_the_identity_explains_everything_and_the_mean_nothing(held_out: HeldOut) -> None:
    assert figures_of(identity_sae(8), held_out)["explained_variance"] == pytest.approx(1, abs=1e-9)
    mean = figures_of(mean_sae(kept_rows(held_out).mean(dim=0)), held_out)
    assert mean["explained_variance"] == pytest.approx(0, abs=1e-6)


def test_zero_reconstructions_leave_the_cosine_undefined_and_the_rest_finite(held_out: HeldOut) -> None:
    found = figures_of(zero_sae(8), held_out)
    assert np.isnan(found["cosine_similarity"])
    assert found["l2_ratio"] == 0


def test_the_figures_do_not_depend_on_the_centre_that_squares_are_summed_about(held_out: HeldOut) -> None:
    sae = a_sae()
    found = [
        reconstruction.figures(
            reconstruction.store_sums(sae, held_out.blocks(), held_out.units(99), centre).sums.sum(axis=0), 8
        )
        for centre in (torch.zeros(8, dtype=torch.float64), torch.full((8,), 5.0, dtype=torch.float64))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_resample_is_the_figure_of_the_documents_drawn(held_out: HeldOut) -> None:
    sae = a_sae()
    sums = reconstruction.store_sums(
        sae, held_out.blocks(), held_out.units(99), torch.zeros(8, dtype=torch.float64)
    ).sums
    counts = np.zeros(12)
    counts[[5, 7]] = 1, 2  # documents without outlier or special token
    x = held_out.store.rows(0, 360)
    drawn = torch.cat([x[150:180], x[210:240], x[210:240]]).double()
    r = (drawn - sae(drawn.float()).double()).square().sum()
    expected = 1 - r / (drawn - drawn.mean(dim=0)).square().sum()
    assert reconstruction.figures(counts @ sums, 8)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_more_documents_than_units_are_dealt_out_in_turn(held_out: HeldOut) -> None:
    assert held_out.units(5).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    centre = torch.zeros(8, dtype=torch.float64)
    grouped = reconstruction.store_sums(a_sae(), held_out.blocks(), held_out.units(5), centre).sums
    apart = reconstruction.store_sums(a_sae(), held_out.blocks(), held_out.units(99), centre).sums
    assert grouped[1] == pytest.approx(apart[1] + apart[6] + apart[11])
