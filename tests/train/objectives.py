"""Every temporal term, for the tests that try them all."""

from __future__ import annotations

from typing import Any

from tcsae.tests.train.small import SMALL_ARM
from tcsae.train import ArmConfig

OBJECTIVES: dict[str, dict[str, Any]] = {
    "info_nce": {},
    "info_nce-kept": {"contrasted_code": "after_top_k"},
    "placebo": {"positives": "other_document"},
    "in_batch": {"objective": "in_batch", "positives": "previous"},
    "in_batch-kept": {
        "objective": "in_batch",
        "positives": "earlier",
        "similarity": "dot",
        "temperature": 1.0,
        "mask_documents": False,
        "contrasted_code": "after_top_k",
    },
    "difference": {"objective": "difference", "positives": "previous"},
    "difference-kept": {"objective": "difference", "contrasted_code": "after_top_k"},
}
"""each objective, kind of positive, similarity and code at least once"""


def every_objective() -> tuple[ArmConfig, ...]:
    """An arm of each, small enough for the sticky store."""
    return tuple(
        ArmConfig(name=name, **(SMALL_ARM | {"alpha": 0.1} | options)) for name, options in OBJECTIVES.items()
    )
