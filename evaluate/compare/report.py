"""``report.html`` and ``report.md``: one self-contained page, and the same as text.

The page asks for nothing from anywhere: figures are in it, there is no script. Names of arms and everything else that
came out of a file is escaped by the template engine.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from tcsae.evaluate.compare import tables
from tcsae.evaluate.compare.arms import Design
from tcsae.evaluate.compare.bootstrap import ENOUGH_SEEDS
from tcsae.evaluate.compare.features import CAUTION, LEAST_COSINE
from tcsae.evaluate.compare.lines import arm_lines
from tcsae.evaluate.compare.matching import REGISTERED_L0, TOLERANCE
from tcsae.evaluate.compare.registered import MARGINS, REGISTERED
from tcsae.evaluate.compare.run import Compared, replayed_text, sample_text
from tcsae.evaluate.compare.tables import Table
from tcsae.evaluate.estimates import Estimate

TEMPLATE = "report.html"

CAPTIONS = {
    "training_metrics": "Training: reconstruction, sparsity and the temporal term against steps.",
    "final_metrics": "Held-out documents: explained variance, squared error and KL divergence of each arm.",
    "tradeoff": "Temporal consistency against sparsity and against reconstruction, along alpha.",
    "autocorrelation": "How long features stay on: each arm over all lags.",
    "unlearning": "Unlearning: what is forgotten against what is kept.",
}


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the report."""

    title: str
    """its heading"""
    paragraphs: tuple[str, ...] = ()
    """plain text"""
    table: Table | None = None
    """below the text"""
    points: tuple[str, ...] = ()
    """a list below the table"""
    is_folded: bool = False
    """shown only when the reader asks for it"""


def html_of(found: Compared, design: Design, n_resamples: int) -> str:
    """The page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("tcsae.evaluate.compare") / TEMPLATE).read_text("utf-8"))
    images = [
        {"name": name, "caption": CAPTIONS[name], "data": base64.b64encode(path.read_bytes()).decode()}
        for name, path in found.images.items()
    ]
    return template.render(
        title=_title(found),
        sections=sections_of(found, design, n_resamples),
        images=images,
        version=version("tcsae"),
    )


def markdown_of(found: Compared, design: Design, n_resamples: int) -> str:
    """The same as Markdown, figures by reference."""
    parts = [f"# {tables.Table((_title(found),), ()).head[0]}\n"]
    for section in sections_of(found, design, n_resamples):
        parts.append(f"## {section.title}\n")
        parts += [f"{_inline(text)}\n" for text in section.paragraphs]
        if section.table is not None:
            parts.append(section.table.markdown())
        parts.append("".join(f"- {_inline(text)}\n" for text in section.points))
    parts.append("## Figures\n")
    parts += [f"![{CAPTIONS[name]}]({path.name})\n" for name, path in found.images.items()]
    return "\n".join(part for part in parts if part)


def _inline(text: str) -> str:
    """Text that stays text in Markdown."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _title(found: Compared) -> str:
    return f"Comparison of {len(found.arms)} arms on {found.conditions['model']}, {found.conditions['hook']}"


def sections_of(found: Compared, design: Design, n_resamples: int) -> list[Section]:
    """Everything that the report says, in its order."""
    secondary = found.of_kind("secondary")
    tests = found.of_kind("non-inferiority")
    sections = [
        Section("Primary endpoint", tuple(_primary(found, design)), _primary_table(found)),
        Section(
            "Non-inferiority of reconstruction",
            (
                "Two one-sided tests at 5 %: FVU may rise by at most "
                f"{MARGINS['fvu'][0]:g} and loss recovered fall by at most {-MARGINS['loss_recovered'][0]:g}. Both "
                "must hold; registered for the primary pair, the others are shown without correction.",
            ),
            tables.tost_table(tests) if tests else None,
        ),
        Section("Arms", tuple(_arms_text(found)), tables.arms_table(found.arms, found.figures)),
        Section(
            "All other comparisons",
            (
                f"Two-sided; Holm's correction over the {sum(one.p_holm is not None for one in secondary)} of them "
                "that have a p. Differences are treated minus control.",
            ),
            tables.contrasts_table(secondary) if secondary else None,
        ),
        Section(
            "Trade-off",
            (
                "An arm is on the front if no other is at least as consistent at no higher cost, and better in one.",
            ),
            tables.front_table(found.points, found.metric) if found.points else None,
        ),
        Section(
            "Matched features",
            (
                f"Features matched one to one by their decoder rows (Hungarian algorithm, cosine above {LEAST_COSINE});"
                " of each pair the arms nearest in k. " + CAUTION,
            ),
            tables.features_table(found.features) if found.features else None,
        ),
        *_references(found),
        Section(
            "What could not be computed, and why",
            () if found.not_computed else ("Nothing.",),
            None,
            found.not_computed,
        ),
        Section("How it was compared", points=tuple(_method(found, n_resamples))),
        Section("Conditions", table=_conditions(found)),
        Section("Every figure of every arm", table=_all_figures(found), is_folded=True),
    ]
    return sections


