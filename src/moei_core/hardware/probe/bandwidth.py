"""How fast memory can be read: the ceiling of every decode step whose experts are resident."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from moei_core.hardware.profile import Figure

Words = NDArray[np.uint64]

FILLER = 0x3C
"""Every byte of the buffer: as bfloat16, float16 or float32 an ordinary number, never a slow denormal."""


def make_buffer(nbytes: int) -> Words:
    """``nbytes`` (rounded down to words) that really are in memory."""
    words = np.empty(max(nbytes, 1 << 20) // 8, np.uint64)
    words.view(np.uint8)[:] = FILLER
    return words


_LOOPS: tuple[Callable[[Words], object], ...] = (np.bitwise_or.reduce, np.add.reduce)


def read_bandwidth(buffer: Words, threads: int, seconds: float) -> Figure:
    """Bytes a second with which ``threads`` threads read ``buffer``, each its own part of it, once a sample.

    Each sample is the better of several vector loops (numpy's reductions release the interpreter's lock).
    """
    parts = np.array_split(buffer, threads)
    samples: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while len(samples) < 3 or time.perf_counter() < end:
            best = 0.0
            for loop in _LOOPS:
                started = time.perf_counter()
                for _ in pool.map(loop, parts):
                    pass
                best = max(best, buffer.nbytes / (time.perf_counter() - started))
            samples.append(best)
    return Figure.of(samples)
