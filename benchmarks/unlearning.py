"""Unlearning of topics, read from folders that `tcsae evaluate --suite unlearning` has written: one Markdown table.

python -P benchmarks/unlearning.py OUT [OUT ...]

A line for each topic and SAE, and one for each SAE minus its control (same seed and sizes, no contrast), paired over
documents. All figures are nats per token, with 95 % bootstrap intervals over documents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from tcsae.evaluate.compare.folders import Evaluated, read_folders
from tcsae.evaluate.temporal import compare_with_control
from tcsae.evaluate.unlearning_table import figure_in_words

FIGURES = {
    "score": "score",
    "control": "random features",
    "interpolated_gain": "interpolated, minus random",
    "honest": "honest score",
    "honest_gain": "honest, minus random",
    "honest_retain": "honest: rise elsewhere",
}
"""Columns: figures of the suite (docs/decisions/014) and what the table calls them."""


class Topic(NamedTuple):
    """One forget domain of one folder."""

    out: Path
    name: str
    split: str
    n_forget: int
    """documents scored inside"""
    n_retain: int
    """documents scored outside"""
    saes: tuple[Evaluated, ...]


def topics_of(out: Path) -> list[Topic]:
    """The topics of an evaluation folder."""
    found = read_folders([out])
    body = json.loads((out / "unlearning" / f"{found.saes[0].sae}.json").read_text())
    return [
        Topic(
            out,
            topic["topic"],
            str(found.conditions["split"]),
            topic["domains"]["forget"]["n_documents"],
            topic["domains"]["retain"]["n_documents"],
            found.saes,
        )
        for topic in body["eval_result_unstructured"]["tcsae"]["topics"]
    ]


def lines_of(topic: Topic) -> list[str]:
    """The topic's lines of the table."""
    where = f"{topic.name} ({topic.split}: {topic.n_forget} + {topic.n_retain})"
    lines = []
    for sae in topic.saes:
        cells = [figure_in_words(sae.estimates[f"unlearning_{figure}_{topic.name}"]) for figure in FIGURES]
        lines.append(f"| {where} | {sae.sae} | " + " | ".join(cells) + " |")
    controls = {one.seed: one for one in topic.saes if one.settings.get("alpha") == 0}
    for sae in topic.saes:
        control = controls.get(sae.seed)
        if control is None or sae is control:
            continue
        cells = []
        for figure in FIGURES:
            name = f"unlearning_{figure}_{topic.name}"
            _, difference = compare_with_control(
                name, sae.draws.get(name), control.draws.get(name), topic.n_forget + topic.n_retain
            )
            cells.append(figure_in_words(difference))
        lines.append(f"| {where} | {sae.sae} minus {control.sae} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("outs", nargs="+", type=Path, help="evaluation folders")
    print("| topic (split: documents scored in it + outside) | SAE | " + " | ".join(FIGURES.values()) + " |")
    print("|---|---|" + "---:|" * len(FIGURES))
    for out in parser.parse_args().outs:
        for topic in topics_of(out):
            print("\n".join(lines_of(topic)))


if __name__ == "__main__":
    main()
