"""The suites that ``--suite`` names, in the order in which they run: what is cheap first."""

from __future__ import annotations

from tcsae.evaluate.bench import SuiteOfMetrics
from tcsae.evaluate.core_suite import CoreSuite
from tcsae.evaluate.probing_suite import ProbingSuite
from tcsae.evaluate.temporal_suite import TemporalSuite
from tcsae.evaluate.truth_suite import TruthSuite
from tcsae.evaluate.unlearning_suite import UnlearningSuite

SUITES_IN_ORDER: tuple[SuiteOfMetrics, ...] = (
    TemporalSuite(),
    TruthSuite(),
    ProbingSuite(),
    CoreSuite(),
    UnlearningSuite(),
)
