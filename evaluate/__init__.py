"""Measure SAEs by replaying the model with them spliced in, and on the store alone."""

from tcsae.evaluate.compare import Compared, compare
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.run import evaluate, evaluate_subjects
from tcsae.evaluate.summary import Evaluation
from tcsae.evaluate.table import table

__all__ = ["Compared", "EvaluateConfig", "Evaluation", "compare", "evaluate", "evaluate_subjects", "table"]
