r"""Sparse probes: a logistic regression on the k features that differ most between classes.

Which features (SAEBench's rule): for class c, those with the largest \|mean over c - mean over the rest\| on the
training samples, where the rest is the mean of the other classes' means, so that each of them counts alike. For
a probe of several classes at once, classes choose in turn (the class with the largest such difference
first), each its best feature that is not taken yet, until there are k. Ties go to the lower index; features
that are constant on the training samples are never chosen.

Two kinds of probes:

**multi-class**, our own figures. Features are divided by their standard deviation on the training samples before
anything else, so neither the choice nor the penalty depends on the units of a feature. One multinomial
regression; the figure is the balanced accuracy (the mean over classes of the share of a class that is
recognised), whose chance level is 1 / classes however unequal the classes are.

**one-vs-rest**, SAEBench's figure: features as they are; accuracy where half of the samples are of the class and
the other classes share the other half evenly, averaged over classes. SAEBench draws such a sample, here every
sample is used with the weight that makes it one; its chance level is 1/2.

In both, scikit-learn's `LogisticRegression` (L2, C = 1, at most 1,000 iterations, intercept), with
weights that give every class (the class and the rest) the same total on the training samples.

Uncertainty: test documents are resampled, the probe is not trained again. A class of which a resample holds no
document is left out of that resample's mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from scipy import sparse
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from tcsae.evaluate.intervals import Array
from tcsae.evaluate.probe_codes import Codes

MAX_ITERATIONS = 1000
"""SAEBench's limit; probes that reach it are named in the result."""

Solver = Literal["lbfgs", "newton-cholesky"]
"""How scikit-learn finds the minimum, which is one and the same. Newton's method takes ten steps however unequal
the features' scales are, where L-BFGS needs a thousand; its cost grows with the square of their number."""

CONSTANT = 1e-6
"""A feature whose standard deviation is below this share of its root mean square is constant: float32 rounds."""


class Predicted(NamedTuple):
    """What a probe says of the test samples."""

    label: Int64[np.ndarray, " sample"]
    """the class that it takes each for"""
    n_used: int
    """features that it reads"""
    has_converged: bool
    """whether the solver stopped before `MAX_ITERATIONS`"""


def deviations(x: Codes) -> Float[np.ndarray, " feature"]:
    """Standard deviation of each feature, 0 where it is constant, float64."""
    n = x.shape[0]
    if isinstance(x, sparse.csr_array):
        mean = np.asarray(x.sum(axis=0, dtype=np.float64)) / n
        square = np.asarray(x.power(2).sum(axis=0, dtype=np.float64)) / n
    else:
        mean = x.mean(axis=0, dtype=np.float64)
        square = np.einsum("nf,nf->f", x, x, dtype=np.float64, casting="safe") / n
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    return np.where(deviation > CONSTANT * np.sqrt(square), deviation, 0.0)


def contrasts(
    x: Codes, label: Int64[np.ndarray, " sample"], n_classes: int
) -> Float[np.ndarray, "class feature"]:
    r"""\|mean over the class - mean of the other classes' means\| of each feature, float64.

    >>> contrasts(np.float32([[1, 0], [3, 0], [0, 5]]), np.array([0, 0, 1]), 2).tolist()
    [[2.0, 5.0], [2.0, 5.0]]
    """
    n = np.bincount(label, minlength=n_classes)
    member = sparse.csr_array(
        (1.0 / n[label], (label, np.arange(len(label)))), shape=(n_classes, len(label)), dtype=np.float64
    )
    means = member @ x
    means = means.toarray() if isinstance(means, sparse.csr_array) else means
    rest = (means.sum(axis=0) - means) / (n_classes - 1)
    found: Array = np.abs(means - rest)
    return found


def in_turns(contrast: Float[np.ndarray, "class feature"], most: int) -> Int64[np.ndarray, " chosen"]:
    """The first ``most`` features that classes choose in turn; fewer where there are no more.

    Features without any contrast (NaN) are left out.

    >>> in_turns(np.array([[5.0, 4.0, 0.0], [9.0, 1.0, 2.0]]), 3).tolist()
    [0, 1, 2]
    """
    n_features = int(np.isfinite(contrast).all(axis=0).sum())
    if not n_features:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-contrast, axis=1, kind="stable")[:, :n_features]  # NaN comes last
    turns = np.argsort(-np.nanmax(contrast, axis=1), kind="stable")
    chosen: list[int] = []
    taken: set[int] = set()
    next_of = np.zeros(len(contrast), dtype=np.int64)
    while len(chosen) < min(most, n_features):
        for one in turns:
            while next_of[one] < n_features and int(order[one, next_of[one]]) in taken:
                next_of[one] += 1
            if next_of[one] < n_features and len(chosen) < most:
                chosen.append(int(order[one, next_of[one]]))
                taken.add(chosen[-1])
    return np.array(chosen, dtype=np.int64)


