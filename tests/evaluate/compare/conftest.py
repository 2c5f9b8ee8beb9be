"""Evaluation folders whose truth is known, written by the project's own writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tcsae.evaluate.estimates import RESULT_VERSION, Metric, SuiteResult, estimates_of, write_result
from tcsae.evaluate.intervals import bootstrap, resample_counts
from tcsae.evaluate.subjects import digest_of
from tcsae.evaluate.summary import Evaluation, Row, write_summary
from tcsae.train.saelens import load_sae

N_DRAWS = 400
SUITE_OF = {
    "l0": "core",
    "l0_H": "core",
    "explained_variance": "core",
    "loss_recovered": "core",
    "kl_sae": "core",
}
"""Suites of the metrics that tests plant; all others are of the temporal suite."""


class Planted(NamedTuple):
    """One SAE: the value of each metric on each document."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    documents: Mapping[str, np.ndarray]
    folder: Path | None = None
    features: Mapping[str, Sequence[float]] | None = None


SETTINGS: dict[str, Any] = {
    "alpha": 0.0, "window": 16, "k": 32, "block_share": 0.2, "block_k_share": 0.25, "objective": "info_nce",
    "positives": "window", "contrasted_code": "before_top_k", "architecture": "batchtopk",
}  # fmt: skip


def planted(arm: str, seed: int, documents: Mapping[str, Any], n: int = 40, **settings: Any) -> Planted:
    """An SAE whose metrics are ``documents``, numbers standing for the same value on all ``n`` documents."""
    return Planted(
        arm,
        seed,
        SETTINGS | {"name": arm} | settings,
        {name: np.broadcast_to(np.asarray(value, float), (n,)).copy() for name, value in documents.items()},
    )


def write_folder(
    out: Path, saes: Sequence[Planted], *, conditions: Mapping[str, Any] | None = None, seed: int = 0
) -> Path:
    """An evaluation folder of ``saes``; each metric is the mean over documents."""
    rows = []
    suites = list(dict.fromkeys(SUITE_OF.get(name, "temporal") for one in saes for name in one.documents))
    for one in saes:
        name = f"{one.arm}-s{one.seed}"
        digest = (
            f"{abs(hash((name, str(out), *map(str, one.settings.items())))):064x}"
            if one.folder is None
            else digest_of(load_sae(one.folder))
        )
        estimates, draws = {}, {}
        for suite in suites:
            metrics = {m: y for m, y in one.documents.items() if SUITE_OF.get(m, "temporal") == suite}
            suite_estimates, suite_draws = {}, {}
            for metric, y in metrics.items():
                sums = np.stack([y, np.ones(len(y))], axis=1)
                counts = resample_counts(len(y), N_DRAWS, seed)
                found = bootstrap(sums, lambda s: s[..., :1] / s[..., 1:], counts)
                of_metric, drawn = estimates_of([Metric(metric, "1", "nothing")], found, len(y))
                suite_estimates |= of_metric
                suite_draws |= drawn
            result = SuiteResult(f"{digest}{suite}", suite_estimates, suite_draws, {"n_tokens": 1000})
            paths = out / suite / f"{name}.json", out / "draws" / suite / f"{name}.parquet"
            write_result(*paths, {"eval_type_id": suite}, result)
            estimates |= suite_estimates
            draws |= suite_draws
        origin = {
            "digest": digest,
            "hook": "blocks.1.hook_resid_post",
            "architecture": "jumprelu",
            "d_sae": 40,
            "k": None,
            "steps": 100,
            "tokens": 12_800,
            "trained_on": "store",
            "settings": dict(one.settings),
            "folder": None if one.folder is None else str(one.folder),
        }
        if one.features is not None:
            path = out / "features" / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(dict(one.features)), path)
        rows.append(Row(name, one.arm, one.seed, 8, estimates, draws, origin))
    known = {
        "tcsae": "0.1.0", "result_version": RESULT_VERSION, "store": "store-1", "model": "tiny",
        "model_sha256": "0" * 64,
        "hooks": ["blocks.1.hook_resid_post"], "split": "test", "n_bootstrap": N_DRAWS, "seed": seed, "suites": suites,
        "n_documents": 40, "n_tokens": 1000, "max_tokens": 500,
    }  # fmt: skip
    write_summary(Evaluation(out, tuple(rows), (), known | dict(conditions or {}), None))
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """The function `write_folder`, into folders of this test."""

    def write(saes: Sequence[Planted], name: str = "out", **changes: Any) -> Path:
        return write_folder(tmp_path / name, saes, **changes)

    return write
