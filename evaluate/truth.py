"""The truth suite: an SAE held against the dictionary that a synthetic store was made from.

Beside the figures of the two dictionaries (`tcsae.evaluate.truth_matching`), for every matched one-to-one pair of a
true feature and one of the SAE's:

    f1        2 TP / (tokens with the feature on + tokens with the true one on), TP: tokens with both
    pearson   correlation over tokens of the feature's activation with the true value (0 where it is off)

averaged over the pairs, all and by kind, with intervals over documents. A true feature without a pair does not enter,
so both are to be read beside ``paired``, the share of true features that have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from tcsae.evaluate.estimates import Estimate, Metric, SuiteResult, estimates_of
from tcsae.evaluate.heldout import Block, HeldOut
from tcsae.evaluate.intervals import MAX_UNITS, Array, Bootstrap, resample_counts
from tcsae.evaluate.truth_matching import MATCHED, MIN_FIRINGS, RECOVERED, Matching, match, purity, recovery
from tcsae.harvest.synthetic import SyntheticSource, truth_codes
from tcsae.store.spec import KINDS
from tcsae.train.sae.inference import SAE

MAX_BYTES = 256 * 2**20
"""Bound on the pairs' sums of one SAE; documents beyond it are dealt out into groups."""

KEPT_DOCUMENTS = 64
"""Documents whose true codes are kept: a block holds whole contexts of fewer."""

PAIRS_AT_ONCE = 64
"""Pairs resampled together."""

SUMS = ("n", "both", "on", "true_on", "f", "v", "ff", "vv", "fv")
"""Per unit and pair; v: true value, f: the SAE's activation."""

NO_INTERVAL = "no interval, because it is a property of the two dictionaries"


class TruthResult(NamedTuple):
    """The suite's result for one SAE."""

    result: SuiteResult
    """figures with intervals"""
    details: list[dict[str, Any]]
    """one object a true feature, for ``eval_result_details``"""


Advance = Callable[[int], Any]


class TrueCodes:
    """True codes of the rows of blocks; those of the last documents are kept, since blocks may mix some."""

    def __init__(self, held_out: HeldOut, source: SyntheticSource) -> None:
        self._held_out = held_out
        self.source = source
        self._kept: dict[int, csr_matrix] = {}

    def of(self, block: Block) -> csr_matrix:
        """True codes of the block's rows, float32 [row, true feature]."""
        store = self._held_out.store
        document = self._held_out.documents[block.document.numpy()]
        row = store.context_offsets[block.context.numpy()] + block.position.numpy()
        place = row - store.document_offsets[document]
        starts = np.flatnonzero(np.r_[True, np.diff(document) != 0])
        parts = [
            self._document(int(document[first]))[place[first:last]]
            for first, last in zip(starts, np.r_[starts[1:], len(document)], strict=True)
        ]
        return vstack(parts, format="csr")

    def _document(self, number: int) -> csr_matrix:
        if number not in self._kept:
            if len(self._kept) == KEPT_DOCUMENTS:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = truth_codes(self._held_out.store, self.source, number)
        return self._kept[number]


def truth_result(
    sae: SAE,
    held_out: HeldOut,
    source: SyntheticSource,
    *,
    n_bootstrap: int,
    seed: int,
    print_: str,
    advance: Advance = lambda _: None,
) -> TruthResult:
    """Every figure of the suite for one SAE; reads the held-out documents twice.

    Parameters
    ----------
    sae
        what is measured
    held_out
        the documents
    source
        of the store, as `truth_of_store` gives it
    n_bootstrap, seed
        resamples
    print_
        fingerprint that the result carries
    advance
        is told the rows of each block as it is done
    """
    truth = source.truth
    firings, energy = _firings(sae, held_out, advance)
    matching = match(truth.directions, sae.W_dec.cpu().numpy(), firings, sae.block_size)
    resampling = {"n_bootstrap": n_bootstrap, "seed": seed, "n_documents": held_out.n_documents}
    estimates, draws = recovery(matching, truth, **resampling)
    for more, more_draws in (
        purity(matching, truth, energy, **resampling),
        _pairs_found(sae, held_out, source, matching, n_bootstrap=n_bootstrap, seed=seed, advance=advance),
    ):
        estimates |= more
        draws |= more_draws
    n_live = int(matching.live.sum())
    for name, share in {
        "paired": len(matching.true_of_pair) / truth.n_features,
        **(
            {"share_of_H": float(matching.live[: sae.block_size].sum() / max(n_live, 1))}
            if sae.block_size
            else {}
        ),
    }.items():
        estimates[name] = Estimate.count(name, "1", share, held_out.n_documents, NO_INTERVAL)
    facts = {
        "n_true": {kind: int(truth.of_kind(kind).sum()) for kind in KINDS},
        "n_live": n_live,
        "recovered_above": RECOVERED,
        "matched_above": MATCHED,
        "min_firings": MIN_FIRINGS,
        "matches": {
            "true": matching.true_of_pair.tolist(),
            "feature": matching.feature_of_pair.tolist(),
            "cosine": matching.cosine[matching.true_of_pair, matching.feature_of_pair].round(6).tolist(),
        },
    }
    return TruthResult(SuiteResult(print_, estimates, draws, facts), _details(matching, source))


