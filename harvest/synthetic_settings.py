"""The parameters of a synthetic corpus, from the string or the file that names them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tcsae.store.errors import ConfigError, CorpusError, UnknownName

NAME = "synthetic"
"""what a corpus is called that no text is read for, and the hook of its activations"""

Range = tuple[float, float]
"""lowest and highest value, both included; written LOW:HIGH in a corpus's name, [LOW, HIGH] in a file"""

LENGTH_ONLY = ("documents", "length")
"""parameters that say how much is drawn, not from what: stores that differ in no other are of one model"""

LARGEST = 2**31 - 1
"""of a whole number: what a token id can be"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSettings:
    """What a synthetic store is made from; the process is described in `tcsae.harvest.synthetic`.

    Raises `ConfigError` naming the parameter, what is expected and what was given.
    """

    features: int = 1024
    """true features; more than d_model is superposition"""
    d_model: int = 256
    """dimensions of an activation"""
    documents: int = 400
    """documents to draw"""
    length: int = 256
    """tokens of every document"""
    seed: int = 0
    """decides the dictionary and every document"""
    slow: float = 0.2
    """share of the features that stay on for ``slow_run`` tokens"""
    medium: float = 0.3
    """share that stays on for ``medium_run`` tokens; the rest is fast: memoryless"""
    slow_run: Range = (20.0, 60.0)
    """mean run length of the slow features, in tokens, log-uniform"""
    medium_run: Range = (4.0, 12.0)
    """mean run length of the medium features, in tokens, log-uniform"""
    rate: Range = (0.003, 0.05)
    """share of the tokens at which a feature is on, log-uniform, of the same distribution for every kind"""
    magnitude: float = 0.25
    """standard deviation of a value's logarithm; the mean value is 1"""
    hold: float = 0.97
    """correlation of a slow or medium feature's log-magnitude from token to token of a run; 1: constant"""
    topics: int = 8
    """topics, of which each document has one, all equally likely"""
    sources: int = 2
    """sources; topic t is of source t modulo ``sources``"""
    topical: float = 0.25
    """share of each kind's features that are on only in documents of one topic"""
    coherence: float = 0.35
    """largest absolute cosine of two directions"""
    mean: float = 1.0
    """norm of what all activations have in common, in root mean square norms of the features' sum"""
    noise: float = 0.01
    """energy of the Gaussian noise, as a share of the features' energy"""

    def __post_init__(self) -> None:
        for name, low in (
            *(("features", 3), ("d_model", 2), ("documents", 1), ("length", 2), ("seed", 0)),
            *(("topics", 1), ("sources", 1)),
        ):
            self._check(name, low, LARGEST)
        for name in ("slow", "medium", "topical", "hold"):
            self._check(name, 0, 1)
        self._check("magnitude", 0, 2)
        self._check("mean", 0, 1000)
        self._check("noise", 0, 1000)
        self._check("coherence", 0.01, 1)
        # a run of at least 2 tokens and a rate of at most a half: otherwise a feature would avoid its neighbours
        self._check_range("slow_run", 2.0, 1e6)
        self._check_range("medium_run", 2.0, 1e6)
        self._check_range("rate", 1e-6, 0.5)
        if self.slow_run[0] < self.medium_run[1]:
            raise ConfigError(
                f"slow_run: expected to begin at {self.medium_run[1]} or above, where medium_run ends, got "
                f"{self.slow_run[0]}; choose ranges that do not overlap"
            )
        if self.n_slow + self.n_medium >= self.features:
            raise ConfigError(
                f"slow, medium: expected to leave at least one of {self.features} features fast (tokens are named "
                f"after them), got {self.slow} + {self.medium}; lower one of them"
            )
        if self.sources > self.topics:
            raise ConfigError(
                f"sources: expected at most the {self.topics} topics, got {self.sources}; lower it or raise topics"
            )

    @property
    def n_slow(self) -> int:
        """slow features"""
        return round(self.slow * self.features)

    @property
    def n_medium(self) -> int:
        """medium features"""
        return round(self.medium * self.features)

    @property
    def n_fast(self) -> int:
        """fast features; there is one token id for each, and one more for tokens at which none is on"""
        return self.features - self.n_slow - self.n_medium

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ranges become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> SyntheticSettings:
        """Settings from parameters by name, as a file or `to_dict` has them; ``where`` names it in errors.

        Raises
        ------
        UnknownName
            there is no such parameter; the nearest are listed
        ConfigError
            a value of another type, or out of range
        """
        kinds = {one.name: type(one.default) for one in fields(cls)}
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name not in kinds:
                raise UnknownName.among(f"parameter of {where}", name, kinds)
            found[name] = _typed(f"{where}: {name}", value, kinds[name])
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def _check(self, name: str, low: float | int, high: float | int) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise ConfigError(f"{name}: expected {low} to {high}, got {value}; choose a value between them")

    def _check_range(self, name: str, low: float, high: float) -> None:
        first, last = getattr(self, name)
        if not low <= first <= last <= high:
            raise ConfigError(
                f"{name}: expected a range within {low:g}:{high:g}, the lower end first, got {first:g}:{last:g}"
            )


def is_synthetic(corpus: str) -> bool:
    """Whether ``corpus`` names a synthetic one.

    >>> is_synthetic("synthetic:features=64"), is_synthetic("synthetic.jsonl")
    (True, False)
    """
    return corpus.partition(":")[0] == NAME


def parse_synthetic(corpus: str) -> SyntheticSettings:
    """The settings that ``synthetic[:KEY=VALUE,...]`` or ``synthetic:FILE.toml`` names.

    >>> parse_synthetic("synthetic:features=64,rate=0.01:0.1").rate
    (0.01, 0.1)

    Raises
    ------
    CorpusError
        there is no such file, or it is not TOML
    UnknownName, ConfigError
        as `SyntheticSettings.from_dict`; a parameter that is given twice or without a value
    """
    _, _, given = corpus.partition(":")
    if given.endswith(".toml"):
        return SyntheticSettings.from_dict(_read(Path(given).expanduser()), given)
    values: dict[str, Any] = {}
    for pair in given.split(",") if given else []:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise ConfigError(f"{corpus}: expected KEY=VALUE,... or FILE.toml after {NAME}:, got {pair!r}")
        if name in values:
            raise ConfigError(
                f"{corpus}: {name}: expected once, got {values[name]!r} and {value!r}; leave one out"
            )
        values[name] = value
    return SyntheticSettings.from_dict(values, NAME)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise CorpusError(f"{path}: no such file; expected the parameters of a synthetic corpus") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not TOML ({error}); write lines such as features = 1024") from error


def _typed(where: str, value: Any, kind: type) -> int | float | Range:
    """``value``, a TOML or JSON value or a piece of a corpus's name, as an int, a float or a range."""
    if kind is tuple:
        ends = value.split(":") if isinstance(value, str) else value
        if not isinstance(ends, list) or len(ends) != 2:
            raise ConfigError(f"{where}: expected a range such as 4:12, got {value!r}")
        low, high = (_number(where, end, float) for end in ends)
        return low, high
    number: int | float = _number(where, value, kind)
    return number


def _number(where: str, value: Any, kind: type) -> Any:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            pass
    elif type(value) is int or type(value) is kind:
        return kind(value)
    raise ConfigError(f"{where}: expected {wanted}, got {value!r}")
