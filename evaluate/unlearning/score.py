"""What unlearning scores: the rise of the forget domain's loss that the retain domain does not pay for.

    rise_D(s)   mean next-token cross-entropy on domain D with setting s, minus without, in nats
    score       max of rise_forget(s) over the settings s with rise_retain(s) <= 0.02 nats

The untouched model is one of the settings, so a score is never below 0. Random features' weakest setting
may already cost too much, and then their score is 0 for want of weaker ones; so the *interpolated* score is
given too: the largest rise_forget at which the broken line from the untouched model through a curve's
settings, in the order of m, has rise_retain <= 0.02. A maximum over settings is
optimistic: it also picks what noise favoured. Therefore (a) the setting is chosen again inside every
resample, (b) the *honest* score chooses it on one half of each domain's documents and takes the rise on the
other half, both ways, averaged, and (c) random features go through the same choice.

Documents are resampled within strata, those that are in the same of the forget domains, all topics at once:
so the mean over topics has an interval too. The honest scores' strata are the halves of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from tcsae.evaluate.estimates import Draws, Estimate
from tcsae.evaluate.intervals import Array, Bootstrap, bootstrap, interval
from tcsae.evaluate.unlearning.clamp import KINDS, Kind, Setting
from tcsae.evaluate.unlearning.domains import Indices
from tcsae.evaluate.unlearning.select import THRESHOLDS

RETAIN_LIMIT = 0.02
"""Largest rise of the retain domain's cross-entropy, in nats, at which a setting counts."""

Chosen = np.ndarray[Any, np.dtype[np.int64]]
"""Index of a setting, for any leading axes; 0 is the untouched model, so setting s has s + 1."""

FIGURES = (
    "score",
    "control",
    "gain",
    "interpolated",
    "interpolated_control",
    "interpolated_gain",
    "honest",
    "honest_control",
    "honest_gain",
    "honest_retain",
)
"""Each topic's figures: ``unlearning_<figure>_<topic>``; ``unlearning_<figure>`` is the mean over topics.

``control``: the score of random features; ``gain``: the score minus that; ``honest_retain``: the rise on the
retain documents of the half on which ``honest`` is measured, which nobody limits there.
"""

NO_FEATURE = (
    f"undefined, because no feature that fires on the forget documents has a density below {max(THRESHOLDS)} "
    "on the retain documents"
)
NO_CONTROL = "undefined, because no feature is left to be a control"
NO_PREDICTION = "a document's half of a domain holds no prediction"


@dataclass(frozen=True, slots=True, eq=False)
class TopicSums:
    """One topic as the forget domain, one SAE: sums over the counted predictions of each document."""

    settings: tuple[Setting, ...]
    """what was done"""
    is_forget: Bool[np.ndarray, " document"]
    """documents of the domain, among those that any topic uses"""
    n: Float[np.ndarray, " document"]
    """predictions; 0 in documents that this topic does not use"""
    loss: Float[np.ndarray, " document"]
    """cross-entropy of the untouched model"""
    hits: Float[np.ndarray, " document"]
    """right predictions of the untouched model"""
    rise: Float[np.ndarray, "document setting"]
    """cross-entropy with each setting, minus without"""
    hits_with: Float[np.ndarray, "document setting"]
    """right predictions with each setting"""
    limit: float = RETAIN_LIMIT
    """largest rise outside the domain at which a setting counts"""

    def of_kind(self, kind: Kind) -> Bool[np.ndarray, " setting"]:
        """Settings of the kind that clamp anything at all."""
        return np.array([bool(one.features) and one.kind == kind for one in self.settings], dtype=bool)


def strata_of(is_forget: Sequence[Bool[np.ndarray, " document"]]) -> Int64[np.ndarray, " document"]:
    """Number of each document's stratum: the forget domains that it is in.

    >>> strata_of([np.array([True, True, False]), np.array([False, True, False])]).tolist()
    [1, 3, 0]
    """
    strata: Indices = np.zeros(len(is_forget[0]), dtype=np.int64)
    for at, members in enumerate(is_forget):
        strata |= members.astype(np.int64) << at
    return strata


def halves_of(strata: Int64[np.ndarray, " document"]) -> Bool[np.ndarray, " document"]:
    """True for every second document of each stratum.

    >>> halves_of(np.array([5, 5, 0, 5])).tolist()
    [False, True, False, False]
    """
    rank = np.zeros(len(strata), dtype=np.int64)
    for stratum in np.unique(strata):
        members = strata == stratum
        rank[members] = np.arange(np.count_nonzero(members))
    second: Bool[np.ndarray, " document"] = rank % 2 == 1
    return second