def _firings(
    sae: SAE, held_out: HeldOut, advance: Advance
) -> tuple[Int64[np.ndarray, " feature"], Float[np.ndarray, " feature"]]:
    """Tokens on which each feature is on, and its sum of squares."""
    firings = np.zeros(sae.d_sae, dtype=np.int64)
    energy = np.zeros(sae.d_sae)
    for block in held_out.blocks():
        f = sae.encode(block.x[block.kept].to(sae.device))
        firings += (f > 0).sum(dim=0).cpu().numpy()
        energy += f.square().sum(dim=0).double().cpu().numpy()
        advance(len(block.x))
    return firings, energy


def _pairs_found(
    sae: SAE,
    held_out: HeldOut,
    source: SyntheticSource,
    matching: Matching,
    *,
    n_bootstrap: int,
    seed: int,
    advance: Advance,
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Figures of the activations of matched pairs, resampled over documents."""
    n_pairs = len(matching.true_of_pair)
    most = max(2, min(MAX_UNITS, MAX_BYTES // (8 * len(SUMS) * max(n_pairs, 1))))
    units = held_out.units(most)
    sums = np.zeros((int(units.max()) + 1, len(SUMS), n_pairs))
    codes = TrueCodes(held_out, source)
    features = torch.from_numpy(matching.feature_of_pair)
    for block in held_out.blocks():
        f = sae.encode(block.x.to(sae.device)).cpu()[:, features]
        true = torch.from_numpy(codes.of(block)[:, matching.true_of_pair].toarray())
        unit = units[block.document][block.kept]
        _add(sums, f[block.kept].double(), true[block.kept].double(), unit)
        advance(len(block.x))
    kind = source.truth.kind[matching.true_of_pair]
    groups = {
        "": np.arange(n_pairs),
        **{f"_{name}": np.flatnonzero(kind == at) for at, name in enumerate(KINDS)},
    }
    metrics = [
        Metric(f"{name}{suffix}", "1", "no pair of the kind is matched and fires")
        for suffix in groups
        for name in ("f1", "pearson")
    ]
    sums = sums[sums[:, 0].sum(axis=1) > 0] if n_pairs else sums
    counts = resample_counts(len(sums), n_bootstrap, seed)
    return estimates_of(metrics, _averaged(sums, counts, list(groups.values())), held_out.n_documents)


def _add(
    sums: Float[np.ndarray, "unit sum pair"],
    f: Float[Tensor, "row pair"],
    v: Float[Tensor, "row pair"],
    unit: Int64[Tensor, " row"],
) -> None:
    """Add the rows' `SUMS` to those of their units."""
    present, place = torch.unique(unit, return_inverse=True)
    of_unit = torch.nn.functional.one_hot(place, len(present)).T.double()
    on, true_on = (f > 0).double(), (v > 0).double()
    for at, values in enumerate((torch.ones_like(f), on * true_on, on, true_on, f, v, f * f, v * v, f * v)):
        sums[present.numpy(), at] += (of_unit @ values).numpy()


def pair_figures(sums: Array) -> tuple[Array, Array]:
    """F1 and Pearson's correlation from `SUMS` [..., sum, pair]; NaN where undefined."""
    n, both, on, true_on, f, v, ff, vv, fv = (sums[..., at, :] for at in range(len(SUMS)))
    with np.errstate(divide="ignore", invalid="ignore"):
        f1 = 2 * both / (on + true_on)
        spread = (n * ff - f * f) * (n * vv - v * v)
        pearson = np.where(spread > 0, (n * fv - f * v) / np.sqrt(spread), np.nan)
    return np.where(on + true_on > 0, f1, np.nan), pearson


def _averaged(
    sums: Float[np.ndarray, "unit sum pair"], counts: Array, groups: Sequence[Int64[np.ndarray, " _"]]
) -> Bootstrap:
    """Means over the pairs of each group, on the sample, on resamples and without each unit."""
    n_units = len(sums)
    weights = np.concatenate([np.ones((1, n_units)), counts, 1 - np.eye(n_units)])
    totals = np.zeros((2, len(groups), len(weights), 2))
    for chunk in _chunks(sums.shape[2]):
        part = sums[:, :, chunk]
        weighted = (weights @ part.reshape(n_units, -1)).reshape(len(weights), *part.shape[1:])
        for which, values in enumerate(pair_figures(weighted)):
            defined = np.isfinite(values)
            for number, group in enumerate(groups):
                inside = group[(group >= chunk.start) & (group < chunk.stop)] - chunk.start
                totals[which, number, :, 0] += np.where(defined, values, 0.0)[:, inside].sum(axis=1)
                totals[which, number, :, 1] += defined[:, inside].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = totals[..., 0] / totals[..., 1]  # [figure, group, sample]
    columns = np.stack([means[which, at] for at in range(len(groups)) for which in range(2)], axis=1)
    n_draws = len(counts)
    return Bootstrap(columns[0], columns[1 : 1 + n_draws], columns[1 + n_draws :])


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, PAIRS_AT_ONCE):
        yield slice(start, min(start + PAIRS_AT_ONCE, n))


def _details(matching: Matching, source: SyntheticSource) -> list[dict[str, Any]]:
    truth = source.truth
    pair_of = dict(zip(matching.true_of_pair.tolist(), matching.feature_of_pair.tolist(), strict=True))
    best, cosine = matching.best_feature.tolist(), matching.cosine.max(axis=1).tolist()
    return [
        {
            "true_feature": at,
            "kind": KINDS[truth.kind[at]],
            "rate": float(truth.rate[at]),
            "run_length": float(truth.run_length[at]),
            "topic": int(truth.topic[at]),
            "best_feature": best[at] if matching.live.any() else None,
            "best_cosine": round(cosine[at], 6) if matching.live.any() else None,
            "paired_feature": pair_of.get(at),
        }
        for at in range(truth.n_features)
    ]
