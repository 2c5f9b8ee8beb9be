"""Booting a model through TransformerLens, then taking its own modules back out of the bridge.

TransformerLens gives the hooks their names and finds the modules of some two hundred architectures. Its own
forward pass costs 14 % more than the model's (each module is wrapped, attention is eager), and harvesting
needs nothing but the inputs and outputs of modules. So the wrappers are removed again, the parameters staying
where they are, and a hook becomes a plain forward hook on the module it belonged to.

That a module's input or output *is* what TransformerLens calls by that name is checked, not assumed: eight
tokens are run through the bridge and through the bare model, and only hooks with equal values are offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tcsae.harvest.quiet import quiet
from tcsae.store.errors import ModelNotFound
from tcsae.store.spec import Precision

PROBE_TOKENS = 8

TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference between bridge and bare model, relative to the largest value: the bridge's attention
adds up in another order than sdpa, and in bfloat16 each step rounds to 8 bits."""

Edit = Callable[[Float[Tensor, "batch position d_model"]], Float[Tensor, "batch position d_model"] | None]
"""Sees an activation; what it returns takes the activation's place, unless that is None."""


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """Where a hook's activation passes: the first input or the output of a module."""

    module: nn.Module
    """the model's own module"""
    side: Literal["input", "output"]
    """which end of it"""

    def attach(self, edit: Edit) -> RemovableHandle:
        """Call ``edit`` with every activation that passes, until the handle is removed."""
        if self.side == "output":

            def after(_module: nn.Module, _args: Any, output: Any) -> Any:
                if not isinstance(output, tuple):
                    return edit(output)
                replaced = edit(output[0])
                return None if replaced is None else (replaced, *output[1:])

            return self.module.register_forward_hook(after)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                replaced = edit(args[0])
                return None if replaced is None else ((replaced, *args[1:]), kwargs)
            replaced = edit(kwargs["hidden_states"])
            return None if replaced is None else (args, {**kwargs, "hidden_states": replaced})

        return self.module.register_forward_pre_hook(before, with_kwargs=True)


@dataclass(frozen=True, slots=True, eq=False)
class Bare:
    """A model without its bridge."""

    causal: Any
    """the Hugging Face model with its head, a transformers.PreTrainedModel"""
    blocks: tuple[nn.Module, ...]
    """its layers, first to last"""
    taps: dict[str, Tap]
    """every hook that can be harvested, by TransformerLens' name"""


