"""Probes of every part of a dictionary, and their accuracies with intervals over test documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from tcsae.evaluate.estimates import Draws, Estimate, Metric, estimates_of
from tcsae.evaluate.heldout import Indices
from tcsae.evaluate.intervals import Array, bootstrap, resample_counts
from tcsae.evaluate.probe_codes import Codes
from tcsae.evaluate.probe_samples import CONTEXT_TASKS, Task
from tcsae.evaluate.probing import (
    Predicted,
    accuracies,
    class_weights,
    contrasts,
    deviations,
    in_turns,
    one_vs_rest_accuracies,
    predict,
    rest_weights,
    sums_by_document,
)

Size = int | None
"""Features that a probe may read; None: all of its part ("dense")."""

SIZES: tuple[Size, ...] = (1, 2, 5, 20, None)
"""Of the multi-class probes."""

SAEBENCH_SIZES: tuple[Size, ...] = (1, 2, 5, 10, 20, 50, 100, None)
"""Of the one-vs-rest probes: all that SAEBench's file has a field for."""

MAJORITY = "majority"
"""The probe that always says the class with most training samples."""


class Undefined(NamedTuple):
    """A probe that cannot be trained."""

    reason: str
    """why, to follow "undefined, because" """


Probe = tuple[str, Size]
"""Which part of which code, and how many features of it."""


def size_name(size: Size) -> str:
    """``k20``, or ``dense``."""
    return "dense" if size is None else f"k{size}"


def probe_name(task: str, part: str, size: Size) -> str:
    """Name of a figure.

    >>> probe_name("topic", "H", 20), probe_name("source", "whole", None)
    ('probe_topic_H_k20', 'probe_source_whole_dense')
    """
    return f"probe_{task}_{part}_{size_name(size)}"


# Fits --------------------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """The probes of one code on one task."""

    multi_class: dict[Probe, Predicted | Undefined]
    """one multinomial probe each"""
    one_vs_rest: dict[Probe, list[Predicted] | Undefined]
    """one binary probe a class; 1 where the sample is taken for it"""
    chosen: dict[str, list[int]]
    """of each part, the features of its largest sparse multi-class probe, in the order in which they were chosen"""


def fit(
    task: Task,
    codes: tuple[Codes, Codes],
    parts: Mapping[str, Indices],
    one_vs_rest_of: Sequence[str],
    advance: Callable[[int], Any],
) -> Fitted:
    """Train every probe of the given ``parts`` (feature indices by name).

    ``codes`` are those of the training and of the test samples; ``advance`` is told the number of probes trained.
    """
    train, test = codes
    scale = deviations(train)
    varies = scale > 0
    raw = np.where(varies, contrasts(train, task.train.label, len(task.classes)), np.nan)
    with np.errstate(invalid="ignore"):
        scaled = raw / np.where(varies, scale, 1.0)
    weight = class_weights(task.train.label)
    multi: dict[Probe, Predicted | Undefined] = {}
    binary: dict[Probe, list[Predicted] | Undefined] = {}
    chosen: dict[str, list[int]] = {}
    most = max(size for size in SIZES if size is not None)
    most_binary = max(size for size in SAEBENCH_SIZES if size is not None)
    for part, features in parts.items():
        turns = features[in_turns(scaled[:, features], most)]
        chosen[part] = turns.tolist()
        every = features[varies[features]]
        for size in SIZES:
            used = every if size is None else turns[:size]
            multi[part, size] = _undefined(part, features, used, size) or predict(
                train, task.train.label, weight, test, scale, used
            )
            advance(1)
    for part in one_vs_rest_of:
        features = parts[part]
        every = features[varies[features]]
        order = [features[in_turns(raw[[one]][:, features], most_binary)] for one in range(len(task.classes))]
        for size in SAEBENCH_SIZES:
            undefined = _undefined(part, features, every if size is None else order[0][:size], size)
            binary[part, size] = undefined or [
                predict(
                    train,
                    (task.train.label == one).astype(np.int64),
                    rest_weights(task.train.label, one),
                    test,
                    # SAEBench trains its dense probe by another method; standardised, L-BFGS converges
                    scale if size is None else np.ones_like(scale),
                    every if size is None else order[one][:size],
                    "lbfgs" if size is None else "newton-cholesky",
                )
                for one in range(len(task.classes))
            ]
            advance(len(task.classes))
    return Fitted(multi, binary, chosen)


def n_fits(task: Task, n_parts: int, n_one_vs_rest: int) -> int:
    """Probes that `fit` trains."""
    return n_parts * len(SIZES) + n_one_vs_rest * len(SAEBENCH_SIZES) * len(task.classes)


def _undefined(part: str, features: Indices, used: Indices, size: Size) -> Undefined | None:
    if size is not None and size > len(features):
        return Undefined(f"{part} has {len(features)} features, fewer than {size}")
    if not len(used):
        return Undefined(f"no feature of {part} varies on the training samples")
    return None


# Figures -----------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """One task's figures for one SAE."""

    estimates: dict[str, Estimate]
    """by metric"""
    draws: dict[str, Draws]
    """of those with an interval"""


