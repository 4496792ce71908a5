"""Decoding of GGUF's K blocks: 256 weights in sub-blocks, each with a small integer scale of its own.

With d (and for Q4_K and Q5_K dmin) a float16 of the whole block, the weight of quant q in sub-block j is
``d scale_j q - dmin min_j`` (Q4_K, Q5_K: 8 sub-blocks of 32) or ``d scale_j (q - 32)`` (Q6_K: 16 of 16). Blocks in
files that others made; the ``gguf`` package is the reference in the tests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moei_core.quant.simple_blocks import half_at, nibbles

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def _scales_and_mins(packed: Bytes) -> tuple[Floats, Floats]:
    """The 6-bit scales and minima of 8 sub-blocks from 12 bytes: [n, 12] -> [n, 8, 1] twice.

    Bytes 0-3 and 4-7 hold the low six bits of the first four scales and minima, bytes 8-11 the low four bits of
    the others; their upper two bits are the upper two of bytes 0-3 (scales) and 4-7 (minima).
    """
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    six, two = np.uint8(63), np.uint8(6)
    scales = np.concatenate([low & six, (high & np.uint8(15)) | ((low >> two) << np.uint8(4))], axis=1)
    mins = np.concatenate([mid & six, (high >> np.uint8(4)) | ((mid >> two) << np.uint8(4))], axis=1)
    return scales.astype(np.float32)[:, :, None], mins.astype(np.float32)[:, :, None]


def _with_minima(blocks: Bytes, quants: Bytes) -> Floats:
    """Apply scales and minima. blocks: [n, >= 16], its header; quants: [n, 8, 32]. Returns [n, 256]."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scale, shift = half_at(blocks, 0)[:, :, None] * scales, half_at(blocks, 2)[:, :, None] * mins
    return np.asarray(scale * quants.astype(np.float32) - shift, np.float32).reshape(-1, 256)


def _sub_blocks(packed: Bytes) -> Bytes:
    """[n, 128] -> [n, 8, 32]: each 32 bytes hold one sub-block in low and the next in high nibbles."""
    return nibbles(packed.reshape(-1, 32)).reshape(-1, 8, 32)


def decode_q4_k(blocks: Bytes) -> Floats:
    """[n, 144] -> [n, 256]: d, dmin, 12 bytes of scales, 128 of quants."""
    return _with_minima(blocks, _sub_blocks(blocks[:, 16:]))


def decode_q5_k(blocks: Bytes) -> Floats:
    """[n, 176] -> [n, 256]: d, dmin, 12 bytes of scales, 32 of fifth bits, 128 of low nibbles."""
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    # Bit j of byte i is the fifth bit of weight i of sub-block j.
    fifth = (blocks[:, None, 16:48] >> shifts) & np.uint8(1)
    return _with_minima(blocks, _sub_blocks(blocks[:, 48:]) | (fifth << np.uint8(4)))


def decode_q6_k(blocks: Bytes) -> Floats:
    """[n, 210] -> [n, 256]: 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales, d."""
    # Two halves of 128 weights: 64 bytes give the low nibbles of weights 0-63 and then of 64-127.
    low = nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    quants = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    scale = half_at(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return np.asarray(scale[:, :, None] * quants.reshape(-1, 16, 16), np.float32).reshape(-1, 256)
