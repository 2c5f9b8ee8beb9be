"""How the rows of a chunk become the bytes of its file, and back.

============  ==========================================================================================
``raw``       the rows themselves; memory-mapped. What a harvest writes.
``lossless``  Blosc: zstd after a byte shuffle. A plain Zarr codec. 1.0 to 1.1 x on float16.
``int8``      8 bits a value with a scale a row; the few huge dimensions apart, exactly. About 2 x.
``uniform``   one step for all values, centred, entropy-coded. About 3.6 x at 0.2 % of the variance.
============  ==========================================================================================

The lossy ones are fitted to a sample of each hook's rows. What was fitted is the codec's configuration, which
is kept in the array's metadata, so a chunk is decoded without the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jaxtyping import Float
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from torch import Tensor

from tcsae.store.errors import UnknownName
from tcsae.store.spec import OUTLIER_FACTOR, TORCH_DTYPES, Dtype

CodecName = Literal["raw", "lossless", "int8", "uniform"]

Bytes = npt.NDArray[np.uint8]

BLOSC_LEVEL = 5

ZSTD_LEVEL = 1
"""higher levels find no repetition in noise: level 1 is as small and five times as fast"""

UNIFORM_ERROR = 0.0019
"""Squared error that ``uniform`` is fitted to, as a share of the variance about the mean"""

LARGE_DIMENSION = 6.0
"""A dimension is kept apart by ``int8`` if its root mean square exceeds this multiple of the median one."""

MAX_LARGE = 1 / 16
"""largest share of the dimensions that is kept apart"""

LARGEST_CODE = 32_767
"""``uniform`` holds a value as a 16-bit number of steps; a larger one widens the step of its row"""


@runtime_checkable
class Codec(Protocol):
    """One way to turn rows into bytes."""

    def encode(self, rows: Float[Tensor, "row d_model"]) -> Bytes:
        """Bytes of ``rows``, which have the store's dtype."""

    def decode(self, body: Bytes, n_rows: int, d_model: int) -> Float[Tensor, "row d_model"]:
        """The rows again, in the store's dtype; raises ValueError if ``body`` has not that many."""


@dataclass(frozen=True, slots=True)
class Raw:
    """The rows' own bytes; decoding makes a view."""

    dtype: Dtype

    def encode(self, rows: Float[Tensor, "row d_model"]) -> Bytes:
        body: Bytes = rows.contiguous().view(torch.uint8).numpy().reshape(-1)
        return body

    def decode(self, body: Bytes, n_rows: int, d_model: int) -> Float[Tensor, "row d_model"]:
        return torch.from_numpy(body).view(TORCH_DTYPES[self.dtype]).view(n_rows, d_model)


@dataclass(frozen=True, slots=True)
class Lossless:
    """Zarr's ``blosc`` codec: bytes of equal significance side by side, then zstd."""

    dtype: Dtype

    @property
    def blosc(self) -> Blosc:
        """the compressor, as Zarr's codec makes it"""
        size = TORCH_DTYPES[self.dtype].itemsize
        return Blosc(cname="zstd", clevel=BLOSC_LEVEL, shuffle=Blosc.SHUFFLE, typesize=size)

    def encode(self, rows: Float[Tensor, "row d_model"]) -> Bytes:
        return np.frombuffer(self.blosc.encode(Raw(self.dtype).encode(rows)), np.uint8)

    def decode(self, body: Bytes, n_rows: int, d_model: int) -> Float[Tensor, "row d_model"]:
        out = np.empty(n_rows * d_model * TORCH_DTYPES[self.dtype].itemsize, np.uint8)
        # Blosc believes its header (sizes at bytes 4 and 12), even where the body is shorter than that
        sizes = body[:16].view("<u4")[[1, 3]].tolist() if body.size >= 16 else []
        if sizes != [out.size, body.size]:
            raise ValueError(f"expected {out.size} bytes in {body.size}, got {sizes}")
        try:
            self.blosc.decode(body, out)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return Raw(self.dtype).decode(out, n_rows, d_model)


