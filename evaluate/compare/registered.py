"""What was registered before any measurement (METHOD.md, section 5).

- primary: the contrast (w = 16) minus the same SAE with alpha = 0, in the excess normalised mutual information at lag 8
  over the whole dictionary, at L0 = 40 or the nearest that all arms reach; 5 % two-sided, no correction;
- non-inferiority of reconstruction, two one-sided tests (TOST): FVU rises by at most 0.01, loss recovered falls by at
  most 0.005; each at 5 % one-sided, that is, the 90 % interval lies within the margin. Both must hold, which needs
  no correction (intersection-union; Berger 1982);
- everything else: two-sided, Holm's (1979) correction over all of it.
"""

from __future__ import annotations

from tcsae.evaluate.compare.bootstrap import Alternative
from tcsae.evaluate.probe_figures import probe_name

REGISTERED = "excess_information_whole_lag8"
"""Metric of the primary endpoint."""

STAND_IN = "autocorrelation_whole_lag8"
"""Metric in its place where an evaluation has no excess information; said wherever it is shown."""

TEMPORAL = tuple(
    f"{kind}_{part}_lag{lag}"
    for kind in ("excess_information", "autocorrelation", "within_autocorrelation")
    for part in ("whole", "H", "L")
    for lag in (1, 8, 32)
)
QUALITY = ("fvu", "loss_recovered", "kl_sae")
PROBES = tuple(
    probe_name(task, part, 20)
    for task in ("topic", "source", "position", "token", "previous_token")
    for part in ("H", "whole")
)
USES = ("unlearning_score", *PROBES)

SECONDARY = tuple((metric, metric) for metric in (*TEMPORAL, *QUALITY, *USES))
"""Compared beside the primary endpoint, where measured: the metric of the treated and of the control."""

BEST_BLOCK = tuple(
    (f"{kind}_H_lag8", f"{kind}_best_lag8") for kind in ("excess_information", "autocorrelation")
)
"""Block H against the block of the same size that hindsight finds in the control."""

MARGINS: dict[str, tuple[float, Alternative]] = {"fvu": (0.01, "less"), "loss_recovered": (-0.005, "greater")}
"""Differences, treated minus control, that reconstruction must stay within, and on which side."""

TOST_LEVEL = 0.90
"""The two-sided interval whose ends are one-sided bounds of 95 %."""
