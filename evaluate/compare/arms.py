"""Arms, their families over k, and who is compared with whom (METHOD.md, sections 4 and 5)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from tcsae.evaluate.compare.folders import Evaluated

Role = Literal["primary", "secondary"]

PRIMARY_RECIPE = "tc16"
"""The packaged recipe whose window and alpha the pre-registered arm A2 has."""

_NAMES = ("name", "explanation")
"""Settings that change nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """One kind of SAE at one k."""

    name: str
    """as its evaluation calls it"""
    saes: Mapping[int | None, Evaluated]
    """by seed, in order"""

    @property
    def one(self) -> Evaluated:
        """Any of its SAEs: what they have in common is the same for all."""
        return next(iter(self.saes.values()))

    @property
    def alpha(self) -> float | None:
        """Weight of the temporal term, None where unknown."""
        alpha = self.one.settings.get("alpha")
        return None if alpha is None else float(alpha)

    @property
    def k(self) -> int | None:
        """Active features per token that it was trained for, None where unknown."""
        k = self.one.settings.get("k", self.one.origin.get("k"))
        return None if k is None else int(k)

    @property
    def training_tokens(self) -> int | None:
        """Tokens that each SAE was trained on, None where unknown."""
        tokens = self.one.origin.get("tokens")
        return None if tokens is None else int(tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Arms that differ in k alone: one curve over L0 for each seed."""

    name: str
    """what its arms' names have in common"""
    arms: tuple[Arm, ...]
    """by rising k"""

    @property
    def one(self) -> Evaluated:
        """Any SAE of it."""
        return self.arms[0].one

    @property
    def alpha(self) -> float | None:
        """Weight of the temporal term, None where unknown."""
        return self.arms[0].alpha

    @property
    def seeds(self) -> list[int | None]:
        """Seeds of any of its arms, in order."""
        return sorted({seed for arm in self.arms for seed in arm.saes}, key=_seed_order)

    def setting(self, name: str, default: Any = None) -> Any:
        """One of the settings that its arms share."""
        return self.one.settings.get(name, default)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two families that are compared."""

    treated: Family
    control: Family
    role: Role
    """primary: the pre-registered one"""
    why: str
    """why this is the control"""


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """Who is compared with whom."""

    pairs: tuple[Pair, ...]
    """the primary one first"""
    no_primary: str | None
    """why there is no primary pair, None if there is one"""


def _seed_order(seed: int | None) -> tuple[bool, int]:
    return seed is None, seed or 0


def arms_of(saes: Sequence[Evaluated]) -> list[Arm]:
    """The arms in the order of their first SAE."""
    of_arm: dict[str, dict[int | None, Evaluated]] = {}
    for one in saes:
        of_arm.setdefault(one.arm, {})[one.seed] = one
    return [
        Arm(name, {seed: found[seed] for seed in sorted(found, key=_seed_order)})
        for name, found in of_arm.items()
    ]


def families_of(arms: Sequence[Arm]) -> list[Family]:
    """The arms grouped by everything but k; an arm whose settings nobody knows stands alone."""
    groups: dict[Any, list[Arm]] = {}
    for arm in arms:
        settings = {name: value for name, value in arm.one.settings.items() if name not in (*_NAMES, "k")}
        origin = {name: arm.one.origin.get(name) for name in ("d_sae", "steps", "tokens")}
        key = repr((sorted(settings.items()), origin, arm.one.block_size)) if settings else arm.name
        groups.setdefault(key, []).append(arm)
    grouped = [sorted(group, key=lambda arm: arm.k or 0) for group in groups.values()]
    names = [_common_name(group) for group in grouped]
    # two groups whose names differ in k alone are told apart by all their arms' names
    named = [
        "/".join(arm.name for arm in group) if names.count(name) > 1 else name
        for name, group in zip(names, grouped, strict=True)
    ]
    return [Family(name, tuple(group)) for name, group in zip(named, grouped, strict=True)]


def _common_name(group: Sequence[Arm]) -> str:
    """What is left of the arms' names without their k.

    >>> _without_k("tc16-k32", 32), _without_k("tc16-k32-long", 32), _without_k("tc16", 16)
    ('tc16', 'tc16-long', 'tc16')
    """
    if len(group) == 1:
        return group[0].name
    bare = {_without_k(arm.name, arm.k) for arm in group}
    if len(bare) == 1:
        return bare.pop()
    return "/".join(arm.name for arm in group)


def _without_k(name: str, k: int | None) -> str:
    return re.sub(rf"[-_]k?{k}(?=$|[-_])", "", name)


def design_of(families: Sequence[Family]) -> Design:
    """The pre-registered pair, every other contrast against its own control, and the rest against the key control."""
    own = {id(family): _control(family, families) for family in families}
    primary, no_primary = _primary([one for one in families if own[id(one)] is not None])
    pairs: list[Pair] = []
    if primary is not None:
        control = own[id(primary)]
        assert control is not None
        pairs.append(Pair(primary, control, "primary", "same block and data, alpha = 0"))
        key: Family | None = control
    else:
        key = next((one for one in own.values() if one is not None), None)
    why = "the key control"
    if key is None:
        key = next((one for one in families if one.alpha == 0), families[0])
        why = "the first arm with alpha = 0" if key.alpha == 0 else "the first arm given"
    for family in families:
        control = own[id(family)]
        if family is primary or family is key:
            continue
        if control is not None:
            pairs.append(Pair(family, control, "secondary", "same block and data, alpha = 0"))
        else:
            pairs.append(Pair(family, key, "secondary", why))
    if primary is not None:
        pairs += [
            Pair(primary, family, "secondary", "the placebo")
            for family in families
            if family.setting("positives") == "other_document"
        ]
    return Design(tuple(pairs), no_primary)


def _control(family: Family, families: Sequence[Family]) -> Family | None:
    """The family that lacks the temporal term and is otherwise nearest; None without one of the same sizes."""
    if not family.alpha or not family.one.block_size:
        return None

    def sizes(one: Family) -> tuple[Any, ...]:
        origin = one.one.origin
        shares = (one.setting("block_k_share"), one.setting("architecture"))
        return (one.one.block_size, *shares, *(origin.get(name) for name in ("d_sae", "steps", "tokens")))

    def distance(other: Family) -> int:
        mine, others = family.one.settings, other.one.settings
        return sum(mine.get(key) != others.get(key) for key in (mine.keys() | others.keys()) - {*_NAMES, "k"})

    candidates = [one for one in families if one.alpha == 0 and sizes(one) == sizes(family)]
    return min(candidates, key=distance, default=None)


def _primary(contrasted: Sequence[Family]) -> tuple[Family | None, str | None]:
    """Arm A2 of METHOD.md with w = 16 among the families that have a control, or why there is none."""
    recipe = tomllib.loads((files("tcsae.data") / "recipes" / f"{PRIMARY_RECIPE}.toml").read_text("utf-8"))
    usual = {"objective": "info_nce", "positives": "window", "contrasted_code": "before_top_k"}
    found = [
        one
        for one in contrasted
        if one.setting("window") == recipe["window"]
        and all(one.setting(name, value) == value for name, value in usual.items())
    ]
    if not found:
        return None, (
            f"no arm with a temporal contrast of window {recipe['window']} and a control of the same block, seed and "
            "data with alpha = 0"
        )
    if len(found) == 1:
        return found[0], None
    registered = [one for one in found if one.alpha == recipe["alpha"]]
    if len(registered) == 1:
        return registered[0], None
    return None, (
        f"{', '.join(f'{one.name} (alpha {one.alpha})' for one in found)} all have window {recipe['window']}, and not "
        f"exactly one has the registered alpha = {recipe['alpha']}; compare the folders of one of them"
    )