def multi_class_figures(
    task: Task, probes: Mapping[Probe, Predicted | Undefined], n_bootstrap: int, seed: int
) -> Figures:
    """Balanced accuracy of every probe, of chance, and of H less a random block of its size.

    For the tasks of contexts plain accuracy too (``probe_accuracy_…``), and that of the majority class; gates
    have equally many samples of each class, so there it would say the same.
    """
    label, document = task.test.label, task.test.document
    n_classes = len(task.classes)
    majority = np.full_like(label, np.bincount(task.train.label).argmax())
    defined = {probe: one.label for probe, one in probes.items() if isinstance(one, Predicted)}
    predictions = [*defined.values(), majority]
    is_class = label[:, None] == np.arange(n_classes)
    columns = [*is_class.T.astype(np.float64)]
    for found in predictions:
        columns += [*(is_class & (found == label)[:, None]).T.astype(np.float64)]
    sums = sums_by_document(document, columns)
    order = list(defined)
    pairs = [
        (order.index(("H", size)), order.index(("random", size)), size)
        for size in SIZES
        if ("H", size) in defined and ("random", size) in defined
    ]

    def statistic(sums: Array) -> Array:
        found = accuracies(sums, n_classes)
        differences = [found[..., treated] - found[..., control] for treated, control, _ in pairs]
        return np.concatenate([found, *(one[..., None] for one in differences)], axis=-1)

    undefined = "no class has a test sample"
    balanced = [Metric(probe_name(task.name, *probe), "1", undefined) for probe in order]
    plain = [Metric(probe_name(f"accuracy_{task.name}", *probe), "1", undefined) for probe in order]
    metrics = [
        *balanced,
        Metric(f"probe_{task.name}_{MAJORITY}", "1", undefined),
        *plain,
        Metric(f"probe_accuracy_{task.name}_{MAJORITY}", "1", undefined),
        *(Metric(probe_name(task.name, "H_minus_random", size), "1", undefined) for *_, size in pairs),
    ]
    estimates, draws = _estimated(metrics, sums, statistic, n_bootstrap, seed)
    # always 1 / classes, in every resample: chance without an interval says it
    dropped = {f"probe_{task.name}_{MAJORITY}"}
    if task.name not in CONTEXT_TASKS:
        dropped |= {name for name in estimates if name.startswith("probe_accuracy_")}
    for name in dropped:
        del estimates[name]
        draws.pop(name, None)
    chance = Estimate.count(
        f"probe_{task.name}_chance",
        "1",
        1 / n_classes,
        len(sums),
        "no interval, because it is known: 1 / classes",
    )
    for probe, one in probes.items():
        if isinstance(one, Undefined):
            name = probe_name(task.name, *probe)
            estimates[name] = _missing(name, one.reason, len(sums))
    return Figures({chance.metric: chance, **estimates}, draws)


def one_vs_rest_figures(
    task: Task, probes: Mapping[Probe, list[Predicted] | Undefined], n_bootstrap: int, seed: int
) -> tuple[Figures, dict[Probe, dict[str, float]]]:
    """SAEBench's accuracy of every probe (``probe_one_vs_rest_…``), and each class's without an interval."""
    label, document = task.test.label, task.test.document
    n_classes = len(task.classes)
    is_class = label[:, None] == np.arange(n_classes)
    estimates: dict[str, Estimate] = {}
    draws: dict[str, Draws] = {}
    of_classes: dict[Probe, dict[str, float]] = {}

    def statistic(sums: Array) -> Array:
        each = one_vs_rest_accuracies(sums, n_classes)
        mean: Array = np.nanmean(each, axis=-1, keepdims=True)
        return mean

    for probe, ones in probes.items():
        name = probe_name(f"one_vs_rest_{task.name}", *probe)
        if isinstance(ones, Undefined):
            estimates[name] = _missing(name, ones.reason, len(np.unique(document)))
            continue
        columns = [*is_class.T.astype(np.float64)]
        for one in ones:
            columns += [*(is_class & (one.label == 1)[:, None]).T.astype(np.float64)]
        sums = sums_by_document(document, columns)
        found, found_draws = _estimated(
            [Metric(name, "1", "no class has a test sample")], sums, statistic, n_bootstrap, seed
        )
        estimates |= found
        draws |= found_draws
        each = one_vs_rest_accuracies(sums.sum(axis=0), n_classes)
        of_classes[probe] = dict(zip(task.classes, each.tolist(), strict=True))
    return Figures(estimates, draws), of_classes


def _estimated(
    metrics: Sequence[Metric],
    sums: Float[np.ndarray, "document column"],
    statistic: Callable[[Array], Array],
    n_bootstrap: int,
    seed: int,
) -> tuple[dict[str, Estimate], dict[str, Draws]]:
    counts = resample_counts(len(sums), n_bootstrap, seed)
    return estimates_of(metrics, bootstrap(sums, statistic, counts), len(sums))


def _missing(name: str, reason: str, n_documents: int) -> Estimate:
    return Estimate.count(name, "1", None, n_documents, f"undefined, because {reason}")


def class_counts(task: Task) -> dict[str, dict[str, int]]:
    """Documents and samples of each class on either side."""

    def of(
        label: Int64[np.ndarray, " sample"], document: Int64[np.ndarray, " sample"], one: int
    ) -> tuple[int, int]:
        return len(np.unique(document[label == one])), int((label == one).sum())

    found = {}
    for at, name in enumerate(task.classes):
        train, test = (of(side.label, side.document, at) for side in (task.train, task.test))
        found[name] = {
            "n_train_documents": train[0],
            "n_train_samples": train[1],
            "n_test_documents": test[0],
            "n_test_samples": test[1],
        }
    return found