@dataclass(frozen=True, slots=True)
class Int8:
    """x = scale_row * q with q in -127..127, except in ``large`` dimensions, which keep their value.

    A few dimensions of a residual stream are a hundred times the others; left in, they would set the scale of
    every row. Bytes: scales float32 [row], q int8 [row, d_model - large], then the large ones [row, large].
    """

    dtype: Dtype
    large: tuple[int, ...]
    """dimensions kept apart, ascending"""

    def encode(self, rows: Float[Tensor, "row d_model"]) -> Bytes:
        values = rows.float()
        small = values[:, self._small(rows.shape[1])]
        scale = (
            small.abs().amax(dim=1, keepdim=True) / 127 if small.numel() else values.new_zeros(len(rows), 1)
        )
        codes = (small / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
        kept = rows[:, list(self.large)]
        parts = [part for part in (scale.squeeze(1), codes.to(torch.int8), kept) if part.numel()]
        return np.concatenate([part.contiguous().view(torch.uint8).numpy().reshape(-1) for part in parts])

    def decode(self, body: Bytes, n_rows: int, d_model: int) -> Float[Tensor, "row d_model"]:
        dtype, small = TORCH_DTYPES[self.dtype], self._small(d_model)
        sizes = (4 * n_rows, n_rows * len(small), n_rows * len(self.large) * dtype.itemsize)
        if body.size != sum(sizes):
            raise ValueError(f"expected {sum(sizes)} bytes, got {body.size}")
        scale, codes, kept = (
            torch.from_numpy(part.copy()) for part in np.split(body, np.cumsum(sizes)[:2].tolist())
        )
        out = torch.empty(n_rows, d_model, dtype=dtype)
        if not bool((scale.view(torch.float32) >= 0).all()):  # NaN included
            raise ValueError("expected scales of 0 or more")
        scaled = codes.view(torch.int8).view(n_rows, -1).float() * scale.view(torch.float32)[:, None]
        out[:, small] = scaled.to(dtype)
        if self.large:
            out[:, list(self.large)] = kept.view(dtype).view(n_rows, len(self.large))
        return out

    def _small(self, d_model: int) -> list[int]:
        return sorted(set(range(d_model)) - set(self.large))


@dataclass(frozen=True, slots=True)
class Uniform:
    """x = mean + step * factor_row * q, with q a whole number, zigzag-coded and compressed by zstd.

    One step for all dimensions is the best choice for a squared error: a dimension of small variance takes few
    bits since its q are small, a large one many. (A rotation to principal components first, which is what
    transform coding would do, gains 9 % on SmolLM2's stream and needs a d_model x d_model matrix.)

    Values are stored dimension by dimension, the low bytes of all, then the high ones, so that the compressor
    sees equal statistics side by side. Bytes: length of the low part uint32, factors float32 [row], the low
    part, the high part. ``factor`` is 1 but for rows that would leave 16 bits.
    """

    dtype: Dtype
    step: float
    """distance of two neighbouring decoded values, before the row's factor"""
    mean: tuple[float, ...]
    """subtracted from each row before it is rounded, [d_model]"""

    def encode(self, rows: Float[Tensor, "row d_model"]) -> Bytes:
        steps = (rows.float() - torch.tensor(self.mean)) / self.step
        factor = (steps.abs().amax(dim=1, keepdim=True) / LARGEST_CODE).clamp(min=1.0)
        codes = (steps / factor).round().to(torch.int32).numpy().T
        # zigzag: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...: the high byte of a small number is always 0
        zigzag = ((codes << 1) ^ (codes >> 31)).astype(np.uint16)
        low, high = ((zigzag >> shift & 255).astype(np.uint8, order="C") for shift in (0, 8))
        compress = Zstd(level=ZSTD_LEVEL).encode
        parts = [np.frombuffer(compress(part), np.uint8) for part in (low, high)]
        length = np.array([parts[0].size], dtype="<u4").view(np.uint8)
        return np.concatenate([length, factor.squeeze(1).numpy().view(np.uint8), *parts])

    def decode(self, body: Bytes, n_rows: int, d_model: int) -> Float[Tensor, "row d_model"]:
        begins = 4 + 4 * n_rows
        if body.size < begins:
            raise ValueError(f"expected at least {begins} bytes, got {body.size}")
        middle = begins + int(body[:4].view("<u4")[0])
        factor = torch.from_numpy(body[4:begins].copy()).view(torch.float32)
        if not bool((factor >= 1).all()):  # NaN included
            raise ValueError("expected factors of 1 or more")
        low, high = (self._plane(body[part], n_rows * d_model) for part in np.s_[begins:middle, middle:])
        zigzag = low.astype(np.int32) | high.astype(np.int32) << 8
        codes = torch.from_numpy((zigzag >> 1) ^ -(zigzag & 1)).view(d_model, n_rows).T.float()
        rows = codes.mul_(factor[:, None] * self.step).add_(torch.tensor(self.mean))
        return rows.to(TORCH_DTYPES[self.dtype]).contiguous()

    @staticmethod
    def _plane(body: Bytes, size: int) -> Bytes:
        # numcodecs would leave the end of its output as it was where the body holds less
        try:
            return np.frombuffer(pa.Codec("zstd").decompress(body, size), np.uint8)
        except OSError as error:
            raise ValueError(" ".join(str(error).split())) from error


def make_codec(name: str, dtype: Dtype, configuration: dict[str, Any]) -> Codec:
    """The codec called ``name`` with what was fitted; raises `UnknownName`, KeyError or TypeError."""
    match name:
        case "raw":
            return Raw(dtype)
        case "lossless":
            return Lossless(dtype)
        case "int8":
            return Int8(dtype, tuple(int(i) for i in configuration["large"]))
        case "uniform":
            return Uniform(dtype, float(configuration["step"]), tuple(map(float, configuration["mean"])))
    raise UnknownName.among("codec", name, get_args(CodecName))


def fit(name: str, sample: Float[Tensor, "row d_model"], dtype: Dtype) -> dict[str, Any]:
    """Configuration of codec ``name`` for rows like those of ``sample`` (at least some thousands).

    Rows whose norm is more than ten times the median are left out of the fit: like all others they are encoded,
    but a single one weighs as much as thousands in a variance.
    """
    rows = sample.float()
    norms = rows.norm(dim=1)
    rows = rows[norms <= OUTLIER_FACTOR * norms.median()]
    if name == "int8":
        size = rows.square().mean(dim=0).sqrt()
        large = (size > LARGE_DIMENSION * size.median()).nonzero().flatten().tolist()
        most = int(MAX_LARGE * rows.shape[1])
        return {"large": sorted(sorted(large, key=lambda i: -float(size[i]))[:most])}
    if name == "uniform":
        mean = rows.mean(dim=0)
        # the error of rounding is step^2 / 12 a value, less where most values round to 0: hence the two corrections
        step = float((12 * UNIFORM_ERROR * (rows - mean).square().mean()).sqrt()) or 1.0
        for _ in range(3):
            codec = Uniform(dtype, step, tuple(mean.tolist()))
            found = relative_error(codec, sample.to(TORCH_DTYPES[dtype]))
            step *= (UNIFORM_ERROR / found) ** 0.5 if found else 1.0
        return {"step": step, "mean": mean.tolist()}
    return {}


def relative_error(codec: Codec, rows: Float[Tensor, "row d_model"]) -> float:
    """Squared error of ``rows`` decoded again, over their squared distance from their mean; outliers left out.

    It bounds what an SAE's fraction of variance unexplained can change by, to first order.
    """
    values = rows.double()
    norms = values.norm(dim=1)
    kept = norms <= OUTLIER_FACTOR * norms.median()
    decoded = codec.decode(codec.encode(rows), *rows.shape).double()
    variance = (values - values[kept].mean(dim=0))[kept].square().sum()
    return float((decoded - values)[kept].square().sum() / variance) if variance > 0 else 0.0


def measured_ratio(codec: Codec, rows: Float[Tensor, "row d_model"]) -> float:
    """Bytes of ``rows`` over bytes of ``rows`` encoded."""
    return rows.numel() * rows.dtype.itemsize / codec.encode(rows).size
