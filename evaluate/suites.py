"""The suites that ``--suite`` names, in the order in which they run: what is cheap first."""

from __future__ import annotations

from tcsae.evaluate.bench import SuiteOfMetrics
from tcsae.evaluate.core_suite import CoreSuite
from tcsae.evaluate.probing_suite import ProbingSuite
from tcsae.evaluate.temporal_suite import TemporalSuite

SUITES_IN_ORDER: tuple[SuiteOfMetrics, ...] = (TemporalSuite(), ProbingSuite(), CoreSuite())
