"""Draws of a resampling of documents from the figures without one document.

A figure that is a smooth function of which documents there are is, near the sample, linear in how often each counts:

    T(counts) ~ T + sum over units of (count_u - 1) (U - 1) / U (mean of T_(-v) over v - T_(-u))

with T_(-u) the figure without unit u, computed exactly (Efron and Tibshirani 1993, chapters 11 and 20, the
jackknife's linear approximation to the bootstrap). Two things speak for it here. A resample repeats documents, and
repeated documents look like information: the mutual information of a resample is larger than that of the sample by
about as much as Miller-Madow takes away, for the nulls too, so that resamples of the excess lie below the sample's by
several standard errors. And U figures are computed, not 2,000. The draws of two SAEs with the same counts are pairs.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tcsae.evaluate.intervals import Bootstrap


def linear_bootstrap(
    value: Float[np.ndarray, " metric"],
    leave_one_out: Float[np.ndarray, "unit metric"],
    counts: Float[np.ndarray, "resample unit"],
) -> Bootstrap:
    """Figures on resamples given by ``counts``, to first order; exact for a mean over units.

    >>> x = np.array([1.0, 2.0, 6.0])
    >>> without = np.array([[4.0], [3.5], [1.5]])
    >>> linear_bootstrap(np.array([3.0]), without, np.array([[0.0, 1.0, 2.0]])).draws  # (2 + 6 + 6) / 3
    array([[4.66666667]])
    """
    n_units = len(leave_one_out)
    if n_units < 2:
        return Bootstrap(value, np.tile(value, (len(counts), 1)), leave_one_out)
    influence = (n_units - 1) / n_units * (leave_one_out.mean(axis=0) - leave_one_out)
    return Bootstrap(value, value + (counts - 1) @ influence, leave_one_out)
