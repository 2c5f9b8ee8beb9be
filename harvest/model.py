"""A language model as harvesting and evaluation use it: activations below a hook, logits above it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tcsae.harvest.bridge import Bare, Tap, boot, probe_tokens
from tcsae.harvest.locate import Location, locate
from tcsae.harvest.quiet import quiet
from tcsae.harvest.weights import tokenizer_sha256, weights_sha256
from tcsae.store.device import choose_device
from tcsae.store.errors import ModelNotFound, UnknownName
from tcsae.store.spec import Precision

log = logging.getLogger(__name__)

SAME_LOGITS = 1e-5
"""Largest difference, relative to the largest logit, between a pass from a hook on and a whole pass."""


class _Stop(Exception):
    """Raised inside a forward pass once everything asked for has been seen; not an error, so not named so."""


class LanguageModel:
    """A model with its tokenizer. Made by `load_model`; frozen, in evaluation mode, never trained.

    Contexts are padded on the right and no attention mask is given: attention is causal, so a pad is seen
    by nothing before it, and what it computes itself is thrown away.
    """

    def __init__(
        self,
        location: Location,
        bare: Bare,
        tokenizer: Any,
        sha256: str,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.name = location.name
        self.revision = location.revision
        self.sha256 = sha256
        self.tokenizer = tokenizer
        self.tokenizer_sha256 = tokenizer_sha256(tokenizer)
        self.precision: Precision = precision
        self.device = device
        settings = bare.causal.config.get_text_config()
        self.d_model: int = settings.hidden_size
        self.vocab_size: int = settings.vocab_size
        self.max_context: int | None = getattr(settings, "max_position_embeddings", None)
        self.n_layers = len(bare.blocks)
        # 0 is a BOS (Pythia's is), so these are compared with None.
        self.bos_token_id: int | None = tokenizer.bos_token_id
        special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        self.special_token_ids = tuple(sorted({token for token in special if token is not None}))
        self._bare = bare
        self._resumable: dict[str, bool] = {}
        self._n_outputs: dict[nn.Module, int] = {}

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Names of every hook whose activation is [batch, position, d_model], in the order of the pass."""
        return tuple(self._bare.taps)

    def check_hooks(self, names: Sequence[str]) -> None:
        """Raise `UnknownName`, which lists the nearest names, unless the model has every one of ``names``."""
        for name in names:
            if name not in self._bare.taps:
                raise UnknownName.among(f"or unsupported hook of {self.name}:", name, self._bare.taps)

    @torch.no_grad()
    def residuals(
        self, input_ids: Int[Tensor, "batch position"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch position d_model"]]:
        """Activations at the hooks, in the pass's dtype, from one pass that ends at the highest of them.

        The tensors belong to the model's pass: copy what is to be changed.
        """
        self.check_hooks(hooks)
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], None]:
            def see(activation: Tensor) -> None:
                found[name] = activation
                if len(found) == len(set(hooks)):
                    raise _Stop

            return see

        with ExitStack() as attached:
            for name in dict.fromkeys(hooks):
                attached.callback(self._bare.taps[name].attach(keep(name)).remove)
            with suppress(_Stop):
                self._bare.causal(input_ids.to(self.device), use_cache=False)
        return {name: found[name] for name in hooks}

    @torch.no_grad()
    def logits(
        self,
        input_ids: Int[Tensor, "batch position"],
        hook: str | None = None,
        edit: Callable[[Float[Tensor, "batch position d_model"]], Float[Tensor, "batch position d_model"]]
        | None = None,
    ) -> Float[Tensor, "batch position vocab"]:
        """Float32 logits at every position, from a whole pass.

        With ``hook`` and ``edit``, ``edit`` sees the activation at the hook; what it returns takes its place.
        Memory: 4 bytes times the vocabulary, 197 kB a token for SmolLM2, so keep batches small.
        """
        with ExitStack() as attached:
            if hook is not None and edit is not None:
                self.check_hooks([hook])
                attached.callback(self._bare.taps[hook].attach(self._cast(edit)).remove)
            logits: Tensor = self._bare.causal(input_ids.to(self.device), use_cache=False).logits
        return logits.float()

    @torch.no_grad()
    def logits_from(
        self,
        input_ids: Int[Tensor, "batch position"],
        hook: str,
        x: Float[Tensor, "batch position d_model"],
    ) -> Float[Tensor, "batch position vocab"]:
        """Float32 logits at every position if the activation at ``hook`` were ``x``.

        At the residual stream between blocks only the blocks above the hook run; at any other hook the whole
        model does. The first call for a hook compares both ways on two rows of eight tokens, and if an
        architecture gives other logits the short way (for instance because blocks share keys and values), or
        none at all, it is not taken.
        """
        self.check_hooks([hook])
        if hook not in self._resumable:
            self._resumable[hook] = self._can_resume(hook)
        if not self._resumable[hook]:
            return self.logits(input_ids, hook, lambda _: x)
        return self._logits_above(input_ids, self._blocks_below(hook), x)

    def _logits_above(
        self,
        input_ids: Int[Tensor, "batch position"],
        n_below: int,
        x: Float[Tensor, "batch position d_model"],
    ) -> Float[Tensor, "batch position vocab"]:
        below = self._bare.blocks[:n_below]
        with _skipping(below, x.to(self.device, self._dtype), self._n_outputs):
            return self.logits(input_ids)

    def _blocks_below(self, hook: str) -> int:
        """Blocks that need not run if the activation at ``hook`` is known; 0 if it is not between blocks."""
        tap: Tap = self._bare.taps[hook]
        for number, block in enumerate(self._bare.blocks):
            if block is tap.module:
                return number + (tap.side == "output")
        return 0

    def _can_resume(self, hook: str) -> bool:
        n_below = self._blocks_below(hook)
        if n_below == 0:
            return False
        row = probe_tokens(self.vocab_size, self.device)
        # Two rows, and different ones: a pass that took one row for the whole batch would go unnoticed else.
        tokens = torch.cat([row, row.flip(-1)])
        # Half the activation, since a pass that ignored x altogether would reproduce the unedited logits.
        x = 0.5 * self.residuals(tokens, [hook])[hook]
        with self._counting_outputs():
            whole = self.logits(tokens, hook, lambda _: x)
        try:
            short = self._logits_above(tokens, n_below, x)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            log.debug("%s: no pass from %s on (%s); whole passes it is", self.name, hook, error)
            return False
        same_shape = whole.shape == short.shape
        return same_shape and bool((whole - short).abs().max() <= SAME_LOGITS * whole.abs().max())

    @contextmanager
    def _counting_outputs(self) -> Iterator[None]:
        """Learn from the passes inside how many things each block returns; 0 is a tensor, not a tuple."""

        def see(block: nn.Module, _args: Any, output: Any) -> None:
            self._n_outputs[block] = len(output) if isinstance(output, tuple) else 0

        with ExitStack() as attached:
            for block in self._bare.blocks:
                attached.callback(block.register_forward_hook(see).remove)
            yield

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def _cast(self, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: edit(x).to(x.device, x.dtype)


@contextmanager
def _skipping(
    blocks: Sequence[nn.Module],
    x: Float[Tensor, "batch position d_model"],
    n_outputs: Mapping[nn.Module, int],
) -> Iterator[None]:
    """Let the blocks do nothing and the last of them return ``x``.

    A block that returns a tuple of ``n_outputs`` (0: a tensor alone) goes on doing so, with None for the
    attention and whatever else stands behind the activation.

    The blocks stay in the model, with everything that it reads off them (their number, their kind of
    attention), and embedding, positions and masks are computed as ever: only the work is left out.
    """

    def passing(value: Tensor | None, length: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            passed = value
            if passed is None:
                passed = args[0] if args else kwargs["hidden_states"]
            return (passed, *[None] * (length - 1)) if length else passed

        return forward

    with ExitStack() as restored:
        for block in blocks:
            # An attribute of the object hides the method of its class, until it is deleted again.
            block.forward = passing(x if block is blocks[-1] else None, n_outputs[block])
            restored.callback(block.__dict__.pop, "forward")
        yield


def load_model(name: str, *, precision: Precision = "float32", device: str = "auto") -> LanguageModel:
    """Load a model and its tokenizer by name.

    Parameters
    ----------
    name
        hub name (``EleutherAI/pythia-70m``), a local folder in Hugging Face's form, or a packaged model
        (``smollm2``, converted once into the user's cache, `TCSAE_CACHE` overriding where that is)
    precision
        dtype of the weights and the forward pass
    device
        torch device; ``auto`` takes a GPU if there is one

    Raises
    ------
    ModelNotFound
        no such model here, and none can be fetched; the message says what works instead
    ConfigError
        there is no such device
    """
    location = locate(name)
    target = choose_device(device)
    if precision == "bfloat16" and not has_fast_bfloat16(target):
        log.warning(
            "this processor has no bfloat16 arithmetic: the forward pass will be up to 100 times slower "
            "than --precision float32"
        )
    sha256 = weights_sha256(location.folder)
    bare = boot(location.folder, precision, target)
    with quiet():
        from transformers import AutoTokenizer

        # The bridge's own tokenizer has had its special tokens changed; this one is as it was saved.
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(location.folder))
        except Exception as error:  # a plain Exception is what the tokenizers library raises for any bad file
            raise ModelNotFound(
                f"{location.folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:300]}); save it "
                "there with save_pretrained"
            ) from error
        if len(tokenizer) <= len(
            tokenizer.all_special_tokens
        ):  # what transformers makes up where there is none
            raise ModelNotFound(
                f"{location.folder}: expected the model's tokenizer beside its weights, got none; save it there with "
                "save_pretrained"
            )
    return LanguageModel(location, bare, tokenizer, sha256, precision, target)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are done by the hardware rather than emulated.

    Measured without: 1.3 GFLOP/s against 197 in float32.
    """
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
