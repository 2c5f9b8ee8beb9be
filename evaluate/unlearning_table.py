"""Unlearning in the terminal: one line for each SAE and forget domain."""

from __future__ import annotations

from collections.abc import Sequence

from tcsae.evaluate.estimates import Estimate
from tcsae.evaluate.summary import Row
from tcsae.evaluate.unlearning.score import RETAIN_LIMIT

PREFIX = "unlearning_score_"


def unlearning_lines(rows: Sequence[Row]) -> list[str]:
    """What each SAE unlearns, with 95 % intervals; empty if none was asked."""
    lines = []
    for row in rows:
        for name, score in row.estimates.items():
            if not name.startswith(PREFIX):
                continue
            topic = name.removeprefix(PREFIX)
            others = (row.estimates[f"unlearning_{figure}_{topic}"] for figure in ("honest", "control"))
            honest, control = map(figure_in_words, others)
            lines.append(
                f"unlearning, {row.sae}, {topic}: {figure_in_words(score)}; honest {honest}; random features {control}"
            )
    if lines:
        lines.append(
            f"unlearning: rise of the topic's cross-entropy (nats per token) that costs other text at most "
            f"{RETAIN_LIMIT}; honest: the setting is chosen on other documents than it is scored on"
        )
    return lines


def figure_in_words(one: Estimate) -> str:
    """Value and interval, or why there is none of either."""
    if one.value is None:
        return one.reason or "undefined"
    if one.low is None or one.high is None:
        return f"{one.value:.3f} ({one.reason})" if one.reason else f"{one.value:.3f}"
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
