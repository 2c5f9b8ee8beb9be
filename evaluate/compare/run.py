"""`compare`: from evaluation folders to the pre-registered comparison, its figures, tables and report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcsae.evaluate.compare.arms import Arm, Design, Family, Pair, arms_of, design_of, families_of
from tcsae.evaluate.compare.bootstrap import N_RESAMPLES
from tcsae.evaluate.compare.contrast import Contrast, Figure
from tcsae.evaluate.compare.contrasts import contrasts_of
from tcsae.evaluate.compare.features import MatchedFeatures, matched_features
from tcsae.evaluate.compare.folders import Folders, read_folders
from tcsae.evaluate.compare.front import Point, arm_figure, points_of
from tcsae.evaluate.compare.lines import (
    arm_lines,
    contrast_lines,
    feature_lines,
    front_lines,
    write_table,
)
from tcsae.evaluate.compare.matching import common_l0, reach
from tcsae.evaluate.compare.registered import MARGINS, REGISTERED, STAND_IN
from tcsae.evaluate.config import documents_text
from tcsae.evaluate.estimates import Estimate
from tcsae.evaluate.plots import PANELS
from tcsae.store.atomic import exclusive, write_atomically
from tcsae.store.errors import ConfigError, Interrupted, RunBusy, UnknownName
from tcsae.store.progress import progress

LEAST_RESAMPLES = 1000
"""Fewer leave the ends of an interval to chance."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What `compare` found, as written to the report folder."""

    report: Path
    """report.html"""
    conditions: dict[str, Any]
    """store, model, split and settings that all SAEs were measured with"""
    metric: str
    """of the primary endpoint and the trade-off"""
    l0: float | None
    """at which curves over k are compared; None if they have none in common"""
    families: tuple[Family, ...]
    """arms that differ in k alone"""
    figures: Mapping[str, Mapping[str, Figure]]
    """of each arm, by arm and metric"""
    contrasts: tuple[Contrast, ...]
    """primary, secondary, non-inferiority"""
    points: tuple[Point, ...]
    """of the trade-off"""
    features: tuple[MatchedFeatures, ...]
    """matched, by pair of arms"""
    references: Mapping[str, Mapping[str, Estimate]]
    """figures of the temporal suite's reference rows, by name and metric"""
    images: dict[str, Path]
    """the figures that could be drawn, by name"""
    not_computed: tuple[str, ...]
    """what could not be computed, and why"""

    @property
    def arms(self) -> list[Arm]:
        """All arms, family by family."""
        return [arm for family in self.families for arm in family.arms]

    @property
    def primary(self) -> Contrast | None:
        """The pre-registered comparison, None without such a pair of arms."""
        return next((one for one in self.contrasts if one.kind == "primary"), None)

    def of_kind(self, kind: str) -> list[Contrast]:
        """The contrasts of one kind."""
        return [one for one in self.contrasts if one.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the content of ``compare.json``."""
        return {
            "conditions": self.conditions,
            "metric": self.metric,
            "l0": self.l0,
            "arms": arm_lines(self.families, self.figures),
            "comparisons": contrast_lines(self.contrasts),
            "front": front_lines(self.points, self.metric),
            "matched_features": [
                dataclasses.asdict(one) | {"rates": _by_text(one.rates)} for one in self.features
            ],
            "not_computed": list(self.not_computed),
            "figures": {name: path.name for name, path in self.images.items()},
            "report": self.report.name,
        }


def compare(
    outs: Sequence[str | Path],
    report: str | Path,
    *,
    l0: float | None = None,
    primary: str | None = None,
    n_resamples: int = N_RESAMPLES,
) -> Compared:
    """Compare all SAEs of evaluation folders and write the report folder; measures nothing anew.

    Parameters
    ----------
    outs
        folders that `tcsae.evaluate.evaluate` has finished, measured on one store with the same settings
    report
        folder for report.html, tables and figures; what is in it under these names is replaced
    l0
        L0 at which arms of several k are compared; None: 40 where all reach it, else the geometric middle of what they
        all reach
    primary
        metric of the primary endpoint; None: `REGISTERED`, or `STAND_IN` where that was not measured
    n_resamples
        of seeds and documents behind every interval

    Raises
    ------
    ConfigError
        an L0 or a number of resamples that cannot work, or a folder twice
    UnknownName
        no SAE has the metric ``primary``
    RunNotFound, RunError, RunMismatch
        see `tcsae.evaluate.compare.folders.read_folders`
    RunBusy
        another process writes to the report folder
    Interrupted
        Ctrl-C
    """
    if l0 is not None and not (math.isfinite(l0) and l0 > 0):
        raise ConfigError(f"l0: expected a number above 0, got {l0}")
    if n_resamples < LEAST_RESAMPLES:
        raise ConfigError(f"n_resamples: expected at least {LEAST_RESAMPLES}, got {n_resamples}")
    folders = read_folders([Path(out) for out in outs])
    metric = _primary_metric(folders, primary)
    report = Path(report)
    if report.is_file():
        raise ConfigError(f"--report: {report} is a file; expected a folder, there or not")
    busy = RunBusy(f"{report}: another process is writing this report; wait or choose another folder")
    try:
        with exclusive(report / ".lock", busy):
            return _compare(folders, report, l0, metric, n_resamples)
    except KeyboardInterrupt:
        raise Interrupted(
            f"{report}: interrupted; nothing was measured, so run the same command again"
        ) from None


def _primary_metric(folders: Folders, asked: str | None) -> str:
    known = {metric for one in folders.saes for metric in one.draws}
    if asked is not None:
        if asked not in known:
            raise UnknownName.among("metric", asked, known)
        return asked
    return REGISTERED if REGISTERED in known or STAND_IN not in known else STAND_IN


def _compare(folders: Folders, report: Path, l0: float | None, metric: str, n_resamples: int) -> Compared:
    families = families_of(arms_of(folders.saes))
    arms = [arm for family in families for arm in family.arms]
    design = design_of(families)
    target = common_l0(families, l0)
    with progress(2 * len(arms) + 2 * len(design.pairs) + 1, "step", "compare") as bar:
        figures = {}
        for arm in arms:
            names = dict.fromkeys(name for one in arm.saes.values() for name in one.estimates)
            figures[arm.name] = {name: arm_figure(arm, name, n_resamples) for name in names}
            bar.update()
        contrasts = contrasts_of(
            design,
            primary=metric,
            target=lambda pair: _target(pair, target, l0),
            n_resamples=n_resamples,
            advance=bar.update,
        )
        points = points_of(arms, metric, n_resamples, bar.update)
        features = []
        for pair in design.pairs:
            features.append(matched_features(pair, n_resamples))
            bar.update()
        images, missing = _draw(arms, figures, points, metric, folders, report)
        found = Compared(
            report=report / "report.html",
            conditions=dict(folders.conditions)
            | {"hook": folders.hook, "folders": [str(out) for out in folders.outs]},
            metric=metric,
            l0=target,
            families=tuple(families),
            figures=figures,
            contrasts=tuple(contrasts),
            points=tuple(points),
            features=tuple(features),
            references=folders.references,
            images=images,
            not_computed=tuple(
                dict.fromkeys([*_not_computed(design, metric, contrasts, features, arms, figures), *missing])
            ),
        )
        _write(found, design, report, n_resamples)
        bar.update()
    return found


def _target(pair: Pair, common: float | None, asked: float | None) -> float | None:
    """L0 for two curves: what was asked for, else what all arms have in common, else what these two have."""
    if asked is not None:
        return asked
    spans = [reach(pair.treated), reach(pair.control)]
    if common is not None and all(span is None or span.low <= common <= span.high for span in spans):
        return common
    return common_l0([pair.treated, pair.control])


def _draw(
    arms: Sequence[Arm],
    figures: Mapping[str, Mapping[str, Figure]],
    points: Sequence[Point],
    metric: str,
    folders: Folders,
    report: Path,
) -> tuple[dict[str, Path], list[str]]:
    """Every figure that can be drawn, and in words which cannot."""
    # matplotlib takes a second to load and is needed nowhere else here
    from tcsae.evaluate.compare import figures as drawing

    conditions = folders.conditions
    on = f"{conditions['model']}, {folders.hook}; {sample_text(conditions)}"
    images: dict[str, Path] = {}
    missing = []
    path = report / "training_metrics.png"
    gap = drawing.draw_training_of(arms, path)
    if gap is None or gap.startswith("without"):
        images["training_metrics"] = path
    if gap is not None:
        missing.append(f"training_metrics.png: {gap}")
    if any(panel.metric in figures[arm.name] for panel in PANELS for arm in arms):
        images["final_metrics"] = report / "final_metrics.png"
        drawing.draw_bars(arms, figures, images["final_metrics"], on + replayed_text(conditions, "KL"))
    else:
        missing.append("final_metrics.png: the folders have no core suite")
    caption = f"{on}; {drawing.errors_of(arms)}; differences are paired, their intervals narrower"
    if any(one.costs for one in points):
        images["tradeoff"] = report / "tradeoff.png"
        drawing.draw_tradeoff(points, metric, images["tradeoff"], caption)
    else:
        missing.append("tradeoff.png: needs the suites core and temporal")
    if any(f"{name}_whole_lag1" in figures[arm.name] for name in drawing.CURVES for arm in arms):
        images["autocorrelation"] = report / "autocorrelation.png"
        drawing.draw_lags(arms, figures, images["autocorrelation"], caption)
    else:
        missing.append("autocorrelation.png: the folders have no temporal suite")
    if "unlearning" in conditions["suites"]:
        images["unlearning"] = report / "unlearning.png"
        drawing.draw_unlearning(
            arms,
            images["unlearning"],
            f"{on}; stairs: the best setting that costs no more; dots: all settings",
        )
    else:
        missing.append("unlearning.png: the folders have no unlearning suite")
    return images, missing


def sample_text(conditions: Mapping[str, Any]) -> str:
    """What the figures rest on.

    >>> sample_text({"n_documents": 85, "split": "test"}), sample_text({"n_documents": 85, "split": None})
    ('85 test documents', '85 rows of given tokens')
    """
    n, split = conditions["n_documents"], conditions["split"]
    return f"{n} rows of given tokens" if split is None else documents_text(n, split)


def replayed_text(conditions: Mapping[str, Any], what: str) -> str:
    """On how many of the documents ``what`` was replayed; empty where on all or on none.

    >>> replayed_text({"n_documents": 85, "n_replayed_documents": 40}, "KL"), replayed_text({"n_documents": 85}, "KL")
    (', KL on 40 of them', '')
    """
    n = conditions.get("n_replayed_documents")
    return "" if n is None or n == conditions["n_documents"] else f", {what} on {n} of them"


def _not_computed(
    design: Design,
    metric: str,
    contrasts: Sequence[Contrast],
    features: Sequence[MatchedFeatures],
    arms: Sequence[Arm],
    figures: Mapping[str, Mapping[str, Figure]],
) -> list[str]:
    """What a reader would expect and does not get, with its reason."""
    lines = []
    if design.no_primary is not None:
        lines.append(f"primary endpoint: {design.no_primary}")
    if metric != REGISTERED:
        known = any(REGISTERED in one for one in figures.values())
        why = "another was asked for" if known else "the folders do not have it"
        lines.append(
            f"primary endpoint in the registered metric {REGISTERED}: {why}; {metric} stands in its place"
        )
    for margin in MARGINS:
        if not any(margin in one for one in figures.values()):
            lines.append(f"non-inferiority in {margin}: not measured, evaluate with --suite core")
    for one in contrasts:
        if one.difference.value is None or one.difference.reason:
            lines.append(f"{one.treated} against {one.control}, {one.metric}: {one.difference.reason}")
        elif not one.is_equal_l0:
            lines.append(f"{one.treated} against {one.control}, p: {one.matching}")
        if one.missing_seeds:
            lines.append(f"{one.treated} against {one.control}: without {one.missing_seeds}")
    lines += [
        f"matched features of {one.treated} and {one.control}: {one.reason}" for one in features if one.reason
    ]
    for arm in arms:
        by_reason: dict[str, list[str]] = {}
        for name, figure in figures[arm.name].items():
            if figure.reason:
                by_reason.setdefault(figure.reason, []).append(name)
        lines += [f"{arm.name}: {_some(names)}: {reason}" for reason, names in by_reason.items()]
    return lines


def _some(names: Sequence[str], most: int = 6) -> str:
    """The first names and how many more; arms.parquet has the reason of each.

    >>> _some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _write(found: Compared, design: Design, report: Path, n_resamples: int) -> None:
    """Tables, compare.json and, last, the report."""
    from tcsae.evaluate.compare.report import html_of, markdown_of

    write_table(arm_lines(found.families, found.figures), report / "arms.parquet")
    write_table(contrast_lines(found.contrasts), report / "comparisons.parquet")
    write_table(front_lines(found.points, found.metric), report / "front.parquet")
    write_table(feature_lines(found.features), report / "matched_features.parquet")
    write_atomically(report / "report.md", markdown_of(found, design, n_resamples).encode())
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
    write_atomically(report / "compare.json", text.encode())
    write_atomically(found.report, html_of(found, design, n_resamples).encode())


def _by_text(rates: Mapping[int | None, float]) -> dict[str, float]:
    """Seeds as JSON's keys."""
    return {"unknown" if seed is None else str(seed): rate for seed, rate in rates.items()}
