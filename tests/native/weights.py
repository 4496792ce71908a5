"""Stored weights for the kernels' tests, encoded and decoded by the ``gguf`` package, and products in float64."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from moei_core.quant import native

Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]

UNIT = 2.0**-24
"""Half a unit in the last place of a float32 of size 1."""

FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
INTEGER_FORMATS = ("Q8_0", "Q4_0", "MXFP4")


def block_size(fmt: str) -> int:
    """Columns must be a multiple of this."""
    return {"Q8_0": 32, "Q4_0": 32, "MXFP4": 32, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}.get(fmt, 1)


def stored_weights(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> Bytes:
    """Random weights of about unit size, row after row; for formats that are only read, valid random blocks."""
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    if fmt == "F32":
        return values.view(np.uint8).reshape(-1)
    if fmt == "F16":
        return values.astype(np.float16).view(np.uint8).reshape(-1)
    if fmt == "BF16":
        return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8).reshape(-1)
    if fmt in ("Q8_0", "Q4_0"):
        return quants.quantize(values, GGMLQuantizationType[fmt]).reshape(-1)
    nbytes = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "MXFP4": 17}[fmt]
    blocks = rng.integers(0, 256, (rows * cols // block_size(fmt), nbytes), np.uint8)
    if fmt == "MXFP4":
        blocks[:, 0] = rng.integers(120, 130, len(blocks))
    else:
        scales = rng.uniform(-0.05, 0.05, (len(blocks), 2)).astype(np.float16).view(np.uint8)
        at = 208 if fmt == "Q6_K" else 0
        blocks[:, at : at + 4] = scales[:, : nbytes - at]
    return blocks.reshape(-1)


def decoded(fmt: str, stored: Bytes, rows: int, cols: int) -> Doubles:
    """The values that ``stored`` means, by ``gguf``, [rows, cols]."""
    if fmt == "F32":
        values = stored.view(np.float32)
    elif fmt == "F16":
        values = stored.view(np.float16)
    elif fmt == "BF16":
        values = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = quants.dequantize(stored.reshape(rows, -1), GGMLQuantizationType[fmt])
    return np.asarray(values, np.float64).reshape(rows, cols)


def in_order(fmt: str, stored: Bytes, rows: int, cols: int, order: str) -> Bytes:
    """Row-ordered weights in another order of storage."""
    if order == "rows16":
        return native.to_rows16(fmt, rows, cols, stored)
    if order == "transposed":
        return np.ascontiguousarray(stored.reshape(rows, cols, -1).swapaxes(0, 1)).reshape(-1)
    return stored


def orders(fmt: str) -> tuple[str, ...]:
    """Every order that a kernel knows for the format."""
    if fmt in INTEGER_FORMATS:
        return ("plain", "rows16")
    return ("plain", "transposed") if block_size(fmt) == 1 else ("plain",)


def product_bound(fmt: str, weights: Doubles, x: Doubles, x_error: Doubles | float = 0.0) -> Doubles:
    """What a product [tokens, rows] may differ by from the exact one of the true inputs, contract E3.

    ``x`` [tokens, cols] is what the kernel gets, ``x_error`` how far that is from the truth. Integer formats add half
    a quantisation step for each weight: half of the block's largest activation / 127, for Q8_0 / (127 * 128); every
    addition rounds once.
    """
    sizes = np.abs(weights)
    error = np.broadcast_to(np.asarray(x_error, np.float64), x.shape)
    if fmt in INTEGER_FORMATS:
        largest = np.abs(x).reshape(len(x), -1, 32).max(axis=-1)
        # Finding a step's number rounds too, by up to three units in the last place of the number.
        steps, least = (127 * 128, 2e-34) if fmt == "Q8_0" else (127, 1.5e-36)
        error = error + np.repeat(largest, 32, axis=-1) * (0.5 / steps + 3 * UNIT) + least
    rounding = (weights.shape[1] + 8) * UNIT * ((np.abs(x) + error) @ sizes.T)
    return np.asarray(error @ sizes.T + rounding + 1e-37)


def run_linear(fmt: str, stored: Bytes, rows: int, x: NDArray[np.float32], order: str) -> NDArray[np.float32]:
    """One matrix product by the kernels, [tokens, rows]."""
    kept = in_order(fmt, stored, rows, x.shape[1], order)
    out = np.full((len(x), rows), np.nan, np.float32)
    native.linear(native.Matrix(fmt, rows, x.shape[1], order), kept.ctypes.data, x, out)
    return out
