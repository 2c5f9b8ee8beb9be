"""The SAE that is saved, loaded, spliced into a model and measured: raw activations in and out."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tcsae.store.errors import ConfigError, UnknownName

Architecture = Literal["standard", "topk", "jumprelu"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


class SAE(nn.Module):
    """A sparse autoencoder in inference form.

        pre = (x - b_dec) @ W_enc + b_enc

        standard   f = ReLU(pre)
        topk       f = ReLU(the k largest of pre, the rest 0)
        jumprelu   f = ReLU(pre) where pre > threshold, else 0          (strict, as SAELens has it)

        x_hat = f @ W_dec + b_dec

    Any scaling of the training run is folded into the weights, so ``x`` and ``x_hat`` are the model's own
    activations and nobody has to know the scale. The weights are buffers: an `SAE` is not trained.

    Parameters
    ----------
    architecture
        which of the three non-linearities above
    W_enc, b_enc, W_dec, b_dec
        shapes [d_model, feature], [feature], [feature, d_model], [d_model]
    threshold
        [feature], in the units of ``pre``; jumprelu only
    k
        features kept per token; topk only
    block_size
        features 0 .. block_size - 1 are the contrastive block H; 0 where there is no block
    name
        what tables and plots call it, such as ``tc16-s0``
    metadata
        what SAELens keeps beside the weights (model_name, hook_name, ...), with our own fields under
        ``"tcsae"``

    Raises
    ------
    ConfigError
        a shape does not fit the others, or a threshold or k is missing or out of place
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None

    def __init__(
        self,
        *,
        architecture: Architecture,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor | None = None,
        k: int | None = None,
        block_size: int = 0,
        name: str = "sae",
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise UnknownName.among("architecture", architecture, ARCHITECTURES)
        d_in, d_sae = W_enc.shape
        shapes = {"b_enc": (b_enc, (d_sae,)), "W_dec": (W_dec, (d_sae, d_in)), "b_dec": (b_dec, (d_in,))}
        if threshold is not None:
            shapes["threshold"] = (threshold, (d_sae,))
        for field, (tensor, expected) in shapes.items():
            if tuple(tensor.shape) != expected:
                raise ConfigError(f"{name}: {field} has shape {tuple(tensor.shape)}, expected {expected}")
        if (threshold is not None) != (architecture == "jumprelu"):
            raise ConfigError(
                f"{name}: a jumprelu SAE has a threshold and no other has; this one is {architecture}"
            )
        if (k is not None) != (architecture == "topk") or (k is not None and not 1 <= k <= d_sae):
            raise ConfigError(
                f"{name}: a topk SAE has k in 1..{d_sae} and no other has k; got {architecture}, k={k}"
            )
        if not 0 <= block_size <= d_sae:
            raise ConfigError(f"{name}: block_size is {block_size}, expected 0..{d_sae}")
        self.architecture: Architecture = architecture
        self.k = k
        self.block_size = block_size
        self.name = name
        self.metadata: dict[str, Any] = dict(metadata or {})
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
        for field, weight in weights.items():
            self.register_buffer(field, None if weight is None else weight.detach())

    @classmethod
    def identity(cls, d_in: int) -> SAE:
        """The SAE that returns its input, with two features for each direction, one for either sign.

        >>> SAE.identity(2)(torch.tensor([3.0, -4.0]))
        tensor([ 3., -4.])
        """
        both = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
        return cls(
            architecture="standard",
            W_enc=both.T.contiguous(),
            b_enc=torch.zeros(2 * d_in),
            W_dec=both,
            b_dec=torch.zeros(d_in),
            name="identity",
        )

    @classmethod
    def zero(cls, d_in: int, d_sae: int = 1) -> SAE:
        """The SAE that returns zeros whatever comes in, the zero ablation of evaluation."""
        return cls(
            architecture="standard",
            W_enc=torch.zeros(d_in, d_sae),
            b_enc=torch.zeros(d_sae),
            W_dec=torch.zeros(d_sae, d_in),
            b_dec=torch.zeros(d_in),
            name="zero",
        )

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which everything is computed and returned."""
        return self.W_enc.dtype

    def encode(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows feature"]:
        """Feature activations of raw activations, in the weights' dtype whatever that of ``x``.

        Raises `ConfigError` for activations of another width than `d_in`.
        """
        if x.shape[-1:] != (self.d_in,):
            raise ConfigError(
                f"{self.name}: activations of shape {tuple(x.shape)}, expected [..., {self.d_in}]; is this the "
                "SAE's model and hook?"
            )
        rows = x.to(self.dtype).reshape(-1, self.d_in) - self.b_dec
        pre: Tensor = torch.addmm(self.b_enc, rows, self.W_enc).reshape(*x.shape[:-1], self.d_sae)
        if self.threshold is not None:
            return pre.relu() * (pre > self.threshold)
        if self.k is not None:
            kept, features = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter_(-1, features, kept.relu())
        return pre.relu()

    def decode(self, f: Float[Tensor, "*rows feature"]) -> Float[Tensor, "*rows d_model"]:
        """Raw activations from feature activations."""
        reconstruction: Tensor = f.to(self.dtype) @ self.W_dec + self.b_dec
        return reconstruction

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The reconstruction of ``x``."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """What ``print(sae)`` shows."""
        return f"{self.name}: {self.architecture}, {self.d_in} -> {self.d_sae}, block of {self.block_size}"
