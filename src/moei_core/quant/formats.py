"""The one table of weight formats: floats, and blocks with the public GGUF values.

A format stores ``block_size`` consecutive weights of a row in ``block_nbytes`` bytes; a float is a block of one.
Names are those of safetensors (``BF16``) and of GGUF (``Q4_0``), upper case. A matrix is [rows, columns] with the
blocks along the columns, which are the input dimension of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moei_core.errors import DamagedFileError, UnsupportedModelError
from moei_core.quant import k_blocks, simple_blocks
from moei_core.quant.simple_blocks import NotFiniteError, ScaleRangeError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Weights converted at once: small enough that every pass over them stays in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One way to store weights.

    decode: [n, block_nbytes] bytes -> [n, block_size] float32. encode: the inverse, where moei writes the format.
    """

    name: str
    block_size: int
    block_nbytes: int
    decode: Callable[[Bytes], Floats]
    encode: Callable[[Floats], Bytes] | None = None

    @property
    def is_float(self) -> bool:
        return self.block_size == 1

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether rows of ``shape`` are whole blocks."""
        return self.is_float or bool(shape and shape[-1] % self.block_size == 0)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of ``shape``, whose rows must be whole blocks."""
        assert self.holds(shape), (self.name, shape)
        return math.prod(shape) // self.block_size * self.block_nbytes


def _float(name: str, dtype: Any) -> BlockFormat:
    nbytes = np.dtype(dtype).itemsize
    return BlockFormat(name, 1, nbytes, lambda raw: np.ascontiguousarray(raw).view(dtype).astype(np.float32))


def _decode_bf16(raw: Bytes) -> Floats:
    bits = np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


FORMATS: dict[str, BlockFormat] = {
    one.name: one
    for one in (
        _float("F32", "<f4"),
        _float("F16", "<f2"),
        BlockFormat("BF16", 1, 2, _decode_bf16),
        BlockFormat("Q8_0", 32, 34, simple_blocks.decode_q8_0, simple_blocks.encode_q8_0),
        BlockFormat("Q4_0", 32, 18, simple_blocks.decode_q4_0, simple_blocks.encode_q4_0),
        BlockFormat("MXFP4", 32, 17, simple_blocks.decode_mxfp4),
        BlockFormat("Q4_K", 256, 144, k_blocks.decode_q4_k),
        BlockFormat("Q5_K", 256, 176, k_blocks.decode_q5_k),
        BlockFormat("Q6_K", 256, 210, k_blocks.decode_q6_k),
    )
}
FLOAT_FORMATS = tuple(name for name, one in FORMATS.items() if one.is_float)
ENCODABLE_FORMATS = tuple(name for name, one in FORMATS.items() if one.encode is not None)
"""What moei can pack a model into."""


def decode(name: str, raw: Bytes, shape: Sequence[int]) -> Floats:
    """The float32 values of a tensor of ``shape``. raw: its ``FORMATS[name].nbytes(shape)`` bytes, any shape."""
    form = FORMATS[name]
    blocks = raw.reshape(-1, form.block_nbytes)
    values = np.empty((len(blocks), form.block_size), np.float32)
    step = _CHUNK // form.block_size
    for at in range(0, len(blocks), step):
        values[at : at + step] = form.decode(blocks[at : at + step])
    return values.reshape(tuple(shape))


def transcode(source: str, raw: Bytes, target: str, tensor: str) -> Bytes:
    """Whole blocks of one format as blocks of another, [bytes] -> [bytes]; ``tensor`` is for the error's text.

    Raises: DamagedFileError for a weight that is no number or infinite, UnsupportedModelError for one that is
    larger than the scale of a block can express.
    """
    if source == target:
        return raw
    old, new = FORMATS[source], FORMATS[target]
    assert new.encode is not None, target
    blocks = raw.reshape(-1, old.block_nbytes)
    count = len(blocks) * old.block_size // new.block_size
    result = np.empty((count, new.block_nbytes), np.uint8)
    step = _CHUNK // new.block_size
    try:
        for at in range(0, count, step):
            first, last = (index * new.block_size // old.block_size for index in (at, min(at + step, count)))
            values = old.decode(blocks[first:last]).reshape(-1, new.block_size)
            result[at : at + step] = new.encode(values)
    except NotFiniteError:
        raise DamagedFileError(
            f"The weights of '{tensor}' cannot be packed: some are not finite numbers.",
            "NaN or infinity in a checkpoint means a damaged file or a failed training.",
            "Pull the model again, or look for another version of it.",
        ) from None
    except ScaleRangeError:
        raise UnsupportedModelError(
            f"The weights of '{tensor}' cannot be packed as {target}: some are too large.",
            "A block's scale is a 16-bit float, and theirs would overflow.",
            "Keep the model in its own format.",
        ) from None
    return result.reshape(-1)