def probe_tokens(vocab_size: int, device: torch.device) -> Int[Tensor, "batch position"]:
    """One short context of different tokens from all over the vocabulary.

    >>> probe_tokens(800, torch.device("cpu")).tolist()
    [[50, 150, 250, 350, 450, 550, 650, 750]]
    """
    step = vocab_size // PROBE_TOKENS
    return (torch.arange(PROBE_TOKENS, device=device) * step + step // 2)[None]


@torch.no_grad()
def boot(folder: Path, precision: Precision, device: torch.device) -> Bare:
    """Load a model's raw weights through TransformerLens, without its compatibility mode, and bare it.

    Raises
    ------
    ModelNotFound
        the folder's files cannot be loaded, or TransformerLens knows no such architecture, or the bare model
        does not compute what the bridge does
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        try:
            bridge = TransformerBridge.boot_transformers(str(folder), device=str(device), dtype=dtype)
        except Exception as error:  # every architecture has errors of its own for files that do not fit it
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ModelNotFound(f"{folder}: TransformerLens cannot load this model: {reason}") from error
        causal = bridge.original_model.eval().requires_grad_(False)
        tokens = probe_tokens(causal.config.get_text_config().vocab_size, device)
        d_model = bridge.cfg.d_model
        points = _hook_points(bridge)
        expected, expected_logits = _values_in_bridge(causal, points, tokens, d_model)
        blocks = tuple(block.original_component for block in bridge.blocks)
        taps = {name: tap for name, (_, tap) in points.items() if name in expected}
        names = {id(point): name for name, (point, _) in points.items()}
        aliases = {alias: names[id(point)] for alias, point in bridge.hook_dict.items() if id(point) in names}
        _unwrap(causal)
        causal.set_attn_implementation("sdpa")
        # The bridge asks for attention patterns, which sdpa does not give.
        causal.config.output_attentions = False
    bare = Bare(causal, blocks, taps)
    got: dict[str, Tensor] = {}
    logits = _run_recording(bare.causal, taps, tokens, got)
    if not _close(logits, expected_logits, TOLERANCE[precision]):
        raise ModelNotFound(
            f"{folder}: {type(causal).__name__} gives other logits bare than in TransformerLens' bridge, "
            "so its hooks cannot "
            "be trusted; use a model of the Llama or GPT-NeoX family"
        )
    equal = {
        name for name in expected if name in got and _close(got[name], expected[name], TOLERANCE[precision])
    }
    # In the order in which the pass meets them.
    offered = {name: taps[name] for name in got if name in equal}
    offered |= {alias: taps[name] for alias, name in aliases.items() if name in equal}
    return Bare(bare.causal, bare.blocks, offered)


def _hook_points(bridge: Any) -> dict[str, tuple[nn.Module, Tap]]:
    """Hook points at the ends of wrapped modules, by canonical name, each with the wrapped module's end."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    found: dict[int, Tap] = {}
    for component in bridge.modules():
        if isinstance(component, GeneralizedComponent) and component.original_component is not None:
            module = _innermost(component)
            found.setdefault(id(component.hook_in), Tap(module, "input"))
            found.setdefault(id(component.hook_out), Tap(module, "output"))
    points: dict[str, tuple[nn.Module, Tap]] = {}
    seen: set[int] = set()
    for name, point in bridge.hook_dict.items():
        # Aliases are other names of one and the same hook point; the first is the canonical one.
        if id(point) in found and id(point) not in seen:
            seen.add(id(point))
            points[name] = (point, found[id(point)])
    return points


def _values_in_bridge(
    causal: Any, points: dict[str, tuple[nn.Module, Tap]], tokens: Int[Tensor, "batch position"], d_model: int
) -> tuple[dict[str, Tensor], Float[Tensor, "batch position vocab"]]:
    """Activations of the residual stream's shape as TransformerLens sees them, by hook, and the logits.

    A hook point is a module that passes its input through, so plain forward hooks reach the values; the
    bridge's own ``run_with_cache`` gives the same ones in fifty times the time.
    """
    values: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, value: Any) -> None:
            if isinstance(value, Tensor) and value.shape == (*tokens.shape, d_model):
                values[name] = value.clone()

        return keep

    handles = [point.register_forward_hook(record(name)) for name, (point, _) in points.items()]
    try:
        logits = causal(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return values, logits


def _run_recording(
    causal: Any, taps: dict[str, Tap], tokens: Int[Tensor, "batch position"], into: dict[str, Tensor]
) -> Float[Tensor, "batch position vocab"]:
    def record(name: str) -> Edit:
        def keep(value: Tensor) -> None:
            # Without a copy, as harvesting keeps it: a module that overwrites its input later is found out.
            into[name] = value

        return keep

    handles = [tap.attach(record(name)) for name, tap in taps.items()]
    try:
        logits: Tensor = causal(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


def _innermost(component: Any) -> nn.Module:
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    while isinstance(component, GeneralizedComponent):
        component = component.original_component
    assert isinstance(component, nn.Module)
    return component


def _unwrap(module: nn.Module) -> None:
    """Put each wrapped module back in its wrapper's place, at every depth; parameters are not touched."""
    for name, child in module._modules.items():
        if child is not None:
            bare = _innermost(child)
            module._modules[name] = bare
            _unwrap(bare)


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    largest = expected.abs().max().item()
    return bool((got - expected).abs().max().item() <= tolerance * largest)
