"""Evaluation folders as they were written, refused where they do not belong together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tcsae.evaluate.core import REPLAYED, STORED
from tcsae.evaluate.estimates import RESULT_VERSION, Draws, Estimate, SuiteResult, read_any_result
from tcsae.evaluate.results import TABLED, features_path
from tcsae.store.errors import ConfigError, RunError, RunMismatch, RunNotFound

SUMMARY_FILE = "summary.json"

NOT_COMPARED = ("tcsae",)
"""Conditions that may differ: another version of the program with the same version of the results is no other
measurement."""

FIRST_COMPARED = ("result_version", "model", "model_sha256", "hooks", "store", "split", "n_bootstrap", "seed")
"""Conditions in the order in which a difference is told: what makes another store is told before the store. The others
follow."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """One SAE as an evaluation folder has it."""

    out: Path
    """the evaluation folder"""
    sae: str
    """name of its files"""
    arm: str
    """kind of SAE; the same for its seeds"""
    seed: int | None
    """of its training, None where nobody said"""
    block_size: int
    """features of block H, 0: no block"""
    origin: Mapping[str, Any]
    """`tcsae.evaluate.subjects.Subject.origin`"""
    estimates: Mapping[str, Estimate]
    """by metric, over all suites"""
    draws: Mapping[str, Draws]
    """of the metrics that have an interval"""
    tokens: Mapping[str, int | None]
    """tokens that each metric rests on"""
    features: Path | None
    """its table of features, None where no suite of this evaluation has written one"""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The arm's settings, empty where unknown."""
        settings: Mapping[str, Any] = self.origin["settings"]
        return settings

    @property
    def folder(self) -> Path | None:
        """The SAE's own folder, None where it is no longer there."""
        where = self.origin["folder"]
        return Path(where) if where is not None and Path(where).is_dir() else None


@dataclass(frozen=True, slots=True)
class Folders:
    """All SAEs of all evaluation folders, measured under one set of conditions."""

    saes: tuple[Evaluated, ...]
    """in the order given"""
    conditions: Mapping[str, Any]
    """store, model, hook, split and settings"""
    outs: tuple[Path, ...]
    """the folders"""
    references: Mapping[str, Mapping[str, Estimate]]
    """figures of the temporal suite's reference rows (raw activations, ...), by name and metric"""

    @property
    def hook(self) -> str:
        """The one hook that all SAEs read."""
        return str(self.saes[0].origin["hook"])


def read_folders(outs: Sequence[Path]) -> Folders:
    """Everything that ``outs`` hold, checked.

    Raises
    ------
    ConfigError
        no folder, or one twice
    RunNotFound
        a folder without ``summary.json``
    RunError
        a file of it is damaged, missing, or was written by an older tcsae
    RunMismatch
        other stores, models, hooks, splits, settings or suites; one SAE twice; two SAEs of one name; both are named
    """
    if not outs:
        raise ConfigError("OUT: expected at least one evaluation folder, got none")
    summaries: dict[Path, dict[str, Any]] = {}
    for out in outs:
        if out.resolve() in {seen.resolve() for seen in summaries}:
            raise ConfigError(f"{out}: given twice; name each evaluation folder once")
        summaries[out] = _read_summary(out)
    first = outs[0]
    for out in outs[1:]:
        _check_conditions(first, summaries[first]["conditions"], out, summaries[out]["conditions"])
    saes = [
        _read_sae(out, entry, summaries[out]["conditions"]["suites"])
        for out in outs
        for entry in summaries[out]["saes"]
        if not _is_reference(entry)
    ]
    references = {
        entry["arm"]: {name: Estimate(metric=name, **fields) for name, fields in entry["metrics"].items()}
        for out in reversed(outs)
        for entry in summaries[out]["saes"]
        if _is_reference(entry)
    }
    if not saes:
        raise RunError(f"{first / SUMMARY_FILE}: holds no SAE; evaluate some first")
    return Folders(tuple(_unique(saes)), summaries[first]["conditions"], tuple(outs), references)


def _is_reference(entry: Mapping[str, Any]) -> bool:
    """Whether a row of a summary is one of the temporal suite's reference rows, which are no SAEs of anybody."""
    return entry.get("origin") == {}


def _read_summary(out: Path) -> dict[str, Any]:
    path = out / SUMMARY_FILE
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFound(
            f"{path}: no such file; expected a folder that `tcsae evaluate RUN {out} --store STORE` has finished"
        ) from None
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); evaluate again") from error
    try:
        version = found["conditions"].get("result_version")
        is_whole = all({"sae", "arm", "seed", "block_size", "metrics"} <= one.keys() for one in found["saes"])
        has_origin = all(_is_reference(one) or "digest" in one.get("origin", {}) for one in found["saes"])
        is_whole &= {"suites", "store", "hooks", "split"} <= found["conditions"].keys()
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a summary that tcsae wrote ({error}); evaluate again") from error
    if not is_whole:
        raise RunError(f"{path}: fields are missing; evaluate again (finished results are kept)")
    if not has_origin or version is None:
        raise RunError(
            f"{path}: written by an older tcsae, without the origin of its SAEs; run the same `tcsae evaluate` again "
            "(finished results are kept)"
        )
    if version != RESULT_VERSION:
        raise RunMismatch(
            f"{path}: results of version {version}, this tcsae compares version {RESULT_VERSION}; evaluate again"
        )
    return dict(found)


