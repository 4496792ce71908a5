"""FP8 as DeepSeek-V3 was published, and others since: E4M3 weights, and a scale for each square of a matrix.

A weight is its E4M3 value times the scale of its square, usually of 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section
3.3). Such checkpoints are read to be packed; nothing computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

F8_E4M3 = "F8_E4M3"
"""safetensors' name of it."""
SCALES_SUFFIX = "_scale_inv"
"""What the name of a matrix's scales has after that of its weights."""


def _e4m3() -> NDArray[np.float32]:
    """The value of each byte: a sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa; no infinities (OCP 8-bit
    Floating Point 1.0, section 5.2)."""
    bits = np.arange(128)
    exponents, mantissas = bits >> 3, bits & 7
    values = np.where(exponents == 0, mantissas / 8 * 2.0**-6, (1 + mantissas / 8) * 2.0 ** (exponents - 7))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_VALUES = _e4m3()


def decode(
    raw: NDArray[np.uint8], scales: NDArray[np.float32], shape: Sequence[int], square: tuple[int, int]
) -> NDArray[np.float32]:
    """Weights of ``shape`` [rows, columns] from their bytes. scales: [rows / square[0], columns / square[1]], both
    rounded up: the last squares may be smaller."""
    rows, columns = shape
    values = _VALUES[raw.reshape(rows, columns)]
    wide = np.repeat(scales, square[1], axis=1)[:, :columns]
    for first in range(0, rows, square[0]):
        values[first : first + square[0]] *= wide[first // square[0]]
    return values
