"""Telling an SAE that cannot recover, so that a run stops instead of training on for hours."""

from __future__ import annotations

import math
from typing import Any

NEARLY_ALL = 0.99
"""share of dead features that counts as a collapse when it lasts"""


class CollapseWatch:
    """Looks at every step's terms; remembers for how many steps nearly all features of an SAE have been dead.

    Parameters
    ----------
    patience
        such steps in a row after which it is a collapse
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.nearly_dead: dict[str, int] = {}
        """such steps in a row, by SAE; part of the checkpoint"""

    def problem(self, terms: dict[str, dict[str, Any]], step: int) -> str | None:
        """Which SAE has collapsed after ``step`` steps, why, and the figures that show it; None if none has.

        >>> terms = {"tc16-s0": {"loss": 0.5, "fvu": 0.5, "l0": 0.0, "dead_share": 0.25}}
        >>> CollapseWatch(100).problem(terms, 7)
        'tc16-s0 collapsed at step 7: no feature is active (L0 = 0); loss 0.5, fvu 0.5, l0 0, dead_share 0.25'
        """
        for name, found in terms.items():
            dead = self.nearly_dead.get(name, 0) + 1 if found["dead_share"] > NEARLY_ALL else 0
            self.nearly_dead[name] = dead
            if not math.isfinite(found["loss"]):
                reason = "the loss is not finite"
            elif found["l0"] == 0:
                reason = "no feature is active (L0 = 0)"
            elif dead >= self._patience:
                reason = f"more than {NEARLY_ALL:.0%} of the features have been dead for {dead} steps"
            else:
                continue
            figures = ", ".join(
                f"{field} {found[field]:.4g}" for field in ("loss", "fvu", "l0", "dead_share")
            )
            return f"{name} collapsed at step {step}: {reason}; {figures}"
        return None
