"""Telling an SAE that cannot recover, so that a run stops instead of training on for hours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

NEARLY_ALL = 0.99
"""share of dead features that counts as a collapse when it lasts"""

NEARLY_NONE = 0.1
"""active features per token below which it is a collapse when it lasts: most tokens have none"""

TERMS = ("fvu", "fit", "sparsity", "auxiliary")
"""what every step tells of a loss; it is also made of the contrast and the L2 penalty"""


class Watched(NamedTuple):
    """What must be known of an SAE to judge its terms."""

    blocks: dict[str, int]
    """features of each block, by the name its terms end in: "h" and "l", or "l" alone"""
    contrasts: bool
    """its objective has a contrastive term, so it needs pairs"""


class CollapseWatch:
    """Looks at every step's terms; remembers for how many steps what may pass has lasted.

    Each block is judged on its own: a dead block H is a small part of all features.

    Parameters
    ----------
    watched
        the SAEs by name
    patience
        steps in a row with nearly all features of a block dead, with next to none active, or without a pair, that
        are a collapse
    """

    def __init__(self, watched: Mapping[str, Watched], patience: int) -> None:
        self._watched, self._patience = watched, patience
        self.lasting: dict[str, int] = {}
        """such steps in a row, by SAE and block, "active" or "pairs"; part of the checkpoint"""

    def problem(self, terms: dict[str, dict[str, Any]], step: int) -> str | None:
        """Which SAE has collapsed after ``step`` steps, why, and the figures that show it; None if none has.

        >>> terms = {"a-s0": {"loss": 0.5, "fvu": 0.5, "l0": 0.0, "l0_l": 0.0, "dead_share": 0.25, "dead_l": 2}}
        >>> CollapseWatch({"a-s0": Watched({"l": 8}, contrasts=False)}, 100).problem(terms, 7)
        'a-s0 collapsed at step 7: no feature is active (L0 = 0); loss 0.5, fvu 0.5, l0 0, dead_share 0.25, \
l0_l 0, dead_l 2 of 8'
        """
        for name, found in terms.items():
            reason = self._reason(name, found)
            if reason is not None:
                blocks = self._watched[name].blocks.items()
                figures = ", ".join(
                    [f"{field} {found[field]:.4g}" for field in ("loss", "fvu", "l0", "dead_share")]
                    + [
                        f"l0_{b} {found[f'l0_{b}']:.4g}, dead_{b} {found[f'dead_{b}']} of {n}"
                        for b, n in blocks
                    ]
                )
                return f"{name} collapsed at step {step}: {reason}; {figures}"
        return None

    def _reason(self, name: str, found: dict[str, Any]) -> str | None:
        blocks, contrasts = self._watched[name]
        if not math.isfinite(found["loss"]):
            terms = [term for term in TERMS if not math.isfinite(found[term])]
            return f"the loss is not finite ({', '.join(terms or ['contrast or l2_penalty'])})"
        if found["l0"] == 0:
            return "no feature is active (L0 = 0)"
        if (steps := self._steps(f"{name}/active", found["l0"] < NEARLY_NONE)) >= self._patience:
            return f"fewer than {NEARLY_NONE} features per token have been active for {steps} steps"
        for block, size in blocks.items():
            features = f"of block {block.upper()} " if len(blocks) > 1 else ""
            if found[f"l0_{block}"] == 0:
                return f"no feature {features}is active (L0 = 0)"
            steps = self._steps(f"{name}/{block}", found[f"dead_{block}"] / size > NEARLY_ALL)
            if steps >= self._patience:
                return (
                    f"more than {NEARLY_ALL:.0%} of the features {features}have been dead for {steps} steps"
                )
        if contrasts and (steps := self._steps(f"{name}/pairs", found["n_pairs"] == 0)) >= self._patience:
            return f"the contrast has had no pair for {steps} steps"
        return None

    def _steps(self, key: str, lasts: bool) -> int:
        """For how many steps in a row ``lasts`` has been true."""
        self.lasting[key] = self.lasting.get(key, 0) + 1 if lasts else 0
        return self.lasting[key]
