"""GPU kernels on weights as they are stored: Q8_0, Q4_0 and MXFP4 in both layouts, and BF16. Needs ``triton``.

``few_rows``: many experts with few tokens each in one launch, decoding in registers: float32 products of the exact
values of the blocks. ``sum_rows``: what a token's experts gave, in their order. ``decode``: a matrix of blocks as
floats, for products with many tokens by the GPU's matrix units.

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

PAIR_STARTS = 3
"""``pairs``, int64 [3 + matrices, pairs], says all of some pairs of an expert and a token: the token; the row that its
result goes to; the bits of its float32 weight; then, from this line on, where each of the expert's matrices begins."""

ALIGNED = 16
"""Bytes at whose multiples a matrix must begin for the loads of several numbers at once."""

_ROWS = 16
"""Rows that one program computes: a group of the layout ``rows16``."""
_COLUMNS = 32
"""Columns of a block."""
_WIDTHS = {"BF16": 256, "Q8_0": 256, "Q4_0": 512, "MXFP4": 512}
"""Columns of one step, at most: enough to be read at once that the memory is kept busy."""
_SUMMED = 256


def usable(tensor: Any) -> bool:
    """Whether kernels can run on ``tensor``: on a GPU, or anywhere when they are interpreted."""
    return bool(tensor.is_cuda) or os.environ.get("TRITON_INTERPRET") == "1"


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix [out, in] of format ``name`` can be multiplied by ``few_rows``."""
    return name in FORMATS and len(shape) == 2 and shape[0] % _ROWS == 0 and shape[1] % _COLUMNS == 0


@triton.jit
def _mxfp4(nibble):  # type: ignore[no-untyped-def]
    """Twice the values of FP4 codes, float32: exponent and fraction are a float's but for the exponent's bias."""
    code = nibble.to(tl.uint32)
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 1.7014118346046923e38


@triton.jit
def _exponent_scale(exponent):  # type: ignore[no-untyped-def]
    """2^(exponent - 128), for doubled values; the first two exponents make subnormal floats."""
    bits = tl.where(exponent < 2, 0x200000 << (exponent & 1), (exponent - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


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
            scale = _exponent_scale(tl.load(base + scale_at).to(tl.int32))
        else:
            low = tl.load(base + scale_at).to(tl.uint16)
            high = tl.load(base + scale_at + 1).to(tl.uint16)
            scale = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        raw = tl.load(base + at)
        if FORMAT == 1:
            quants = raw.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            nibble = tl.where((j < 16)[None, :], raw & 15, raw >> 4)
            quants = _mxfp4(nibble) if FORMAT == 3 else nibble.to(tl.float32) - 8.0
        weights = quants * scale[:, None]
    return weights


@triton.jit  # type: ignore[untyped-decorator]
def _floats(base, group, given, columns, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of 16 rows of BF16, float32 [16]."""
    numbers = base.to(tl.pointer_type(tl.uint16))
    j = tl.arange(0, WIDTH)
    at = (group * 16 + tl.arange(0, 16))[:, None] * columns + j[None, :]
    total = tl.zeros((16, WIDTH), tl.float32)
    for column in range(0, columns, WIDTH):
        raw = tl.load(numbers + column + at).to(tl.uint32)
        total += (raw << 16).to(tl.float32, bitcast=True) * tl.load(given + column + j)[None, :]
    return tl.sum(total, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _tiles(base, group, given, columns, FORMAT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of a group of the layout ``rows16``, float32 [16]: pieces of four bytes at once."""
    SCALE: tl.constexpr = 1 if FORMAT == 3 else 2
    # Of a tile, in words: all of it, its scales, its pieces.
    TILE: tl.constexpr = 4 * (SCALE + (32 if FORMAT == 1 else 16))
    SCALES: tl.constexpr = 4 * SCALE
    PIECES: tl.constexpr = 8 if FORMAT == 1 else 4
    COUNT: tl.constexpr = WIDTH // 32 * PIECES
    i = tl.arange(0, 16)
    piece = tl.arange(0, COUNT)
    tile, within = piece // PIECES, piece % PIECES
    first = group * (columns // 32)
    words = base.to(tl.pointer_type(tl.uint32))
    word_at = (tile * TILE + within * 16)[:, None] + (SCALES + i)[None, :]
    scale_at = (tile * (TILE * 4 // SCALE))[:, None] + i[None, :]
    given_at = tile * 32 + within * 4
    total = tl.zeros((COUNT, 16), tl.float32)
    for column in range(0, columns, WIDTH):
        block = first + column // 32
        word = tl.load(words + block * TILE + word_at)
        x = given + column + given_at
        if FORMAT == 3:
            scale = _exponent_scale(tl.load(base + block * (TILE * 4) + scale_at).to(tl.int32))
        else:
            halves = base.to(tl.pointer_type(tl.float16))
            scale = tl.load(halves + block * (TILE * 2) + scale_at).to(tl.float32)
        part = tl.zeros((COUNT, 16), tl.float32)
        for byte in tl.static_range(4):
            quant = (word >> (8 * byte)) & 0xFF
            if FORMAT == 1:
                # As the last bits of a float whose unit is 1: cheaper than a conversion.
                value = ((quant ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
                part += value * tl.load(x + byte)[:, None]
            else:
                low, high = quant & 15, quant >> 4
                if FORMAT == 3:
                    low_value, high_value = _mxfp4(low), _mxfp4(high)
                else:
                    low_value = (low | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
                    high_value = (high | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
                part += low_value * tl.load(x + byte)[:, None]
                part += high_value * tl.load(x + byte + 16)[:, None]
        total += part * scale
    return tl.sum(total, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(values, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 as ``TYPE``: to nearest, ties to even, which a GPU does by itself and the interpreter does not."""
    if tl.bfloat16 == TYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where(values == values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        found = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        found = values.to(TYPE)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _few_rows(  # type: ignore[no-untyped-def]
    memory,
    pairs,
    inputs,
    outputs,
    columns,
    height,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIRST: tl.constexpr,
    INTO: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (pair, group, matrix): 16 outputs of one expert's matrix for one token.

    The order of the sum follows from the constants alone. FIRST: the line of ``pairs`` with the first matrix. INTO:
    whether inputs are by pair, and outputs weighted and by row.
    """
    pair, group, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count, matrices = tl.num_programs(0), tl.num_programs(2)
    start = tl.load(pairs + (FIRST + matrix) * count + pair)
    if IS_ALIGNED:
        start = tl.multiple_of(start, 16)
    base = memory + start
    token = pair.to(tl.int64) if INTO else tl.load(pairs + pair)
    given = inputs + token * columns
    if FORMAT == 0:
        total = _floats(base, group, given, columns, WIDTH)
    elif LAYOUT == 1 and IS_ALIGNED:
        total = _tiles(base, group, given, columns, FORMAT, WIDTH)
    else:
        total = tl.zeros((16,), tl.float32)
        for column in range(0, columns, 32):
            weights = _weights(base, group * 16, column, columns, FORMAT, LAYOUT)
            x = tl.load(given + column + tl.arange(0, 32))
            total += tl.sum(weights * x[None, :], axis=1)
    if INTO:
        row = tl.load(pairs + count + pair)
        weight = tl.load(pairs + 2 * count + pair).to(tl.int32).to(tl.float32, bitcast=True)
        total = total * weight
        place = row * height
    else:
        place = (pair.to(tl.int64) * matrices + matrix) * height
    tl.store(outputs + place + group * 16 + tl.arange(0, 16), total)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(rows, totals, width, COUNT: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (token, step): ``STEP`` columns of a token's ``COUNT`` rows, added one after the other."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * STEP + tl.arange(0, STEP)
    inside = at < width
    total = tl.load(rows + token * COUNT * width + at, mask=inside)
    for row in tl.static_range(1, COUNT):
        total += tl.load(rows + (token * COUNT + row) * width + at, mask=inside)
    tl.store(totals + token * width + at, _rounded(total, totals.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(memory, outputs, columns, FORMAT: tl.constexpr, LAYOUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (group, block column): a tile of 16 x 32 weights."""
    row = tl.program_id(0) * 16
    column = tl.program_id(1) * 32
    weights = _weights(memory, row, column, columns, FORMAT, LAYOUT)
    at = (row + tl.arange(0, 16))[:, None] * columns + (column + tl.arange(0, 32))[None, :]
    tl.store(outputs + at, _rounded(weights, outputs.dtype.element_ty))


def few_rows(
    name: str,
    layout: str,
    shape: tuple[int, ...],
    memory: Any,
    pairs: Any,
    first: int,
    inputs: Any,
    matrices: int = 1,
    outputs: Any = None,
    aligned: bool = False,
) -> Any:
    """Products of experts' matrices and tokens, one for each of ``pairs``.

    name, layout, shape [out, in]: of all matrices, which ``takes``. memory: uint8, in which they begin; BF16 at even
    places. first, matrices: which of each expert's, by line of ``pairs``; all multiplied by the same. aligned: all
    begin at multiples of ``ALIGNED``, as ``memory`` does.

    Without outputs: inputs float32 [tokens, in], contiguous; returns float32 [pairs, matrices * out]. With outputs,
    float32 [rows, out]: inputs [pairs, in]; the products, times their weights, are written to their rows. A pair's
    result depends on nothing but its own matrix and token, and ``aligned``.
    """
    count, into = pairs.shape[1], outputs is not None
    if outputs is None:
        outputs = inputs.new_empty((count, matrices * shape[0]))
    width = _WIDTHS[name]
    while shape[1] % width:
        width //= 2
    _few_rows[count, shape[0] // _ROWS, matrices](
        memory,
        pairs,
        inputs,
        outputs,
        shape[1],
        shape[0],
        FORMATS[name],
        int(layout == ROWS16),
        first,
        into,
        aligned,
        width,
    )
    return outputs


def sum_rows(rows: Any, per_token: int, totals: Any) -> Any:
    """Write the sums of each token's ``per_token`` rows, in their order, to ``totals`` [tokens, width] and return it.

    rows: float32 [tokens * per_token, width], contiguous.
    """
    tokens, width = totals.shape
    _sum_rows[tokens, triton.cdiv(width, _SUMMED)](rows, totals, width, per_token, _SUMMED)
    return totals


def decode(name: str, layout: str, shape: tuple[int, ...], raw: Any, outputs: Any) -> Any:
    """Write the weights of a matrix that ``takes`` to ``outputs`` [out, in], rounded to its type, and return it.

    raw: its bytes, uint8.
    """
    _decode[shape[0] // _ROWS, shape[1] // _COLUMNS](
        raw, outputs, shape[1], FORMATS[name], int(layout == ROWS16)
    )
    return outputs
