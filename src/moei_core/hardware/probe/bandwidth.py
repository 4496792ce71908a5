"""How fast memory can be read: the ceiling of every decode step whose experts are resident."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap

import numpy as np
from numpy.typing import NDArray

from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.profile import Figure
from moei_core.quant import native

Words = NDArray[np.uint64]

FILLER = 0x3C
"""Every byte of the buffer: as bfloat16, float16 or float32 an ordinary number, never a slow denormal."""


def make_buffer(nbytes: int) -> Words:
    """``nbytes`` (rounded down to words) that really are in memory, in pages as small as those of weights and slots.

    (numpy would ask for large ones, in which products are a fifth faster.)
    """
    words = np.frombuffer(mmap(-1, max(nbytes, 1 << 20) // 8 * 8), np.uint64)
    words.view(np.uint8)[:] = FILLER
    return words


_LOOPS: tuple[Callable[[Words], object], ...] = (np.bitwise_or.reduce, np.add.reduce)


def read_bandwidth(buffer: Words, threads: int, allowance: Allowance) -> Figure:
    """Bytes a second with which ``threads`` threads read ``buffer``, each its own part of it.

    Each sample is the best of several vector loops: the native kernels' own where they were built, else numpy's
    reductions, which release the interpreter's lock.
    """
    if native.available():
        before = native.num_threads()
        native.set_num_threads(threads)
        try:
            return _samples(lambda: native.read_bandwidth(buffer.view(np.uint8)), allowance)
        finally:
            native.set_num_threads(before)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        return _samples(lambda: max(_one_pass(pool, loop, parts) for loop in _LOOPS), allowance)


def _samples(measure: Callable[[], float], allowance: Allowance) -> Figure:
    samples: list[float] = []
    while len(samples) < 3 or not allowance.over:
        samples.append(measure())
    return Figure.of(samples)


def _one_pass(pool: ThreadPoolExecutor, loop: Callable[[Words], object], parts: list[Words]) -> float:
    started = time.perf_counter()
    for _ in pool.map(loop, parts):
        pass
    return sum(part.nbytes for part in parts) / (time.perf_counter() - started)
