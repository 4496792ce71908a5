"""The product of one expert with its tokens on a device: its bytes lie in a device slot as they lie in a host slot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from moei_core.adapters.skeleton import TORCH_DTYPES
from moei_core.engine.devices import Event
from moei_core.engine.expert_compute import ExpertWeights
from moei_core.quant.formats import FORMATS
from moei_core.quant.layouts import PLAIN
from moei_core.store.base import ExpertLayout, StoredTensor
from moei_core.types import ExpertKey

_ROWS, _PIECE, _SCALE = 16, 4, 2


def _q8_0(quants: torch.Tensor) -> torch.Tensor:
    return quants.view(torch.int8).to(torch.float32)


def _q4_0(quants: torch.Tensor) -> torch.Tensor:
    return torch.cat([quants & 15, quants >> 4], dim=-1).to(torch.float32) - 8


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"Q8_0": _q8_0, "Q4_0": _q4_0}


def why_not(layouts: Iterable[ExpertLayout]) -> str | None:
    """None if a device can compute experts that lie so; else the reason, to follow "Experts stay in RAM: "."""
    for part in (part for layout in layouts for part in layout.parts):
        form = FORMATS[part.tensor.format]
        if not form.is_float and form.name not in _DECODERS:
            return f"there is no GPU product for {form.name}"
        if form.is_float and part.slot_offset % form.block_nbytes:
            # A view of device memory cannot begin in the middle of a number.
            return f"{part.tensor.file.name} holds numbers at odd places"
    return None


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """A matrix in blocks in device memory. ``raw``: its bytes as stored, uint8."""

    tensor: StoredTensor
    raw: torch.Tensor

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out] in ``inputs``' dtype, to which the weights are rounded."""
        return nn.functional.linear(inputs, self.decode(inputs.dtype))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights, [out, in]."""
        shape = self.tensor.shape
        nbytes = FORMATS[self.tensor.format].block_nbytes
        if self.tensor.layout == PLAIN:
            blocks = self.raw.view(shape[0], -1, nbytes)
            halves, quants = blocks[..., :_SCALE], blocks[..., _SCALE:]
        else:
            # Tiles of 16 rows, see ``moei_core.quant.layouts``: first their scales, then pieces of 4 bytes.
            tiles = self.raw.view(shape[0] // _ROWS, -1, _ROWS * nbytes)
            groups, columns = tiles.shape[:2]
            halves = tiles[..., : _ROWS * _SCALE].view(groups, columns, _ROWS, _SCALE).transpose(1, 2)
            pieces = tiles[..., _ROWS * _SCALE :].view(groups, columns, -1, _ROWS, _PIECE)
            quants = pieces.permute(0, 3, 1, 2, 4).reshape(groups, _ROWS, columns, -1)
        scales = halves.contiguous().view(torch.float16).to(torch.float32)
        return (_DECODERS[self.tensor.format](quants.contiguous()) * scales).view(shape).to(dtype)


class DeviceExpert:
    """An expert in a device slot, or on its way there: ``ready`` is the end of its copy, None once that was seen."""

    __slots__ = ("_weights", "key", "layout", "memory", "ready", "slot")

    def __init__(
        self, key: ExpertKey, layout: ExpertLayout, slot: int, memory: torch.Tensor, ready: Event
    ) -> None:
        self.key, self.layout, self.slot, self.memory = key, layout, slot, memory
        self.ready: Event | None = ready
        self._weights: ExpertWeights | None = None

    @property
    def weights(self) -> ExpertWeights:
        """Views of its slot; only what is computed after ``ready`` may read them."""
        if self._weights is None:
            self._weights = {}
            for part in sorted(self.layout.parts, key=lambda part: part.tensor.index):
                tensor = part.tensor
                raw = self.memory[part.slot_offset : part.slot_offset + tensor.nbytes]
                self._weights.setdefault(tensor.param, []).append(_view(tensor, raw))
        return self._weights


def _view(tensor: StoredTensor, raw: torch.Tensor) -> torch.Tensor | DeviceBlocks:
    if not FORMATS[tensor.format].is_float:
        return DeviceBlocks(tensor, raw)
    view = raw.view(TORCH_DTYPES[tensor.format]).view(tensor.shape)
    return view.t() if tensor.transposed else view
