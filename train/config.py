"""What a training run is told: one `ArmConfig` for each kind of SAE, one `TrainConfig` for the run.

Both only reject; nothing is filled in, so the file that a run writes is what it was given. What depends on
the length of the run or on the store is checked before the first step, by `tcsae.train.schedule`,
`ArmConfig.check_sizes` and `tcsae.train.window_reader`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

from tcsae.store.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]
TrainedArchitecture = Literal["batchtopk", "topk", "matryoshka", "standard", "jumprelu", "gated"]
Initialisation = Literal["tied", "kaiming", "xavier"]
DecoderBias = Literal["mean", "geometric_median"]
Objective = Literal["info_nce", "in_batch", "difference"]
Positives = Literal["window", "previous", "earlier", "other_document"]
Similarity = Literal["cosine", "dot"]
ContrastedCode = Literal["before_top_k", "after_top_k"]

MOST = 10_000
"""of an expansion, a learning rate or a bandwidth: beyond it is a slip of the pen"""

LARGEST = 2**63 - 1
"""of whole numbers: what the log's columns hold; no limit that anyone meets, but infinity is beyond it"""

SELECTING = ("batchtopk", "topk", "matryoshka")
"""architectures that keep ``k`` features per token by construction"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """One arm of a comparison: an SAE and its objective (METHOD.md, sections 3 and 4)."""

    name: str
    """what tables, plots and folders call it; letters, digits, ``-`` and ``_``"""
    explanation: str = ""
    """one sentence for ``tcsae recipes``"""
    expansion: float = 4.0
    """features per dimension of the activation: F = round(expansion * D)"""
    architecture: TrainedArchitecture = "batchtopk"
    """how pre-activations become a code; standard is ReLU with an L1 penalty (see `tcsae.train.sae`)"""
    k: int = 32
    """active features per token, on average over a batch: kept by batchtopk, topk and matryoshka, the target
    of jumprelu's penalty; standard and gated do not use it"""
    block_share: float = 0.2
    """share of the features in block H, 0-1; 0: no block, one top-k over all features"""
    block_k_share: float = 0.25
    """share of k that block H gets, 0-1; 0: all features compete for all of k, as in a T-SAE; without a block
    not used"""
    prefix_shares: tuple[float, ...] = ()
    """matryoshka only: shares of the features, rising, that must reconstruct alone; all of them always do"""
    sparsity_weight: float = 0.0
    """standard and gated: weight of the L1 penalty, with activations scaled to E||x||^2 = 1; jumprelu: of
    (L0 / k - 1)^2"""
    sparsity_warmup_share: float = 0.1
    """share of the run over which that weight rises from 0, 0-1"""
    bandwidth: float = 0.3
    """jumprelu only: width, in normalised units, around a threshold in which it gets a gradient"""
    initial_threshold: float = 1.5
    """jumprelu only: in normalised units, in which an untrained pre-activation is about 1 in size"""
    batch_norm: bool = False
    """standard only: normalise each pre-activation and each dimension of the output over the batch; folded
    into the weights when the SAE is saved"""
    initialisation: Initialisation = "tied"
    """of the weights (see `tcsae.train.sae.initial`)"""
    decoder_bias: DecoderBias = "mean"
    """where the decoder's bias begins: the store's mean, or the geometric median of a sample"""
    unit_norm_decoder: bool = True
    """keep the decoder's rows at norm 1 and take the gradient along them away"""
    window: int = 16
    """tokens of a window: positives lie in the anchor's window"""
    alpha: float = 0.0
    """weight of the temporal term; 0: none"""
    ramp_share: float = 0.1
    """share of the run over which alpha rises from 0, 0-1"""
    objective: Objective = "info_nce"
    """the temporal term: info_nce against the ring; in_batch: InfoNCE against the other pairs of the step
    (T-SAE); difference: the squared difference of anchor and positive"""
    positives: Positives = "window"
    """where a positive comes from: anywhere else in the window, the token before, any earlier token of the
    window, or a token of another document (the placebo)"""
    similarity: Similarity = "cosine"
    """info_nce has only the cosine; in_batch also the plain dot product"""
    contrasted_code: ContrastedCode = "before_top_k"
    """block H's code that the temporal term sees: all of ReLU's, or what is kept and decodes"""
    mask_documents: bool = True
    """tokens of the anchor's own document are no negatives"""
    temperature: float = 0.1
    """divides similarities in the contrast; 0.02-1"""
    anchors: int = 256
    """anchors per step, whatever the window"""
    aux_k: int = 256
    """dead features per token and block that reconstruct the error; 0: no auxiliary loss"""
    aux_weight: float = 1 / 32
    """weight of that auxiliary loss"""
    dead_after: int = 100_000
    """tokens without firing after which a feature counts as dead"""
    resample_every: int = 0
    """steps after which dead features begin anew at badly reconstructed tokens; 0: never"""
    l2_weight: float = 0.0
    """weight of the sum of squares of the encoder's and the decoder's weights"""
    clip_norm: float = 0.0
    """largest norm of the whole gradient; 0: no limit"""
    average_decay: float = 0.0
    """what an exponential moving average of the weights keeps of itself at each step, and which is then what
    is saved, 0-1; 0: the weights themselves"""
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
        for field in (
            *("warmup_steps", "aux_k", "alpha", "aux_weight", "resample_every", "l2_weight", "clip_norm"),
            *("sparsity_weight", "initial_threshold"),
        ):
            _at_least(self.name, field, getattr(self, field), 0)
        for field in (
            *("block_share", "block_k_share", "ramp_share", "decay_share", "sparsity_warmup_share"),
            "average_decay",
        ):
            _between(self.name, field, getattr(self, field), 0, 1)
        for field in ("expansion", "learning_rate", "bandwidth"):
            if not 0 < getattr(self, field) <= MOST:
                raise ConfigError(
                    f"{self.name}: {field}: expected more than 0 and at most {MOST:,}, got {getattr(self, field)}"
                )
        _between(self.name, "temperature", self.temperature, 0.02, 1)
        for field in ("block_share", "average_decay"):
            if getattr(self, field) == 1:
                raise ConfigError(f"{self.name}: {field}: expected less than 1, got 1.0")
        self._check_architecture()
        self._check_objective()

    def _check_architecture(self) -> None:
        """Refuse options of one architecture on another, and what an architecture cannot do without."""
        name, kind = self.name, self.architecture
        for field, of, given in (
            ("prefix_shares", ("matryoshka",), bool(self.prefix_shares)),
            ("sparsity_weight", ("standard", "gated", "jumprelu"), self.sparsity_weight > 0),
            ("batch_norm", ("standard",), self.batch_norm),
        ):
            if given and kind not in of:
                raise ConfigError(
                    f"{name}: {field} = {getattr(self, field)}: architecture {kind} has no such option, only "
                    f"{', '.join(of)}"
                )
        if kind not in SELECTING and self.sparsity_weight == 0:
            raise ConfigError(
                f"{name}: sparsity_weight = 0.0: nothing else keeps the features of architecture {kind} from all "
                "being active; set it above 0"
            )
        if kind == "matryoshka":
            shares = (0.0, *self.prefix_shares, 1.0)
            if len(shares) == 2 or not all(a < b for a, b in itertools.pairwise(shares)):
                raise ConfigError(
                    f"{name}: prefix_shares: expected one or more rising shares between 0 and 1, got "
                    f"{list(self.prefix_shares)}"
                )
        if kind == "topk" and not self.unit_norm_decoder:
            raise ConfigError(
                f"{name}: unit_norm_decoder = false: a top-k over features of different norms cannot be saved "
                "with unit rows; use batchtopk"
            )
        if self.block_share > 0 and self.block_k_share > 0 and not 0 < self.block_k < self.k:
            raise ConfigError(
                f"{self.name}: k = {self.k} with block_k_share = {self.block_k_share} gives block H "
                f"{self.block_k} of them; each block needs at least 1, or block_k_share = 0 for one budget"
            )

    def _check_objective(self) -> None:
        """Refuse a temporal term that cannot be computed as asked."""
        name = self.name
        for field, options in (
            ("objective", get_args(Objective)),
            ("positives", get_args(Positives)),
            ("similarity", get_args(Similarity)),
            ("contrasted_code", get_args(ContrastedCode)),
        ):
            if getattr(self, field) not in options:
                raise ConfigError(
                    f"{name}: {field}: expected one of {', '.join(options)}, got {getattr(self, field)!r}"
                )
        if self.alpha > 0 and self.block_share == 0:
            raise ConfigError(f"{name}: alpha is {self.alpha} without a block; set block_share above 0")
        if self.alpha > 0 and self.window < 2:
            raise ConfigError(f"{name}: window: a positive needs at least 2 tokens, got {self.window}")
        if self.objective != "in_batch" and (self.similarity != "cosine" or not self.mask_documents):
            has = {
                "info_nce": "info_nce against the ring has the cosine and masks documents",
                "difference": "difference has no similarity and no negatives",
            }[self.objective]
            raise ConfigError(
                f"{name}: similarity = {self.similarity}, mask_documents = {str(self.mask_documents).lower()}: "
                f"{has}; use objective = in_batch, or leave both out"
            )
        if self.alpha > 0 and self.objective == "in_batch" and self.anchors < 2:
            raise ConfigError(
                f"{name}: anchors = {self.anchors}: in_batch takes a pair's negatives from the step's other "
                "pairs; expected at least 2"
            )
        if self.alpha > 0 and self.contrasted_code == "after_top_k" and self.architecture == "standard":
            raise ConfigError(
                f"{name}: contrasted_code = after_top_k: architecture standard selects nothing after ReLU; "
                "leave before_top_k"
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

    def takes_keys(self, d_model: int) -> bool:
        """Whether the temporal term, learnt from or only measured, is against the ring."""
        return bool(self.block_size(d_model)) and self.objective == "info_nce"

    def prefixes(self, d_model: int) -> tuple[int, ...]:
        """Features of each of matryoshka's prefixes, rising, all features last."""
        n = self.features(d_model)
        return (*(int(share * n) for share in self.prefix_shares), n)

    def check_sizes(self, d_model: int) -> None:
        """Refuse blocks too small for their active features in activations of ``d_model`` dimensions.

        >>> ArmConfig(name="a", expansion=2.0).check_sizes(16)
        Traceback (most recent call last):
            ...
        tcsae.store.errors.ConfigError: a: block H has 6 of the 32 features (expansion 2.0 x d_model 16, \
block_share 0.2) and keeps 8 per token; expected 1 to 6; lower k or raise expansion
        """
        n, size = self.features(d_model), self.block_size(d_model)
        split = [("block H", size, self.block_k), ("block L", n - size, self.k - self.block_k)]
        for block, features, k in split if self.block_k else [("the SAE", n, self.k)]:
            kept = k if self.architecture in SELECTING else 1
            if not 1 <= kept <= features:
                raise ConfigError(
                    f"{self.name}: {block} has {features} of the {n} features (expansion {self.expansion} x "
                    f"d_model {d_model}, block_share {self.block_share}) and keeps {kept} per token; expected "
                    f"1 to {features}; lower k or raise expansion"
                )
        sizes = (0, *self.prefixes(d_model))
        if any(a == b for a, b in itertools.pairwise(sizes)):
            raise ConfigError(
                f"{self.name}: prefix_shares {list(self.prefix_shares)} of {n} features are prefixes of "
                f"{list(sizes[1:])}; each must have more features than the one before"
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
    compile: bool = False
    """compile the encoder's products with torch.compile, which needs a C++ compiler and some ten seconds; what
    comes after them are sums over lists of entries, which gain nothing from it"""
    log_every: int = 10
    """steps between two lines of metrics.parquet"""
    checkpoint_every: int = 200
    """steps between two checkpoints"""
    collapse_steps: int = 100
    """steps with more than 99 % of an SAE's features dead, or with next to none active, after which the run stops"""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names:
            raise ConfigError("arms: none given; name a recipe, for instance --recipe batchtopk")
        if len(set(names)) < len(names):
            raise ConfigError(f"arms: two have the same name in {', '.join(names)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds: expected different whole numbers from 0, got {list(self.seeds)}")
        if max(self.seeds) > LARGEST:
            raise ConfigError(f"seeds: expected at most {LARGEST}, got {max(self.seeds)}")
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
                    f"{arm.name}: window = {arm.window} must divide the longest window, {self.window}, and the "
                    f"longest must divide batch_tokens = {self.batch_tokens}, so that all arms see the same tokens"
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
    if not least <= value <= LARGEST:
        bounds = f"at least {least}" if not value > LARGEST else f"at most {LARGEST}"
        raise ConfigError(f"{owner}: {field}: expected {bounds}, got {value}")


def _between(owner: str, field: str, value: float | int, low: float | int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{owner}: {field}: expected {low} to {high}, got {value}")
