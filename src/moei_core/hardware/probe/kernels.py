"""How fast matrices are multiplied, by format and by number of rows, from memory.

They stand for the dense part: of float weights the native kernels multiply single rows and torch the rest, of
blocks the native kernels all. What experts take is measured by ``moei_core.engine.expert_probe``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.bandwidth import Words
from moei_core.hardware.profile import Figure, KernelSpeed
from moei_core.quant import native

SHAPES = ((768, 2048), (4096, 4096), (14336, 4096))
"""Output and input width: one matrix of an expert of Qwen3-30B-A3B, a square one, one of Mixtral-8x7B."""
ROWS = (1, 8, 32, 128, 256)
_LEAST = 3
_NATIVE = {"q8_0": "rows16", "q4_0": "rows16", "mxfp4": "rows16"}
"""Formats that the native kernels compute, and the order in which a slot holds them."""
_NATIVE_ROWS = (1, 16, 128)

_BETWEEN_S = 150e-6
"""Seconds between two products, as Python needs in a model: the other threads have gone to sleep and must be woken."""

Product = Callable[[int], None]
"""Multiplies once with the matrix at the given number; numbers count round the buffer."""


def count_cells() -> int:
    """How many settings are measured."""
    return sum(1 for _ in _cells())


def _cells() -> Iterator[tuple[str, tuple[int, int], int]]:
    for shape in SHAPES:
        for rows in ROWS:
            yield "bf16", shape, rows
        yield "f32", shape, 1
        yield "f32", shape, 128
        if native.available():
            for name in _NATIVE:
                for rows in _NATIVE_ROWS:
                    yield name, shape, rows


def probe_kernels(
    buffer: Words, threads: int, allowance: Allowance, progress: Callable[[], None] = lambda: None
) -> list[KernelSpeed]:
    """Products with matrices that lie one after the other in ``buffer``, so that none is in a cache.

    allowance: of all. progress: called after each setting. A matrix that does not fit the buffer is left out.
    """
    import torch

    before, native_before = torch.get_num_threads(), native.num_threads() if native.available() else 0
    torch.set_num_threads(threads)
    if native.available():
        native.set_num_threads(threads)
    try:
        found = []
        for number, (name, shape, rows) in enumerate(_cells()):
            make = _native_cell if name in _NATIVE else _float_cell
            share = allowance.part(1 / (count_cells() - number))
            cell = make(buffer, name, shape, rows, threads, share)
            if cell is not None:
                found.append(cell)
            progress()
        return found
    finally:
        torch.set_num_threads(before)
        if native.available():
            native.set_num_threads(native_before)


def _float_cell(
    buffer: Words, name: str, shape: tuple[int, int], rows: int, threads: int, allowance: Allowance
) -> KernelSpeed | None:
    import torch

    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[name]
    weights = torch.from_numpy(buffer.view("uint8")).view(dtype)
    items = shape[0] * shape[1]
    count = len(weights) // items
    if count == 0:
        return None
    inputs = torch.full((rows, shape[1]), 0.01, dtype=dtype)
    outputs = torch.empty((rows, shape[0]), dtype=dtype)
    # As in decoding: single rows of float weights are the native kernels'.
    in_torch = rows > 1 or not native.available()
    matrix = None if in_torch else native.Matrix(name.upper(), *shape)

    def product(number: int) -> None:
        start = number % count * items
        weight = weights[start : start + items].view(shape)
        if matrix is None:
            torch.nn.functional.linear(inputs, weight)
        else:
            kernel = native.Linear(matrix, weight.data_ptr())
            kernel(name.upper(), inputs.data_ptr(), rows, outputs.data_ptr())

    kernel_name = "torch" if in_torch else "native"
    with torch.inference_mode():
        return KernelSpeed(
            name, kernel_name, items * dtype.itemsize, rows, threads, _timed(product, allowance)
        )


def _native_cell(
    buffer: Words, name: str, shape: tuple[int, int], rows: int, threads: int, allowance: Allowance
) -> KernelSpeed | None:
    matrix = native.Matrix(name.upper(), *shape, _NATIVE[name])
    count = buffer.nbytes // matrix.nbytes
    if count == 0:
        return None
    inputs = np.full((rows, shape[1]), 0.01, np.float32)
    outputs = np.empty((rows, shape[0]), np.float32)

    def product(number: int) -> None:
        address = buffer.ctypes.data + number % count * matrix.nbytes
        native.linear(matrix, address, inputs, outputs)

    return KernelSpeed(name, "native", matrix.nbytes, rows, threads, _timed(product, allowance))


def _timed(product: Product, allowance: Allowance) -> Figure:
    product(0)  # the first one pays for set-up
    samples: list[float] = []
    while len(samples) < _LEAST or not allowance.over:
        rested = time.perf_counter() + _BETWEEN_S
        while time.perf_counter() < rested:
            pass
        started = time.perf_counter()
        product(len(samples) + 1)
        samples.append(time.perf_counter() - started)
    return Figure.of(samples)