def _check_conditions(a: Path, of_a: Mapping[str, Any], b: Path, of_b: Mapping[str, Any]) -> None:
    """Refuse two folders that were not measured alike."""
    for one, others, there, has in ((a, of_a, b, of_b), (b, of_b, a, of_a)):
        missing = [suite for suite in has["suites"] if suite not in others["suites"]]
        if missing:
            raise RunMismatch(
                f"{one}: without suite {', '.join(missing)}, which {there} has; evaluate both with the same --suite"
            )
    names = [
        *FIRST_COMPARED,
        *sorted((of_a.keys() | of_b.keys()) - {*FIRST_COMPARED, *NOT_COMPARED, "suites"}),
    ]
    for name in names:
        if of_a.get(name) != of_b.get(name):
            raise RunMismatch(
                f"{a} and {b} were not measured alike: {name} is {of_a.get(name)} there and {of_b.get(name)} here; "
                "only SAEs of one model and hook, measured on the same documents with the same settings, compare"
            )


def _read_sae(out: Path, entry: Mapping[str, Any], suites: Sequence[str]) -> Evaluated:
    name = entry["sae"]
    estimates: dict[str, Estimate] = {}
    draws: dict[str, Draws] = {}
    tokens: dict[str, int | None] = {}
    for suite in suites:
        json_path = out / suite / f"{name}.json"
        result = read_any_result(json_path, out / "draws" / suite / f"{name}.parquet")
        if result is None:
            raise RunError(
                f"{json_path}: missing, or without its draws; run the same `tcsae evaluate` again "
                "(finished results are kept)"
            )
        for metric, estimate in result.estimates.items():
            if entry["metrics"].get(metric, {}).get("value") != estimate.value:
                raise RunError(
                    f"{json_path}: {metric} is {estimate.value}, {SUMMARY_FILE} says otherwise; the evaluation was "
                    "not finished, run it again (finished results are kept)"
                )
        estimates |= result.estimates
        draws |= result.draws
        tokens |= {metric: _tokens(result, metric) for metric in result.estimates}
    if "explained_variance" in estimates:
        estimates["fvu"], fvu = _fvu(estimates["explained_variance"], draws.get("explained_variance"))
        tokens["fvu"] = tokens["explained_variance"]
        if fvu is not None:
            draws["fvu"] = fvu
    table = features_path(out, name)
    return Evaluated(
        out=out,
        sae=name,
        arm=entry["arm"],
        seed=entry["seed"],
        block_size=entry["block_size"],
        origin=entry["origin"],
        estimates=estimates,
        draws=draws,
        tokens=tokens,
        # a folder may hold the table of an earlier evaluation, even of another SAE of that name
        features=table if TABLED in suites and table.is_file() else None,
    )


def _tokens(result: SuiteResult, metric: str) -> int | None:
    """Tokens behind one metric, as its suite counts them; None where it does not say."""
    facts = result.facts
    for part in ("replay", STORED, REPLAYED):
        if metric in facts.get(part, {}).get("metrics", ()):
            return int(facts[part]["n_kept"])
    return facts.get("n_tokens")


def _fvu(explained: Estimate, draws: Draws | None) -> tuple[Estimate, Draws | None]:
    """Fraction of variance unexplained, 1 - explained variance."""
    low, high = (None if end is None else 1 - end for end in (explained.high, explained.low))
    value = None if explained.value is None else 1 - explained.value
    fvu = replace(explained, metric="fvu", value=value, low=low, high=high)
    if draws is None:
        return fvu, None
    return fvu, Draws(1 - draws.value, 1 - draws.draws, 1 - draws.leave_one_out)


def _unique(saes: Sequence[Evaluated]) -> list[Evaluated]:
    """The SAEs with the folder's name before the arms that mean different things in different folders.

    Raises
    ------
    RunMismatch
        one SAE twice, two hooks, or two SAEs of one arm and seed
    """
    first: dict[Any, Evaluated] = {}
    for one in saes:
        other = first.setdefault(one.origin["digest"], one)
        if other is not one:
            raise RunMismatch(
                f"{other.out}: {other.sae} and {one.out}: {one.sae} are one SAE (digest "
                f"{one.origin['digest'][:12]}…); name it once"
            )
        if one.origin["hook"] != saes[0].origin["hook"]:
            raise RunMismatch(
                f"{saes[0].out}: {saes[0].sae} reads {saes[0].origin['hook']}, but {one.out}: {one.sae} reads "
                f"{one.origin['hook']}; only SAEs of one hook compare"
            )
    alike: dict[str, Evaluated] = {}
    torn = {one.arm for one in saes if kind_of(alike.setdefault(one.arm, one)) != kind_of(one)}
    named = [
        replace(one, arm=f"{one.out.resolve().name}-{one.arm}") if one.arm in torn else one for one in saes
    ]
    first = {}
    for one in named:
        other = first.setdefault((one.arm, one.seed), one)
        if other is not one:
            seed = "without a seed" if one.seed is None else f"of seed {one.seed}"
            raise RunMismatch(
                f"{other.out}: {other.sae} and {one.out}: {one.sae} are both arm {one.arm!r} {seed}; leave one out "
                "or train it with another seed"
            )
    return named


def kind_of(one: Evaluated) -> tuple[Any, ...]:
    """What the seeds of one arm have in common."""
    sizes = ("architecture", "k", "d_sae", "steps", "tokens")
    return (dict(one.settings), one.block_size, *(one.origin.get(name) for name in sizes))