def _primary(found: Compared, design: Design) -> list[str]:
    registered = (
        f"Pre-registered: temporal contrast with window 16 (A2) minus the same SAE with alpha = 0 (A1), {REGISTERED}, "
        f"at L0 = {REGISTERED_L0:g} or the nearest that the arms reach; two-sided 5 %, no correction."
    )
    one = found.primary
    if one is None:
        return [registered, f"Not computed: {design.no_primary}."]
    lines = [registered]
    if one.metric != REGISTERED:
        lines.append(f"This is not the registered metric: {one.metric} stands in its place.")
    if one.difference.value is None:
        return [*lines, f"{one.treated} minus {one.control}: {one.difference.reason}."]
    unit = "" if one.unit == "1" else f" {one.unit}"
    tokens = "" if one.n_tokens is None else f", {one.n_tokens:,} tokens"
    lines.append(
        f"{one.treated} minus {one.control}: {tables.text_of(one.difference)}{unit}, p {tables.p_text(one.p)}; "
        f"{one.matching}; seeds {tables.seeds_text(one.seeds)}; {one.n_documents} documents{tokens}; "
        f"{one.n_resamples:,} resamples."
    )
    if one.difference.note:
        lines.append(f"Caution: {one.difference.note}; {ENOUGH_SEEDS} are registered.")
    return lines


def _primary_table(found: Compared) -> Table | None:
    return None if found.primary is None else tables.contrasts_table([found.primary])


def _arms_text(found: Compared) -> list[str]:
    conditions = found.conditions
    lines = [
        "Means over seeds with 95 % intervals over seeds and documents; "
        f"{sample_text(conditions)}{replayed_text(conditions, 'loss recovered and KL')}; "
        f"{conditions['n_tokens']:,} tokens. Realised L0 differs between arms: this table compares nothing."
    ]
    curves = [family for family in found.families if len(family.arms) > 1]
    if curves:
        names = "; ".join(f"{family.name}: {', '.join(arm.name for arm in family.arms)}" for family in curves)
        lines.append(f"Arms that differ in k alone form one curve over L0: {names}.")
    return lines


def _method(found: Compared, n_resamples: int) -> list[str]:
    at = "none in common" if found.l0 is None else f"{found.l0:.4g}"
    return [
        f"Two-level paired bootstrap: {n_resamples:,} resamples of seeds, each on one of the "
        f"{found.conditions['n_bootstrap']:,} resamples of documents that all SAEs share; with one seed, of documents "
        "only.",
        "BCa intervals, acceleration from the jackknife over seeds and over documents. Their levels are expanded for "
        "few seeds: Student's quantile for the normal one and the unbiased variance for that of the resamples; without "
        "this, 95 % intervals of 5 seeds cover about 85 %.",
        f"p-values invert the interval: the smallest p whose interval of level 1 - p leaves the null out. Fewer than "
        f"{ENOUGH_SEEDS} seeds are marked at every figure.",
        "Equal sparsity: metrics interpolated linearly in log realised L0 between arms that differ in k alone, anew "
        f"in every resample, at L0 {at}; nothing is extrapolated. Single arms are compared as they are if their L0 are "
        f"within {TOLERANCE:.0%}; otherwise the difference is shown without p.",
        "The order of the data is the same for all seeds, so the intervals leave it out; one model and one hook, so "
        "they say nothing of others.",
    ]


def _references(found: Compared) -> list[Section]:
    """What the temporal metrics are without an SAE, or with one that learned nothing."""
    if not found.references:
        return []
    metrics = [name for name in tables.HEADLINE if any(name in one for one in found.references.values())]
    rows = [
        (name, *(_with_interval(figures.get(metric)) for metric in metrics))
        for name, figures in found.references.items()
    ]
    text = "Intervals over documents, as evaluate gave them; compared with nothing."
    return [Section("Reference rows", (text,), Table(("row", *metrics), tuple(rows)))]


def _with_interval(one: Estimate | None) -> str:
    if one is None or one.value is None:
        return tables.ABSENT
    if one.low is None:
        return f"{tables.number(one.value)} (no interval)"
    return f"{tables.number(one.value)} [{tables.number(one.low)}, {tables.number(one.high)}]"


def _conditions(found: Compared) -> Table:
    rows = []
    for name, value in found.conditions.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((name.replace("_", " "), text))
    return Table(("what", "value"), tuple(rows))


def _all_figures(found: Compared) -> Table:
    head = ("arm", "metric", "unit", "value and 95 % interval", "documents", "tokens")
    rows = [
        (
            line["arm"],
            line["metric"],
            line["unit"],
            tables.text_of(found.figures[line["arm"]][line["metric"]]),
            str(line["n_documents"]),
            tables.ABSENT if line["n_tokens"] is None else f"{line['n_tokens']:,}",
        )
        for line in arm_lines(found.families, found.figures)
    ]
    return Table(head, tuple(rows))
