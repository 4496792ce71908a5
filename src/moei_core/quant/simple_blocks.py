"""Blocks of 32 weights with one scale: Q8_0, Q4_0 and MXFP4, vectorised over blocks.

Bytes and values are those of GGUF (the ``gguf`` package is the reference in the tests):

- Q8_0, 34 bytes: scale d as float16, then 32 int8 q; weight = d q.
- Q4_0, 18 bytes: scale d as float16, then 16 bytes; byte j holds weight j in its low and weight j + 16 in its high
  nibble; weight = d (q - 8).
- MXFP4, 17 bytes: an exponent byte e, then nibbles as in Q4_0 that index the FP4 values doubled; weight =
  2^(e - 128) times that (OCP Microscaling Formats 1.0, section 5.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_FP4_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


class NotFiniteError(ValueError):
    """A weight is NaN or infinite."""


class ScaleRangeError(ValueError):
    """A block's scale exceeds the largest float16."""


def _scales(extreme: Floats, divisor: int) -> tuple[Bytes, Floats]:
    """The float16 bytes of ``extreme / divisor`` [n, 2], and the float32 inverse [n, 1] to multiply weights by.

    Raises: NotFiniteError, ScaleRangeError.
    """
    if not np.isfinite(extreme).all():
        raise NotFiniteError
    scale = extreme / np.float32(divisor)
    with np.errstate(over="ignore", divide="ignore"):
        half = scale.astype(np.float16)
        inverse = np.float32(1) / scale
    if not np.isfinite(half).all():
        raise ScaleRangeError
    # A block of zeros, and one so small that its scale is zero as float16 anyway: every quant may be zero.
    inverse[~np.isfinite(inverse)] = 0
    return half.view(np.uint8), inverse


def encode_q8_0(weights: Floats) -> Bytes:
    """[n, 32] -> [n, 34]. Raises: NotFiniteError, ScaleRangeError."""
    halves, inverse = _scales(np.abs(weights).max(axis=1, keepdims=True), 127)
    quants = weights * inverse
    # Half away from zero, as C's roundf. Adding one half would round 0.49999997 up: take the fraction instead.
    whole = np.trunc(quants)
    quants -= whole
    quants += quants
    np.trunc(quants, out=quants)
    quants += whole
    return np.concatenate([halves, quants.astype(np.int8).view(np.uint8)], axis=1)


def decode_q8_0(blocks: Bytes) -> Floats:
    """[n, 34] -> [n, 32]."""
    return half_at(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def encode_q4_0(weights: Floats) -> Bytes:
    """[n, 32] -> [n, 18]. The weight of the largest magnitude becomes quant 0, which is -8 scales.

    Raises: NotFiniteError, ScaleRangeError.
    """
    place = np.abs(weights).argmax(axis=1)[:, None]
    halves, inverse = _scales(np.take_along_axis(weights, place, axis=1), -8)
    shifted = weights * inverse
    shifted += np.float32(8.5)
    quants = shifted.astype(np.uint8)
    np.minimum(quants, np.uint8(15), out=quants)
    return np.concatenate([halves, quants[:, :16] | (quants[:, 16:] << np.uint8(4))], axis=1)


def decode_q4_0(blocks: Bytes) -> Floats:
    """[n, 18] -> [n, 32]."""
    return half_at(blocks, 0) * (nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))


def decode_mxfp4(blocks: Bytes) -> Floats:
    """[n, 17] -> [n, 32]."""
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return np.asarray(scale * _FP4_DOUBLED[nibbles(blocks[:, 1:])], np.float32)


def nibbles(packed: Bytes) -> Bytes:
    """[n, b] -> [n, 2 b]: all low nibbles, then all high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def half_at(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
