"""SAEBench's figures against a slow implementation of METRICS.md's definitions, faults included."""

from __future__ import annotations

import math

import pytest
import torch

from tcsae.evaluate import saebench


def batches(n_batches: int = 3, d_model: int = 6, n_features: int = 5) -> list[tuple[torch.Tensor, ...]]:
    """(x, f, xh) of kept positions; batches of different sizes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for at in range(n_batches):
        x = torch.randn(4 + 3 * at, d_model, generator=generator) + 1
        f = torch.relu(torch.randn(len(x), n_features, generator=generator))
        made.append((x, f, x + 0.3 * torch.randn(x.shape, generator=generator)))
    return made


def gathered(made: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    figures = saebench.ReconstructionFigures()
    for x, f, xh in made:
        figures.add(x, f, xh)
    return figures.figures()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow(made: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """METRICS.md section 1.3, token by token in Python floats."""
    pooled: dict[str, list[float]] = {
        name: []
        for name in (
            "mse", "cossim", "explained_variance_legacy", "l2_norm_in", "l2_norm_out", "l2_ratio", "l0", "l1",
        )
    }  # fmt: skip
    batch_r, batch_square, batch_bias, q_terms = [], [], [], []
    for x, f, xh in made:
        rows, codes, outs = x.double().tolist(), f.double().tolist(), xh.double().tolist()
        n, d = len(rows), len(rows[0])
        centre = [mean([row[i] for row in rows]) for i in range(d)]
        errors = []
        for row, code, out in zip(rows, codes, outs, strict=True):
            error = [a - b for a, b in zip(row, out, strict=True)]
            spread = [a - b for a, b in zip(row, centre, strict=True)]
            r, norm_in, norm_out = dot(error, error), math.sqrt(dot(row, row)), math.sqrt(dot(out, out))
            errors.append(r)
            pooled["mse"].append(r / n)
            pooled["cossim"].append(dot(row, out) / (norm_in * norm_out))
            pooled["explained_variance_legacy"].append(1 - r / dot(spread, spread))
            pooled["l2_norm_in"].append(norm_in)
            pooled["l2_norm_out"].append(norm_out)
            pooled["l2_ratio"].append(norm_out / (norm_in if norm_in >= 1e-4 else 1))
            pooled["l0"].append(sum(c != 0 for c in code))
            pooled["l1"].append(sum(code))
        batch_r.append(mean(errors))
        batch_square.append(mean([dot(row, row) for row in rows]))
        q_terms.append(mean([mean([row[i] ** 2 for row in rows]) for i in range(d)]))
        batch_bias.append(
            mean([dot(o, o) for o in outs]) / mean([dot(a, o) for a, o in zip(rows, outs, strict=True)])
        )
    return {
        **{name: mean(values) for name, values in pooled.items()},
        "explained_variance": 1 - mean(batch_r) / (mean(batch_square) - mean(q_terms) ** 2),
        "relative_reconstruction_bias": mean(batch_bias),
    }


def test_every_figure_is_that_of_the_definition_calculated_slowly() -> None:
    assert gathered(batches()) == pytest.approx(slow(batches()), rel=1e-6)


# Faults that are reproduced ----------------------------------------------------------------------------


def test_an_sae_without_features_that_returns_the_mean_gets_a_good_explained_variance() -> None:
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0, 0, 0, 0, 0])
    dead = x.mean(dim=0).expand_as(x)
    # S is about 6 + 9 = 15, T = 15 - (15 / 6)^2 = 8.75, R about 6: 1 - 6 / 8.75 = 0.31 instead of 0
    assert gathered([(x, torch.zeros(4000, 1), dead)])["explained_variance"] == pytest.approx(0.31, abs=0.03)


def test_explained_variance_exceeds_one_where_activations_are_large() -> None:
    x = 10 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    figures = gathered([(x, torch.zeros(500, 1), torch.zeros_like(x))])
    assert figures["explained_variance"] > 1


def test_mse_falls_with_the_size_of_the_batch() -> None:
    x, f, xh = batches(1)[0]
    once, twice = gathered([(x, f, xh)]), gathered([tuple(torch.cat([t, t]) for t in (x, f, xh))])
    assert twice["mse"] == pytest.approx(once["mse"] / 2)
    assert twice["cossim"] == pytest.approx(once["cossim"])


def test_one_zero_reconstruction_makes_cossim_nan() -> None:
    x, f, xh = (t.clone() for t in batches(1)[0])
    xh[0] = 0
    figures = gathered([(x, f, xh)])
    assert math.isnan(figures["cossim"])
    assert math.isfinite(figures["l2_ratio"])


def test_l0_counts_what_is_not_zero_and_l1_has_no_absolute_value() -> None:
    f = torch.tensor([[-1.0, 0.0, 3.0], [0.0, 0.0, 2.0]])
    figures = gathered([(torch.ones(2, 2), f, torch.ones(2, 2))])
    assert (figures["l0"], figures["l1"]) == (1.5, 2.0)


# Featurewise -------------------------------------------------------------------------------------------


def test_density_and_heuristic_of_a_hand_made_batch() -> None:
    # two rows of kept positions: row 0 has three, row 1 two; feature 2 is dead, feature 3 only negative
    f = torch.tensor([[1.0, 0, 0, -1], [2.0, 1, 0, 0], [0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 0]])
    figures = saebench.FeatureFigures(4)
    figures.add(f, torch.tensor([0, 0, 0, 1, 1]), n_rows=2)
    found = figures.figures()
    assert found["feature_density"].tolist() == pytest.approx([0.4, 0.4, 0.0, 0.0])
    heuristic = found["consistent_activation_heuristic"]
    assert heuristic[:2].tolist() == [2.0, 1.0]  # 2 firings in 1 row, 2 in 2
    assert heuristic[2:].isnan().all()


def test_weight_figures_of_a_hand_made_sae() -> None:
    W_enc = torch.tensor([[3.0, 0.0, 0.0], [4.0, 2.0, 0.0]])
    W_dec = torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]])
    found = saebench.weight_figures(W_enc, torch.tensor([0.5, -0.5, 0.0]), W_dec)
    assert found["encoder_norm"].tolist() == [5.0, 2.0, 0.0]
    assert found["encoder_bias"].tolist() == [0.5, -0.5, 0.0]
    assert found["encoder_decoder_cosine_sim"][:2].tolist() == pytest.approx([1.0, -1.0])
    assert found["encoder_decoder_cosine_sim"][2].isnan()  # unit vectors first, no epsilon
    assert found["max_encoder_cosine_sim"].tolist() == pytest.approx([0.8, 0.8, 0.0])
    assert found["max_decoder_cosine_sim"].tolist() == pytest.approx([0.6, 0.0, 0.6])


def test_the_largest_cosine_does_not_depend_on_how_many_are_done_at_once() -> None:
    vectors = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    expected = [
        max(torch.cosine_similarity(vectors[i], vectors[j], dim=0).item() for j in range(23) if j != i)
        for i in range(23)
    ]
    for at_once in (4, 100):
        assert saebench.largest_cosine(vectors, at_once).tolist() == pytest.approx(expected, abs=1e-6)


def test_misc_metrics_are_fractions_of_features_and_of_densities() -> None:
    found = saebench.misc_metrics(
        {
            "feature_density": torch.tensor([0.0, 0.005, 0.05, 0.5]),
            "max_encoder_cosine_sim": torch.tensor([0.1, 0.2, 0.3, 0.4]),
            "max_decoder_cosine_sim": torch.tensor([0.2, 0.2, 0.2, 0.2]),
        }
    )
    assert found == pytest.approx(
        {
            "frac_alive": 0.75,
            "freq_over_1_percent": 0.5,
            "freq_over_10_percent": 0.25,
            "normalized_freq_over_1_percent": 0.55 / 0.555,
            "normalized_freq_over_10_percent": 0.5 / 0.555,
            "average_max_encoder_cosine_sim": 0.25,
            "average_max_decoder_cosine_sim": 0.2,
        },
        rel=1e-6,
    )


# File --------------------------------------------------------------------------------------------------


def test_undefined_figures_are_minus_one_in_saebenchs_part_and_each_has_its_reason() -> None:
    figures = {name: 0.5 for names in saebench.CATEGORIES.values() for name in names}
    metrics, undefined = saebench.by_category({**figures, "cossim": math.nan, "kl_div_with_sae": math.inf})
    assert metrics["reconstruction_quality"]["cossim"] == -1
    assert metrics["model_behavior_preservation"]["kl_div_with_sae"] == -1
    assert undefined.keys() == {"cossim", "kl_div_with_sae"}
    assert "Infinity" in undefined["kl_div_with_sae"]


def test_details_are_rounded_to_ten_decimals_and_a_dead_heuristic_is_minus_one() -> None:
    names = (
        "consistent_activation_heuristic", "encoder_bias", "encoder_decoder_cosine_sim", "encoder_norm",
        "feature_density", "max_decoder_cosine_sim", "max_encoder_cosine_sim",
    )  # fmt: skip
    columns = {name: torch.tensor([1 / 3], dtype=torch.float64) for name in names}
    columns["consistent_activation_heuristic"] = torch.tensor([math.nan], dtype=torch.float64)
    (only,) = saebench.details(columns)
    assert only.keys() == {"index", *names}
    assert only["encoder_norm"] == 0.3333333333
    assert only["consistent_activation_heuristic"] == -1
    assert saebench.undefined_details(columns) == {
        "consistent_activation_heuristic": {
            "n_features": 1,
            "reason": "undefined, because the feature never fires",
        }
    }


def test_scores_of_hand_made_losses() -> None:
    found = saebench.scores(
        {
            "kl_div_with_sae": 0.5,
            "kl_div_with_ablation": 2.0,
            "ce_loss_without_sae": 3.0,
            "ce_loss_with_sae": 3.5,
            "ce_loss_with_ablation": 8.0,
        }
    )
    assert (found["kl_div_score"], found["ce_loss_score"]) == (0.75, 0.9)