def stratified_counts(
    strata: Int64[np.ndarray, " document"], n_resamples: int, seed: int
) -> Float[np.ndarray, "resample document"]:
    """How often each document is drawn in each resample, every stratum as often as it has documents.

    >>> stratified_counts(np.array([0, 0, 7]), 2, seed=0)[:, 2].tolist()
    [1.0, 1.0]
    """
    generator = np.random.default_rng([seed, len(strata)])
    counts = np.zeros((n_resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        equal = np.full(len(members), 1.0 / len(members))
        counts[:, members] = generator.multinomial(len(members), equal, size=n_resamples)
    return counts


def _columns(topic: TopicSums, documents: Bool[np.ndarray, " document"]) -> Array:
    """[document, 1 + setting] of ``documents``, zero elsewhere: predictions, rises."""
    return np.where(documents[:, None], np.column_stack([topic.n, topic.rise]), 0.0)


def _rises(sums: Array) -> Array:
    """Mean rises [..., setting], with the untouched model's 0 in front."""
    rises = sums[..., 1:] / sums[..., :1]
    return np.concatenate([np.zeros_like(rises[..., :1]), rises], axis=-1)


def _best(forget: Array, retain: Array, which: Bool[np.ndarray, " setting"], limit: float) -> Chosen:
    """Index of the best setting of ``which`` within the limit; 0 is the untouched model."""
    counts = np.concatenate([[True], which])
    return np.asarray(np.argmax(np.where(counts & (retain <= limit), forget, -np.inf), axis=-1))


def _taken(values: Array, at: Chosen) -> Array:
    return np.asarray(np.take_along_axis(values, np.expand_dims(at, -1), axis=-1)[..., 0])


def interpolated_score(
    forget: Array,
    retain: Array,
    curves: Sequence[Int64[np.ndarray, " strength"]],
    limit: float = RETAIN_LIMIT,
) -> Array:
    """Largest forget rise within the limit on the broken lines through ``curves``.

    ``forget`` and ``retain`` are rises [..., 1 + setting], the untouched model in front; a curve is the
    indices of its settings in them, the weakest first.

    >>> forget, retain = np.array([0.0, 0.4, 1.0]), np.array([0.0, 0.04, 0.08])
    >>> float(interpolated_score(forget, retain, [np.array([1, 2])]))
    0.2
    """
    best = np.zeros(forget.shape[:-1])
    for curve in curves:
        path = np.concatenate([[0], curve])
        f, r = forget[..., path], retain[..., path]
        here, after = r[..., :-1], r[..., 1:]
        crosses = (here <= limit) != (after <= limit)
        share = np.where(crosses, limit - here, 0.0) / np.where(crosses, after - here, 1.0)
        at_limit = f[..., :-1] + share * (f[..., 1:] - f[..., :-1])
        reached = [np.where(r <= limit, f, 0.0), np.where(crosses, at_limit, 0.0)]
        best = np.maximum(best, np.concatenate(reached, axis=-1).max(axis=-1))
    return np.where(np.isnan(forget + retain).any(axis=-1), np.nan, best)


def curves_of(topic: TopicSums, kind: Kind) -> list[Int64[np.ndarray, " strength"]]:
    """The topic's curves for `interpolated_score`: settings that differ in m alone."""
    curves: dict[tuple[float, int], list[tuple[float, int]]] = {}
    for at in np.flatnonzero(topic.of_kind(kind)):
        setting = topic.settings[at]
        curve = curves.setdefault((setting.threshold, setting.n_wanted), [])
        curve.append((setting.multiple, int(at) + 1))
    return [np.array([at for _, at in sorted(curve)]) for curve in curves.values()]


def score_bootstraps(
    topic: TopicSums, strata: Int64[np.ndarray, " document"], n_bootstrap: int, seed: int
) -> dict[str, Bootstrap]:
    """`FIGURES` of one topic by name, each with one column, and ``rises``: those of all settings on the
    forget domain, then those on the retain domain.
    """
    which_of_kind = [topic.of_kind(kind) for kind in KINDS]
    curves_of_kind = [curves_of(topic, kind) for kind in KINDS]
    n_settings = len(topic.settings)

    def plain(sums: Array) -> Array:
        forget, retain = (_rises(part) for part in np.split(sums, 2, axis=-1))
        score, control = (
            _taken(forget, _best(forget, retain, which, topic.limit)) for which in which_of_kind
        )
        line, control_line = (
            interpolated_score(forget, retain, curves, topic.limit) for curves in curves_of_kind
        )
        columns = [score, control, score - control, line, control_line, line - control_line]
        figures = np.stack(columns, axis=-1)
        return np.concatenate([figures, forget[..., 1:], retain[..., 1:]], axis=-1)

    def honest(sums: Array) -> Array:
        parts = [_rises(part) for part in np.split(sums, 4, axis=-1)]
        (forget_a, forget_b), (retain_a, retain_b) = parts[:2], parts[2:]
        found = []
        for which in which_of_kind:
            on_a = _best(forget_a, retain_a, which, topic.limit)
            on_b = _best(forget_b, retain_b, which, topic.limit)
            found.append((_taken(forget_b, on_a) + _taken(forget_a, on_b)) / 2)
            found.append((_taken(retain_b, on_a) + _taken(retain_a, on_b)) / 2)
        score, retain, control, _ = found
        return np.stack([score, control, score - control, retain], axis=-1)

    forget, half = topic.is_forget, halves_of(strata)
    whole = bootstrap(
        np.hstack([_columns(topic, forget), _columns(topic, ~forget)]),
        plain,
        stratified_counts(strata, n_bootstrap, seed),
    )
    quarters = (forget & ~half, forget & half, ~forget & ~half, ~forget & half)
    halved = bootstrap(
        np.hstack([_columns(topic, part) for part in quarters]),
        honest,
        stratified_counts(2 * strata + half, n_bootstrap, seed),
    )
    named = {name: _column(whole, slice(at, at + 1)) for at, name in enumerate(FIGURES[:6])}
    named |= {name: _column(halved, slice(at, at + 1)) for at, name in enumerate(FIGURES[6:])}
    return named | {"rises": _column(whole, slice(6, 6 + 2 * n_settings))}


def _column(found: Bootstrap, which: slice) -> Bootstrap:
    return Bootstrap(found.value[which], found.draws[:, which], found.leave_one_out[:, which])


def undefined_figures(topic: TopicSums) -> dict[str, str]:
    """Figures that cannot be had of this topic, and why; none if features of both kinds are clamped."""
    if not topic.of_kind("selected").any():
        return dict.fromkeys(FIGURES, NO_FEATURE)
    if not topic.of_kind("control").any():
        return {name: NO_CONTROL for name in FIGURES if "control" in name or "gain" in name}
    return {}


def topic_estimates(
    found: dict[str, dict[str, Bootstrap]],
    undefined: dict[str, dict[str, str]],
    n_documents: dict[str, int],
) -> tuple[dict[str, Estimate], dict[str, Draws]]:
    """Every topic's `FIGURES`, and their means over topics, which are undefined where one topic's is.

    ``found``, ``undefined`` and ``n_documents`` are by topic.
    """
    estimates: dict[str, Estimate] = {}
    draws: dict[str, Draws] = {}

    def add(name: str, one: Draws, n: int, why: str | None) -> None:
        estimates[name], kept = figure_estimate(name, "nats", one, n, why)
        if kept is not None:
            draws[name] = kept

    for figure in FIGURES:
        of_topic = {topic: draws_of(boots[figure]) for topic, boots in found.items()}
        for topic, one in of_topic.items():
            name = f"unlearning_{figure}_{topic}"
            add(name, one, n_documents[topic], undefined[topic].get(figure))
        lacking = [topic for topic in found if figure in undefined[topic]]
        mean = Draws(
            float(np.mean([one.value for one in of_topic.values()])),
            np.mean([one.draws for one in of_topic.values()], axis=0),
            np.mean([one.leave_one_out for one in of_topic.values()], axis=0),
        )
        why = f"undefined, because it is for {', '.join(lacking)}" if lacking else None
        add(f"unlearning_{figure}", mean, sum(n_documents.values()), why)
    return estimates, draws


def draws_of(boot: Bootstrap) -> Draws:
    """A bootstrap of one column, to be kept."""
    return Draws(float(boot.value[0]), boot.draws[:, 0], boot.leave_one_out[:, 0])


def figure_estimate(
    name: str, unit: str, one: Draws, n_documents: int, why: str | None
) -> tuple[Estimate, Draws | None]:
    """The estimate of ``one``, and ``one`` itself if it has a value; ``why`` it is undefined, None if it is not."""
    if why is not None:
        return Estimate.count(name, unit, None, n_documents, why), None
    ends = interval(one.value, one.draws, one.leave_one_out, undefined=NO_PREDICTION)
    return Estimate.of(name, unit, ends, n_documents), None if ends.value is None else one


def setting_rows(topic: TopicSums, rises: Bootstrap) -> list[dict[str, Any]]:
    """One row a setting: what was done, the rise in both domains with intervals, top-1 accuracies."""
    n = {True: topic.n[topic.is_forget].sum(), False: topic.n[~topic.is_forget].sum()}
    rows = []
    for at, setting in enumerate(topic.settings):
        row: dict[str, Any] = asdict(setting)
        row |= {"features": list(setting.features), "n_used": len(setting.features)}
        for is_forget, domain, column in (
            (True, "forget", at),
            (False, "retain", len(topic.settings) + at),
        ):
            ends = interval(
                float(rises.value[column]),
                rises.draws[:, column],
                rises.leave_one_out[:, column],
                undefined=NO_PREDICTION,
            )
            row[f"{domain}_rise"] = ends.value
            row[f"{domain}_rise_low"], row[f"{domain}_rise_high"] = ends.low, ends.high
            members = topic.is_forget == is_forget
            hits = float(topic.hits_with[members, at].sum())
            row[f"{domain}_accuracy"] = hits / n[is_forget] if n[is_forget] else None
        rows.append(row)
    return rows


def chosen_setting(topic: TopicSums, kind: Kind) -> int | None:
    """Index of the setting that the score is of; None: the untouched model, as nothing better is allowed."""
    forget, retain = (
        _rises(_columns(topic, part).sum(axis=0)) for part in (topic.is_forget, ~topic.is_forget)
    )
    best = int(_best(forget, retain, topic.of_kind(kind), topic.limit))
    return best - 1 if best else None
