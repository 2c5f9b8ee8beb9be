"""The lossy codecs as Zarr v3 codecs, so that plain zarr reads such stores where tcsae is installed.

Zarr finds them by the package's entry points ``zarr.codecs``; importing this module registers them as well.
Only encoding and decoding of whole chunks: a chunk's rows share a compressed stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from tcsae.store.codecs import make_codec
from tcsae.store.spec import TORCH_DTYPES, Dtype


@dataclass(frozen=True)
class _FittedCodec(ArrayBytesCodec):  # type: ignore[misc]  # zarr is not type-checked here
    """A codec of `tcsae.store.codecs` with its configuration, called ``tcsae.<name>`` in array metadata."""

    codec: ClassVar[str]
    is_fixed_size = False

    dtype: Dtype
    """what the rows are; bfloat16 rows are an array of uint16"""
    configuration: dict[str, Any] = field(default_factory=dict, hash=False)
    """what was fitted"""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> _FittedCodec:
        values = dict(data["configuration"])
        return cls(values.pop("dtype"), values)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": f"tcsae.{self.codec}",
            "configuration": {"dtype": self.dtype, **self.configuration},
        }

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        bits = np.ascontiguousarray(chunk_array.as_numpy_array())
        rows = torch.from_numpy(bits.view(np.uint8).copy()).view(TORCH_DTYPES[self.dtype]).view(bits.shape)
        body = make_codec(self.codec, self.dtype, self.configuration).encode(rows)
        return chunk_spec.prototype.buffer.from_bytes(body.tobytes())

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        body = np.frombuffer(chunk_bytes.to_bytes(), np.uint8)
        n_rows, d_model = chunk_spec.shape
        rows = make_codec(self.codec, self.dtype, self.configuration).decode(body, n_rows, d_model)
        bits = rows.view(torch.uint8).numpy().view(chunk_spec.dtype.to_native_dtype())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(bits.reshape(chunk_spec.shape))

    def compute_encoded_size(self, _input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        # zarr's interface asks for this error where a codec's output has no fixed size
        raise NotImplementedError("the size depends on the rows")


class Int8Codec(_FittedCodec):
    """``tcsae.int8``"""

    codec = "int8"


class UniformCodec(_FittedCodec):
    """``tcsae.uniform``"""

    codec = "uniform"


for _codec in (Int8Codec, UniformCodec):
    # by its full name, as the entry point does, or zarr would take the two for rivals
    register_codec(f"tcsae.{_codec.codec}", _codec)
