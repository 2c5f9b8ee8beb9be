"""What a training run is told: one `ArmConfig` for each kind of SAE, one `TrainConfig` for the run.

Both only reject; nothing is filled in, so the file that a run writes is what it was given. What depends on
the length of the run or on the store is checked before the first step, by `tcsae.train.schedule`,
`ArmConfig.check_sizes` and `tcsae.train.batches`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tcsae.store.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """One arm of a comparison: an SAE and its objective (METHOD.md, sections 3 and 4)."""

    name: str
    """what tables, plots and folders call it; letters, digits, ``-`` and ``_``"""
    explanation: str = ""
    """one sentence for ``tcsae recipes``"""
    expansion: float = 4.0
    """features per dimension of the activation: F = round(expansion * D)"""
    k: int = 32
    """active features per token, on average over a batch"""
    block_share: float = 0.2
    """share of the features in block H, 0-1; 0: no block, one top-k over all features"""
    block_k_share: float = 0.25
    """share of k that block H gets, 0-1; without a block not used"""
    window: int = 16
    """tokens of a window: positives lie in the anchor's window"""
    alpha: float = 0.0
    """weight of the temporal contrastive loss; 0: none"""
    ramp_share: float = 0.1
    """share of the run over which alpha rises from 0, 0-1"""
    temperature: float = 0.1
    """divides cosines in the contrast; 0.02-1"""
    anchors: int = 256
    """anchors per step, whatever the window"""
    aux_k: int = 256
    """dead features per token and block that reconstruct the error; 0: no auxiliary loss"""
    aux_weight: float = 1 / 32
    """weight of that auxiliary loss"""
    dead_after: int = 100_000
    """tokens without firing after which a feature counts as dead"""
    learning_rate: float = 4e-3
    """Adam's, at its highest"""
    warmup_steps: int = 50
    """steps over which the learning rate rises from 0"""
    decay_share: float = 0.3
    """share of the run, its last part, over which the learning rate falls to 0, 0-1"""

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"name: expected letters, digits, '-' and '_', got {self.name!r}")
        for field in ("k", "window", "anchors", "dead_after"):
            _at_least(self.name, field, getattr(self, field), 1)
        for field in ("warmup_steps", "aux_k", "alpha", "aux_weight"):
            _at_least(self.name, field, getattr(self, field), 0)
        for field in ("block_share", "block_k_share", "ramp_share", "decay_share"):
            _between(self.name, field, getattr(self, field), 0, 1)
        for field in ("expansion", "learning_rate"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"{self.name}: {field}: expected more than 0, got {getattr(self, field)}")
        _between(self.name, "temperature", self.temperature, 0.02, 1)
        if self.block_share == 1:
            raise ConfigError(f"{self.name}: block_share: expected less than 1, got {self.block_share}")
        if self.alpha > 0 and self.block_share == 0:
            raise ConfigError(f"{self.name}: alpha is {self.alpha} without a block; set block_share above 0")
        if self.alpha > 0 and self.window < 2:
            raise ConfigError(f"{self.name}: window: a positive needs at least 2 tokens, got {self.window}")
        if self.block_share > 0 and not 0 < self.block_k < self.k:
            raise ConfigError(
                f"{self.name}: k = {self.k} with block_k_share = {self.block_k_share} gives block H "
                f"{self.block_k} of them; each block needs at least 1"
            )

    @property
    def block_k(self) -> int:
        """Active features per token of block H; 0 without a block."""
        return round(self.block_k_share * self.k) if self.block_share > 0 else 0

    def features(self, d_model: int) -> int:
        """F for activations of ``d_model`` dimensions."""
        return round(self.expansion * d_model)

    def block_size(self, d_model: int) -> int:
        """Features of block H for activations of ``d_model`` dimensions; 0 without a block."""
        return int(self.block_share * self.features(d_model))

    def check_sizes(self, d_model: int) -> None:
        """Refuse blocks too small for their active features in activations of ``d_model`` dimensions.

        >>> ArmConfig(name="a", expansion=2.0).check_sizes(16)
        Traceback (most recent call last):
            ...
        tcsae.store.errors.ConfigError: a: block H has 6 of the 32 features (expansion 2.0 x d_model 16, \
block_share 0.2) and keeps 8 per token; expected 1 to 6; lower k or raise expansion
        """
        n, size, k = self.features(d_model), self.block_size(d_model), self.block_k
        split = [("block H", size, k), ("block L", n - size, self.k - k)]
        for block, features, kept in split if self.block_share > 0 else [("the SAE", n, self.k)]:
            if not 1 <= kept <= features:
                raise ConfigError(
                    f"{self.name}: {block} has {features} of the {n} features (expansion {self.expansion} x "
                    f"d_model {d_model}, block_share {self.block_share}) and keeps {kept} per token; expected "
                    f"1 to {features}; lower k or raise expansion"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run: its arms, side by side over the same tokens in the same order."""

    arms: tuple[ArmConfig, ...]
    """what is trained; different names"""
    seeds: tuple[int, ...] = (0,)
    """each arm is trained once per seed; a seed fixes the initial weights, the same for every arm"""
    tokens: int = 700 * 2048
    """tokens to train on; more than the store holds means several epochs in new orders"""
    batch_tokens: int = 2048
    """tokens of a step"""
    hook: str | None = None
    """which of the store's hooks; None: it has one"""
    data_seed: int = 0
    """fixes the order of the data, the pairs and what enters the ring, the same for every arm and seed"""
    ring_size: int = 16384
    """activations in the ring of negatives"""
    ring_feed: int = 512
    """activations that enter the ring after each step"""
    min_position: int = 8
    """tokens before this position of their context are in no pair and not in the ring: early positions
    look alike in every document"""
    precision: Precision = "auto"
    """of the encoder's products; auto: bfloat16 where the hardware is fast at it, else float32"""
    log_every: int = 10
    """steps between two lines of metrics.parquet"""
    checkpoint_every: int = 200
    """steps between two checkpoints"""
    collapse_steps: int = 100
    """steps with more than 99 % of an SAE's features dead after which the run stops"""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names:
            raise ConfigError("arms: none given; name a recipe, for instance --recipe batchtopk")
        if len(set(names)) < len(names):
            raise ConfigError(f"arms: two have the same name in {', '.join(names)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds: expected different whole numbers from 0, got {list(self.seeds)}")
        for field in ("tokens", "batch_tokens", "ring_size", "ring_feed", "log_every", "checkpoint_every"):
            _at_least("run", field, getattr(self, field), 1)
        _at_least("run", "collapse_steps", self.collapse_steps, 1)
        for field in ("data_seed", "min_position"):
            _at_least("run", field, getattr(self, field), 0)
        if self.precision not in get_args(Precision):
            raise ConfigError(
                f"precision: expected one of {', '.join(get_args(Precision))}, got {self.precision!r}"
            )
        if self.ring_feed > self.ring_size:
            raise ConfigError(f"ring_feed: {self.ring_feed} is more than ring_size = {self.ring_size}")
        for arm in self.arms:
            if self.window % arm.window or self.batch_tokens % self.window:
                raise ConfigError(
                    f"{arm.name}: window = {arm.window} must divide the longest window, {self.window}, and "
                    f"that batch_tokens = {self.batch_tokens}, so that all arms see the same tokens"
                )
            if arm.anchors > self.batch_tokens:
                raise ConfigError(
                    f"{arm.name}: anchors = {arm.anchors} is more than batch_tokens = {self.batch_tokens}"
                )

    @property
    def window(self) -> int:
        """Tokens of the loader's windows: the longest of the arms'."""
        return max(arm.window for arm in self.arms)

    @property
    def steps(self) -> int:
        """Whole batches in the token budget."""
        return self.tokens // self.batch_tokens


def _at_least(owner: str, field: str, value: float | int, least: int) -> None:
    if not value >= least:
        raise ConfigError(f"{owner}: {field}: expected at least {least}, got {value}")


def _between(owner: str, field: str, value: float | int, low: float | int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{owner}: {field}: expected {low} to {high}, got {value}")
