"""GPU kernels on weights as they are stored: Q8_0, Q4_0 and MXFP4 in both layouts, and BF16. Needs ``triton``.

``few_rows``: many experts with few tokens each in one launch, decoding in registers: float32 products of the exact
values of the blocks. ``decode``: a matrix of blocks as floats, for products with many tokens by the GPU's matrix units.

Triton comes with CUDA builds of torch; with TRITON_INTERPRET=1 in the environment, set before this module is
imported, the kernels run on a processor, which is how they are tested. Tensors are torch's, as arguments only.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

from moei_core.quant.layouts import ROWS16

FORMATS = {"BF16": 0, "Q8_0": 1, "Q4_0": 2, "MXFP4": 3}
"""What ``few_rows`` takes, and the number by which a kernel knows it."""

FEW_TOKENS = 16
"""Tokens of an expert up to which reading its weights once for each is no slower than decoding them first."""

_ROWS = 16
"""Rows that one program computes: a group of the layout ``rows16``."""
_COLUMNS = 32
"""Columns of one step: a block."""


def usable(tensor: Any) -> bool:
    """Whether kernels can run on ``tensor``: on a GPU, or anywhere when they are interpreted."""
    return bool(tensor.is_cuda) or os.environ.get("TRITON_INTERPRET") == "1"


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix [out, in] of format ``name`` can be multiplied by ``few_rows``."""
    return name in FORMATS and len(shape) == 2 and shape[0] % _ROWS == 0 and shape[1] % _COLUMNS == 0


@triton.jit  # type: ignore[untyped-decorator]
def _weights(base, row, column, columns, FORMAT: tl.constexpr, LAYOUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [row, row + 16) and columns [column, column + 32) of a matrix, float32 [16, 32]. base: its first byte."""
    ROWS: tl.constexpr = 16
    COLUMNS: tl.constexpr = 32
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    if FORMAT == 0:
        at = ((row + i)[:, None] * columns + (column + j)[None, :]) * 2
        low = tl.load(base + at).to(tl.uint32)
        high = tl.load(base + at + 1).to(tl.uint32)
        weights = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
    else:
        SCALE: tl.constexpr = 1 if FORMAT == 3 else 2
        NBYTES: tl.constexpr = SCALE + (32 if FORMAT == 1 else 16)
        blocks = columns // COLUMNS
        # The byte of a quant within its block: two columns share one in Q4_0 and MXFP4.
        k = j if FORMAT == 1 else j % 16
        if LAYOUT == 0:
            block = ((row + i) * blocks + column // COLUMNS) * NBYTES
            scale_at = block
            at = block[:, None] + SCALE + k[None, :]
        else:
            tile = (row // ROWS * blocks + column // COLUMNS) * ROWS * NBYTES
            scale_at = tile + SCALE * i
            at = tile + SCALE * ROWS + (k // 4 * 4 * ROWS + k % 4)[None, :] + (4 * i)[:, None]
        # Byte by byte: a file may place a matrix anywhere.
        if FORMAT == 3:
            # 2^(exponent - 128), for doubled values; the first two exponents make subnormal floats.
            exponent = tl.load(base + scale_at).to(tl.int32)
            bits = tl.where(exponent < 2, 0x200000 << (exponent & 1), (exponent - 1) << 23)
            scale = bits.to(tl.float32, bitcast=True)
        else:
            low = tl.load(base + scale_at).to(tl.uint16)
            high = tl.load(base + scale_at + 1).to(tl.uint16)
            scale = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        raw = tl.load(base + at)
        if FORMAT == 1:
            quants = raw.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            nibble = tl.where((j < 16)[None, :], raw & 15, raw >> 4)
            if FORMAT == 3:
                code = (nibble & 7).to(tl.int32)
                size = tl.where(code < 5, code, tl.where(code < 7, 2 * code - 4, 12)).to(tl.float32)
                quants = tl.where(nibble > 7, -size, size)
            else:
                quants = nibble.to(tl.float32) - 8.0
        weights = quants * scale[:, None]
    return weights


@triton.jit  # type: ignore[untyped-decorator]
def _few_rows(  # type: ignore[no-untyped-def]
    memory, offsets, inputs, rows, outputs, columns, height, FORMAT: tl.constexpr, LAYOUT: tl.constexpr
):
    """Program (pair, group): 16 outputs of one expert for one token, summed over columns in ascending order."""
    pair = tl.program_id(0)
    group = tl.program_id(1)
    base = memory + tl.load(offsets + pair)
    given = inputs + tl.load(rows + pair) * columns
    total = tl.zeros((16,), tl.float32)
    for column in range(0, columns, 32):
        weights = _weights(base, group * 16, column, columns, FORMAT, LAYOUT)
        x = tl.load(given + column + tl.arange(0, 32))
        total += tl.sum(weights * x[None, :], axis=1)
    tl.store(outputs + pair * height + group * 16 + tl.arange(0, 16), total)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(memory, outputs, columns, FORMAT: tl.constexpr, LAYOUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (group, block column): a tile of 16 x 32 weights."""
    row = tl.program_id(0) * 16
    column = tl.program_id(1) * 32
    weights = _weights(memory, row, column, columns, FORMAT, LAYOUT)
    at = (row + tl.arange(0, 16))[:, None] * columns + (column + tl.arange(0, 32))[None, :]
    if outputs.dtype.element_ty == tl.bfloat16:
        # To nearest, ties to even: what a GPU does by itself, and the interpreter does not.
        bits = weights.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(outputs + at, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True))
    else:
        tl.store(outputs + at, weights.to(outputs.dtype.element_ty))


def few_rows(
    name: str, layout: str, shape: tuple[int, ...], memory: Any, offsets: Any, inputs: Any, rows: Any
) -> Any:
    """The products of pairs of an expert's matrix and a token, float32 [pairs, out].

    name, layout, shape [out, in]: of all matrices, which ``takes``. memory: uint8, in which matrix ``p`` begins at
    ``offsets[p]`` (int64 [pairs]). inputs: float32 [tokens, in], contiguous; rows: int64 [pairs], the token of each.
    A pair's result depends on nothing but its own matrix and token.
    """
    outputs = inputs.new_empty((len(rows), shape[0]))
    _few_rows[len(rows), shape[0] // _ROWS](
        memory, offsets, inputs, rows, outputs, shape[1], shape[0], FORMATS[name], int(layout == ROWS16)
    )
    return outputs


def decode(name: str, layout: str, shape: tuple[int, ...], raw: Any, outputs: Any) -> Any:
    """Write the weights of a matrix that ``takes`` to ``outputs`` [out, in], rounded to its type, and return it.

    raw: its bytes, uint8.
    """
    _decode[shape[0] // _ROWS, shape[1] // _COLUMNS](
        raw, outputs, shape[1], FORMATS[name], int(layout == ROWS16)
    )
    return outputs
