"""Arithmetic that comes out the same on every machine, whatever order its libraries sum in."""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRID = 2.0**-16
"""Sums of products of its multiples, of moderate size, are exact."""


def powers(base: float, last: int) -> NDArray[np.float64]:
    """``base`` to the powers 0 .. ``last``, by multiplying: ``pow`` rounds differently between machines."""
    return np.multiply.accumulate(np.array([1.0, *repeat(base, last)]))


def power(base: float, exponent: int) -> float:
    return math.prod(repeat(base, exponent))


def on_grid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """``values`` rounded to multiples of ``GRID``."""
    rounded: NDArray[np.float32] = np.rint(values * np.float32(1 / GRID)) * np.float32(GRID)
    return rounded


def solve(matrices: NDArray[Any], vectors: NDArray[Any]) -> NDArray[Any]:
    """x of ``matrices`` [n, f, f], symmetric and positive definite, times x = ``vectors`` [n, f].

    Gauss-Jordan, element by element (the order of LAPACK's operations is the machine's choice); no pivoting,
    which such matrices do not need.
    """
    system = np.concatenate([matrices, vectors[:, :, None]], axis=2)
    for pivot in range(matrices.shape[1]):
        system[:, pivot] /= system[:, pivot, pivot, None].copy()
        factors = system[:, :, pivot].copy()
        factors[:, pivot] = 0
        system -= factors[:, :, None] * system[:, pivot, None, :]
    return system[:, :, -1]
