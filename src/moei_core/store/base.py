"""The contract of an expert store, and the words it speaks in.

A *slot* is a page-aligned piece of memory that holds one expert. A store says where in a slot each *part*
(one stored tensor, such as ``gate_proj``) will lie, and fills the slot one *extent* (one contiguous range of a
file) at a time. Data lands at the same offset modulo the page size as it has in its file, whether it was read
with O_DIRECT or not: so the address alignment that a matrix product sees, and with it every bit of its
result, depends on the expert alone and never on the slot or on how the bytes came.

Scales that a file keeps apart from their blocks join them in the slot once all is read (``join_parts``): what computes
knows only blocks with their scales.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moei_core.errors import ExpertReadError
from moei_core.quant import mxfp4
from moei_core.quant.layouts import PLAIN
from moei_core.store.file_range import FileRange, ScaleGrid
from moei_core.types import ExpertKey

if TYPE_CHECKING:
    from moei_core.store.checksums import RunningChecksum

PAGE = 4096
"""Alignment of slots, and of file offsets and lengths in direct reads, in bytes."""
_LINE = 64


def align_down(value: int, unit: int = PAGE) -> int:
    return value - value % unit


def align_up(value: int, unit: int = PAGE) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One expert's share of one stored tensor.

    param: the parameter of transformers' experts module that it belongs to, such as ``gate_up_proj``.
    index: its place among the tensors that are concatenated (along the output dimension) to that parameter.
    format: a name of ``moei_core.quant.formats.FORMATS``, such as ``BF16``. shape: as stored, in weights.
    transposed: stored with its two dimensions swapped, compared with the parameter.
    layout: how its blocks follow each other in a slot, see ``moei_core.quant.layouts``.
    scales: where its scales are if they are apart, as published MXFP4 has them: ``offset`` is then that of the blocks
    without scales, and ``nbytes`` counts both. grid: of FP8 weights; ``nbytes`` is that of the weights alone.
    """

    param: str
    index: int
    file: Path
    offset: int
    nbytes: int
    format: str
    shape: tuple[int, ...]
    transposed: bool = False
    layout: str = PLAIN
    scales: FileRange | None = None
    grid: ScaleGrid | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor and the offset in the slot at which its first byte will lie.

    apart: where its scales and its blocks are read to, if they are stored apart.
    """

    tensor: StoredTensor
    slot_offset: int
    apart: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous range of a file. Its first byte goes to ``slot_offset``, equal to ``offset`` modulo PAGE."""

    file: Path
    offset: int
    nbytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What a slot holds once all extents are read. ``slot_nbytes`` is a multiple of PAGE, slack included."""

    parts: tuple[Part, ...]
    extents: tuple[Extent, ...]
    slot_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the expert's tensors alone."""
        return sum(part.tensor.nbytes for part in self.parts)


def lay_out(tensors: Iterable[StoredTensor]) -> ExpertLayout:
    """Place an expert's tensors in a slot; tensors that are neighbours in a file are read as one extent."""
    parts: list[Part] = []
    extents: list[Extent] = []
    end = 0  # of the slot so far

    def append(file: Path, offset: int, nbytes: int) -> int:
        slot_offset = align_up(end) + offset % PAGE
        extents.append(Extent(file, offset, nbytes, slot_offset))
        return slot_offset

    for tensor in sorted(tensors, key=lambda tensor: (str(tensor.file), tensor.offset)):
        if tensor.scales is not None:
            # Scales first: joining then needs no room of its own (``moei_core.quant.mxfp4.join``).
            scales = tensor.scales
            scales_at = append(scales.file, scales.offset, scales.nbytes)
            end = scales_at + scales.nbytes
            blocks_at = append(tensor.file, tensor.offset, tensor.nbytes - scales.nbytes)
            end = blocks_at + tensor.nbytes - scales.nbytes
            parts.append(Part(tensor, align_down(blocks_at - scales.nbytes, _LINE), (scales_at, blocks_at)))
            continue
        last = extents[-1] if extents else None
        if last is not None and last.file == tensor.file and last.offset + last.nbytes == tensor.offset:
            extents[-1] = Extent(last.file, last.offset, last.nbytes + tensor.nbytes, last.slot_offset)
            slot_offset = last.slot_offset + last.nbytes
        else:
            slot_offset = append(tensor.file, tensor.offset, tensor.nbytes)
        parts.append(Part(tensor, slot_offset))
        end = slot_offset + tensor.nbytes
    return ExpertLayout(tuple(parts), tuple(extents), align_up(end))


def chunks(layout: ExpertLayout, nbytes: int) -> tuple[Extent, ...]:
    """The extents of an expert in pieces of about ``nbytes``, cut at pages so that each can be read directly."""
    pieces: list[Extent] = []
    for extent in layout.extents:
        start, end = extent.offset, extent.offset + extent.nbytes
        while start < end:
            stop = min(end, align_down(start + max(nbytes, PAGE)))
            pieces.append(
                Extent(extent.file, start, stop - start, extent.slot_offset + start - extent.offset)
            )
            start = stop
    return tuple(pieces)


class ExpertStore(Protocol):
    """Read access to the experts of one model. Safe to call from several threads."""

    def experts(self) -> Iterable[ExpertKey]:
        """All experts, ascending."""

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """Where the parts of ``key`` lie in a slot."""

    def read_extent(self, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        """Read one of ``chunks(layout(key), ...)`` to its place in ``slot``.

        slot: writable, page-aligned, at least ``layout(key).slot_nbytes``. Raises: ExpertReadError, naming the
        expert and the file.
        """

    def complete(self, key: ExpertKey, slot: memoryview, running: RunningChecksum | None = None) -> None:
        """Compare what all extents brought into ``slot`` with what ``key`` should be, then ``join_parts``.

        running: the checksum of all of it, if it has been computed. Raises: ExpertReadError, naming the expert and
        the file.
        """

    def close(self) -> None:
        """Release files; nothing can be read afterwards."""


def join_parts(key: ExpertKey, layout: ExpertLayout, slot: memoryview) -> None:
    """Bring scales that were read apart and their blocks together. Once after all extents of ``key`` were read.

    Raises: ExpertReadError if a scale is no number.
    """
    memory = np.frombuffer(slot, np.uint8)
    for part in layout.parts:
        tensor = part.tensor
        if part.apart is None or tensor.scales is None:
            continue
        scales = memory[part.apart[0] : part.apart[0] + tensor.scales.nbytes]
        if (scales == mxfp4.NOT_A_NUMBER).any():
            raise ExpertReadError(
                f"The weights of {key} are not finite numbers.",
                f"{tensor.scales.file}: among the scales of {tensor.param} is a NaN.",
                "That means a damaged file or a failed training: pull the model again, or look for another one.",
            )
        mxfp4.join(memory, tensor.shape, tensor.layout, *part.apart, part.slot_offset)


def read_expert(store: ExpertStore, key: ExpertKey, slot: memoryview) -> int:
    """Fill ``slot`` with the whole of ``key``, here and now. Returns the bytes read; raises as the store does."""
    layout = store.layout(key)
    for extent in layout.extents:
        store.read_extent(key, extent, slot)
    store.complete(key, slot)
    return layout.nbytes
