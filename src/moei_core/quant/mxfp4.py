"""MXFP4 as checkpoints publish it, and into the blocks of ``moei_core.quant.formats``.

Published (openai/gpt-oss; ``convert_moe_packed_tensors`` of transformers is the reference in the tests) is a matrix as
two tensors: ``blocks`` uint8 [rows, columns / 32, 16], byte j of a block with weight 2 j in its low and 2 j + 1 in its
high nibble, and ``scales`` uint8 [rows, columns / 32], exponents. Ours are those of GGUF: the scale before its block,
byte j with weights j and j + 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moei_core.quant import native
from moei_core.quant.layouts import to_layout

Bytes = NDArray[np.uint8]

MXFP4 = "MXFP4"
"""Its name in ``moei_core.quant.formats``."""
BLOCK, BLOCK_NBYTES = 32, 16
"""Weights of a block, and bytes of it without its scale."""
NOT_A_NUMBER = 255
"""The exponent that means so (OCP Microscaling Formats 1.0, section 5.4.1)."""


def join(
    slot: Bytes, shape: Sequence[int], layout: str, scales_at: int, blocks_at: int, destination: int
) -> None:
    """Make blocks in ``layout`` at ``destination`` of the published scales and blocks that lie in the same memory.

    shape: [rows, columns]. The blocks may be overwritten: ``destination`` must be before them by as much as there are
    scales at least. The scales may lie anywhere else.
    """
    rows, columns = shape
    if native.available():
        native.join_mxfp4(
            native.Matrix(MXFP4, rows, columns, layout), slot, scales_at, blocks_at, destination
        )
        return
    count = rows * columns // BLOCK
    scales = slot[scales_at : scales_at + count]
    pairs = slot[blocks_at : blocks_at + count * BLOCK_NBYTES].reshape(count, BLOCK_NBYTES)
    made = np.empty((count, 1 + BLOCK_NBYTES), np.uint8)
    made[:, 0] = scales
    weights = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1).reshape(count, BLOCK)
    made[:, 1:] = weights[:, :BLOCK_NBYTES] | (weights[:, BLOCK_NBYTES:] << np.uint8(4))
    stored = to_layout(layout, MXFP4, made.reshape(-1), shape)
    slot[destination : destination + len(stored)] = stored