def predict(
    train: Codes,
    label: Int64[np.ndarray, " sample"],
    weight: Float[np.ndarray, " sample"],
    test: Codes,
    scale: Float[np.ndarray, " feature"],
    features: Int64[np.ndarray, " chosen"],
    solver: Solver = "lbfgs",
) -> Predicted:
    """What a logistic regression on ``features`` of ``train / scale`` says of ``test``."""
    model = LogisticRegression(max_iter=MAX_ITERATIONS, solver=solver)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.simplefilter("ignore", LinAlgWarning)  # Newton's step is singular: L-BFGS goes on from there
        model.fit(_columns(train, features, scale), label, sample_weight=weight)
    found = model.predict(_columns(test, features, scale)).astype(np.int64)
    converged = not any(issubclass(one.category, ConvergenceWarning) for one in caught)
    return Predicted(found, len(features), converged)


def _columns(x: Codes, features: Int64[np.ndarray, " chosen"], scale: Float[np.ndarray, " feature"]) -> Any:
    chosen = x[:, features]
    if isinstance(chosen, sparse.csr_array):
        return chosen.astype(np.float64) @ sparse.diags_array(1.0 / scale[features])
    return chosen.astype(np.float64) / scale[features]


def class_weights(label: Int64[np.ndarray, " sample"]) -> Float[np.ndarray, " sample"]:
    """Weights with which every class has the same total; they sum to the number of samples.

    >>> class_weights(np.array([0, 0, 0, 1])).round(3).tolist()
    [0.667, 0.667, 0.667, 2.0]
    """
    _, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
    found: Array = len(label) / (len(counts) * counts[inverse])
    return found


def rest_weights(label: Int64[np.ndarray, " sample"], positive: int) -> Float[np.ndarray, " sample"]:
    """Weights with which ``positive`` has half of the total and the other classes share the rest evenly.

    >>> rest_weights(np.array([0, 1, 1, 2]), 0).tolist()
    [2.0, 0.5, 0.5, 1.0]
    """
    even = class_weights(label)
    is_positive = label == positive
    n = len(label)
    found: Array = np.where(
        is_positive, even * n / (2 * even[is_positive].sum()), even * n / (2 * even[~is_positive].sum())
    )
    return found


# Figures from sums over documents ------------------------------------------------------------------------


def sums_by_document(
    document: Int64[np.ndarray, " sample"], columns: Sequence[Float[np.ndarray, " sample"]]
) -> Float[np.ndarray, "document column"]:
    """Sums of each column over the samples of each document, documents ascending."""
    _, inverse = np.unique(document, return_inverse=True)
    return np.stack([np.bincount(inverse, weights=column) for column in columns], axis=1)


def _mean_of_present(numerator: Array, denominator: Array, axis: int = -1) -> Array:
    """Mean along ``axis`` of the ratios whose denominator is not 0."""
    # totals less one document may be left at rounding errors, and counts are whole
    present = denominator > 0.5
    ratio = np.where(present, numerator / np.where(present, denominator, 1.0), 0.0)
    found: Array = ratio.sum(axis=axis) / present.sum(axis=axis)
    return found


def accuracies(sums: Float[np.ndarray, "*draw column"], n_classes: int) -> Float[np.ndarray, "*draw figure"]:
    """Balanced and plain accuracy of several multi-class probes.

    Parameters
    ----------
    sums
        columns: samples of each class, then for each probe the recognised samples of each class

    Returns
    -------
    Array [..., 2 * probe]
        all balanced accuracies, then all plain ones
    """
    n = sums[..., :n_classes]
    right = sums[..., n_classes:].reshape(*sums.shape[:-1], -1, n_classes)
    balanced = _mean_of_present(right, np.broadcast_to(n[..., None, :], right.shape))
    plain = right.sum(axis=-1) / n.sum(axis=-1)[..., None]
    return np.concatenate([balanced, plain], axis=-1)


def one_vs_rest_accuracies(
    sums: Float[np.ndarray, "*draw column"], n_classes: int
) -> Float[np.ndarray, "*draw class"]:
    """Accuracy of one probe a class, half of the samples positive, the other classes sharing the rest evenly.

    Parameters
    ----------
    sums
        columns: samples of each class; then for each probe (first axis) and each class of samples, those that
        the probe takes for its own class

    Returns
    -------
    Array [..., class]
        NaN for a class without samples
    """
    n = sums[..., :n_classes]
    taken = sums[..., n_classes:].reshape(*sums.shape[:-1], n_classes, n_classes)
    is_own = np.eye(n_classes, dtype=bool)
    counts = np.broadcast_to(n[..., None, :], taken.shape)
    hit = _mean_of_present(np.where(is_own, taken, 0.0), np.where(is_own, counts, 0.0))
    spared = _mean_of_present(np.where(is_own, 0.0, counts - taken), np.where(is_own, 0.0, counts))
    found: Array = (hit + spared) / 2
    return found
