"""The settings of an arm small enough for the sticky store."""

from __future__ import annotations

from typing import Any

SMALL_ARM: dict[str, Any] = {
    "k": 4,
    "block_share": 0.25,
    "window": 8,
    "anchors": 16,
    "warmup_steps": 4,
    "dead_after": 640,
    "aux_k": 8,
}
