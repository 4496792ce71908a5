"""How the blocks of a matrix [rows, columns] follow each other: ``plain``, or ``rows16`` for vector kernels.

plain: rows one after the other, each row its blocks from left to right, as in GGUF.

rows16: rows in groups of 16; a group is one *tile* for each block column, from left to right. A tile holds the 16
rows' scales (row 0 first; float16, in MXFP4 a byte each), then their quants, interleaved in pieces of 4 bytes: piece 0
of row 0, piece 0 of row 1, ... piece 0 of row 15, piece 1 of row 0, and so on. So a 64-byte vector has the same 4 bytes
of 16 rows (Q8_0: 4 columns, Q4_0 and MXFP4: 4 + 4), the operand of an integer dot product whose lanes are rows. A tile
has as many bytes as its 16 blocks, and a matrix as many as in ``plain``. Only for Q8_0, Q4_0 and MXFP4, and a number
of rows that is a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moei_core.quant.formats import FORMATS

Bytes = NDArray[np.uint8]

PLAIN, ROWS16 = "plain", "rows16"
LAYOUTS = (PLAIN, ROWS16)
SCALE_NBYTES = {"Q8_0": 2, "Q4_0": 2, "MXFP4": 1}
"""The formats that can be interleaved, with the bytes of the scale that begins a block."""
_ROWS, _PIECE = 16, 4


def can_interleave(name: str, shape: Sequence[int]) -> bool:
    """Whether a matrix of ``shape`` in format ``name`` can be laid out as ``rows16``."""
    return name in SCALE_NBYTES and len(shape) == 2 and shape[0] % _ROWS == 0


def to_layout(layout: str, name: str, plain: Bytes, shape: Sequence[int]) -> Bytes:
    """The bytes of a ``plain`` matrix in ``layout``. Lossless; [nbytes] -> [nbytes]."""
    if layout == PLAIN:
        return plain
    assert layout == ROWS16 and can_interleave(name, shape)
    nbytes = FORMATS[name].block_nbytes
    # [group, row, block column, byte] -> [group, block column, ...]
    blocks = plain.reshape(shape[0] // _ROWS, _ROWS, -1, nbytes).transpose(0, 2, 1, 3)
    groups, columns = blocks.shape[:2]
    tiles = np.empty((groups, columns, _ROWS * nbytes), np.uint8)
    scale = SCALE_NBYTES[name]
    scales = _ROWS * scale
    tiles[..., :scales] = blocks[..., :scale].reshape(groups, columns, -1)
    pieces = blocks[..., scale:].reshape(groups, columns, _ROWS, -1, _PIECE)
    tiles[..., scales:] = pieces.swapaxes(2, 3).reshape(groups, columns, -1)
    return tiles.reshape(-1)


def from_layout(layout: str, name: str, stored: Bytes, shape: Sequence[int]) -> Bytes:
    """The inverse of ``to_layout``."""
    if layout == PLAIN:
        return stored
    assert layout == ROWS16 and can_interleave(name, shape)
    nbytes = FORMATS[name].block_nbytes
    tiles = stored.reshape(shape[0] // _ROWS, -1, _ROWS * nbytes)
    groups, columns = tiles.shape[:2]
    scale = SCALE_NBYTES[name]
    scales = _ROWS * scale
    blocks = np.empty((groups, columns, _ROWS, nbytes), np.uint8)
    blocks[..., :scale] = tiles[..., :scales].reshape(groups, columns, _ROWS, scale)
    pieces = tiles[..., scales:].reshape(groups, columns, -1, _ROWS, _PIECE)
    blocks[..., scale:] = pieces.swapaxes(2, 3).reshape(groups, columns, _ROWS, -1)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(-1)
