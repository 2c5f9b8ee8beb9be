"""Statistics against plain formulas, and that one huge row moves neither mean nor scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tcsae.store.statistics import statistics


def blocks_of(rows: torch.Tensor, size: int):
    return lambda: (rows[start : start + size] for start in range(0, len(rows), size))


def test_mean_scale_and_quantiles_match_numpy():
    rows = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0)
    result = statistics(blocks_of(rows, 333), 8)
    values = rows.double().numpy()
    norms = np.linalg.norm(values, axis=1)
    np.testing.assert_allclose(result.mean, values.mean(axis=0), rtol=1e-12)
    assert result.mean_square_norm == pytest.approx(
        np.square(values - values.mean(axis=0)).sum(axis=1).mean()
    )
    assert result.n_outliers == 0
    for q, value in result.norm_quantiles.items():
        assert value == pytest.approx(np.quantile(norms, float(q), method="inverted_cdf"), rel=0.003)


def test_block_size_does_not_move_the_counts_or_the_median():
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(3))
    one, other = statistics(blocks_of(rows, 1000), 4), statistics(blocks_of(rows, 7), 4)
    assert one.norm_quantiles == other.norm_quantiles
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12, atol=1e-15)


def test_a_row_a_hundred_times_the_median_is_counted_and_kept_out():
    rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(4))
    clean = statistics(blocks_of(rows, 100), 8)
    spiked = torch.cat([rows, torch.full((1, 8), 300.0)])
    result = statistics(blocks_of(spiked, 100), 8)
    assert result.n_outliers == 1
    assert result.n_rows == 1001
    np.testing.assert_allclose(result.mean, clean.mean, rtol=1e-12)
    assert result.mean_square_norm == pytest.approx(clean.mean_square_norm)


def test_statistics_cover_the_train_split_only(make_store):
    lengths = [10] * 100
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(5))
    store = make_store(rows, lengths, dtype="float32")
    train = np.concatenate([np.arange(10 * d, 10 * d + 10) for d in store.documents_in("train")])
    assert store.statistics().n_rows == len(train) < 1000
    np.testing.assert_allclose(store.statistics().mean, rows[train].double().numpy().mean(axis=0), rtol=1e-12)
