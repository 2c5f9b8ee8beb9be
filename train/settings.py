"""Configurations as TOML and as ``key=value`` settings."""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tcsae.store.errors import ConfigError, RunNotFound, UnknownName
from tcsae.train.config import ArmConfig, TrainConfig

Config = TypeVar("Config", ArmConfig, TrainConfig)


def to_toml(config: TrainConfig) -> str:
    """The whole configuration as TOML, one ``[[arms]]`` table an arm; fields that are None are left out.

    >>> print(to_toml(TrainConfig(arms=(ArmConfig(name="a"),))).splitlines()[0])
    seeds = [0]
    """
    values = asdict(config)
    arms = values.pop("arms")
    lines = _lines(values)
    for arm in arms:
        lines += ["", "[[arms]]", *_lines(arm)]
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, Any]) -> list[str]:
    # JSON's strings, numbers, true and false and arrays are TOML's too.
    return [
        f"{name} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
        if value is not None
    ]


def load_config(path: str | Path) -> TrainConfig:
    """The configuration in a TOML file, such as a run's ``config.toml``.

    Raises
    ------
    RunNotFound
        no such file
    ConfigError
        not a file, not TOML, an unknown field (the nearest are named) or a value that cannot work
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunNotFound(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a TOML file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error
    arms = values.pop("arms", [])
    if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
        raise ConfigError(f"{path}: arms: expected [[arms]] tables")
    return from_values(
        TrainConfig, {**values, "arms": tuple(from_values(ArmConfig, a, path) for a in arms)}, path
    )


def from_values(kind: type[Config], values: Mapping[str, Any], where: str | Path) -> Config:
    """A configuration from plain values; ``where`` begins every error's line."""
    types_of = typing.get_type_hints(kind)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types_of:
            raise UnknownName(f"{where}: {UnknownName.among('field', name, types_of)}")
        checked[name] = _typed(f"{where}: {name}", value, types_of[name])
    required = {"name"} if kind is ArmConfig else {"arms"}
    if required - checked.keys():
        raise ConfigError(f"{where}: field {required.pop()!r} is missing")
    try:
        return kind(**checked)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error


def with_settings(config: TrainConfig, settings: Mapping[str, str]) -> TrainConfig:
    """``config`` with fields set from text: the run's, every arm's, or with ``ARM.field`` one arm's.

    >>> config = TrainConfig(arms=(ArmConfig(name="block"), ArmConfig(name="tc16", alpha=0.1)))
    >>> changed = with_settings(config, {"tc16.alpha": "0.3", "k": "20", "tokens": "1000000"})
    >>> [(arm.name, arm.alpha, arm.k) for arm in changed.arms], changed.tokens
    ([('block', 0.0, 20), ('tc16', 0.3, 20)], 1000000)
    """
    run_types, arm_types = typing.get_type_hints(TrainConfig), typing.get_type_hints(ArmConfig)
    arm_names = [arm.name for arm in config.arms]
    of_run: dict[str, Any] = {}
    of_arm: dict[str, dict[str, Any]] = {name: {} for name in arm_names}
    for key, text in settings.items():
        arm, _, field = key.rpartition(".")
        if arm and arm not in of_arm:
            raise UnknownName.among("arm", arm, arm_names)
        if field in arm_types and field != "name":
            value = _typed(f"--set {key}", _parsed(text), arm_types[field])
            for name in [arm] if arm else arm_names:
                of_arm[name][field] = value
        elif field in run_types and field != "arms" and not arm:
            of_run[field] = _typed(f"--set {key}", _parsed(text), run_types[field])
        else:
            known = (set(arm_types) | (set() if arm else set(run_types))) - {"name", "arms"}
            raise UnknownName.among("field", field, known)
    return replace(config, arms=tuple(replace(arm, **of_arm[arm.name]) for arm in config.arms), **of_run)


def _parsed(text: str) -> Any:
    """A TOML value, or the text itself where it is none, so that a word needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _typed(where: str, value: Any, expected: Any) -> Any:
    """``value`` as ``expected``; whole numbers pass as floats and lists as tuples."""
    origin, options = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        return (
            None if value is None else _typed(where, value, next(t for t in options if t is not type(None)))
        )
    if origin is tuple:
        if not isinstance(value, list | tuple):
            value = [value]
        return tuple(_typed(where, item, options[0]) for item in value)
    if origin is typing.Literal:
        if value not in options:
            raise ConfigError(f"{where}: expected one of {', '.join(options)}, got {value!r}")
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
        raise ConfigError(f"{where}: expected {expected.__name__}, got {value!r}")
    return value


def differences(begun: TrainConfig, asked: TrainConfig) -> list[str]:
    """Each field that differs, as "field: begun with ..., now ..."; for `RunMismatch`.

    An arm's explanation decides nothing and is left out.
    """
    found = [
        f"{f.name}: begun with {getattr(begun, f.name)!r}, now {getattr(asked, f.name)!r}"
        for f in fields(TrainConfig)
        if f.name != "arms" and getattr(begun, f.name) != getattr(asked, f.name)
    ]
    old, new = ([arm.name for arm in config.arms] for config in (begun, asked))
    if old != new:
        return [*found, f"arms: begun with {', '.join(old)}, now {', '.join(new)}"]
    for before, after in zip(begun.arms, asked.arms, strict=True):
        found += [
            f"{before.name}.{f.name}: begun with {getattr(before, f.name)!r}, now {getattr(after, f.name)!r}"
            for f in fields(ArmConfig)
            if f.name != "explanation" and getattr(before, f.name) != getattr(after, f.name)
        ]
    return found
