"""The product of one expert with its tokens on a device: its bytes lie in a device slot as they lie in a host slot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moei_core.adapters.skeleton import TORCH_DTYPES
from moei_core.engine.device_slots import DeviceSlots
from moei_core.engine.devices import Event
from moei_core.engine.expert_compute import ExpertWeights, HeldExpert
from moei_core.quant.formats import FORMATS
from moei_core.quant.layouts import PLAIN, SCALE_NBYTES
from moei_core.store.base import ExpertLayout, Part, StoredTensor

_ROWS, _PIECE = 16, 4
_FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _q8_0(quants: torch.Tensor) -> torch.Tensor:
    return quants.view(torch.int8).to(torch.float32)


def _q4_0(quants: torch.Tensor) -> torch.Tensor:
    return torch.cat([quants & 15, quants >> 4], dim=-1).to(torch.float32) - 8


def _mxfp4(quants: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(_FP4_DOUBLED, dtype=torch.float32, device=quants.device)
    return values[torch.cat([quants & 15, quants >> 4], dim=-1).int()]


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "MXFP4": _mxfp4}


def _scales(raw: torch.Tensor) -> torch.Tensor:
    """float16 [..., 2] bytes, or exponents [..., 1] of doubled FP4 values, as float32 [..., 1]."""
    if raw.shape[-1] == 2:
        return raw.contiguous().view(torch.float16).to(torch.float32)
    exponents = raw.int()
    # 2^(exponent - 128); the first two are subnormal floats.
    bits = torch.where(exponents < 2, 0x200000 << (exponents & 1), (exponents - 1) << 23)
    return bits.int().view(torch.float32)


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


def decoded_nbytes(layouts: Iterable[ExpertLayout]) -> int:
    """The largest temporary memory of decoding a matrix of blocks; float32 at most, and torch's own copies."""
    shapes = (
        part.tensor.shape
        for layout in layouts
        for part in layout.parts
        if not FORMATS[part.tensor.format].is_float
    )
    return max((3 * 4 * math.prod(shape) for shape in shapes), default=0)


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """A matrix in blocks in device memory. ``raw``: its bytes as stored, uint8. kernels: as of ``Device``."""

    tensor: StoredTensor
    raw: torch.Tensor
    kernels: Any = None

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out] in ``inputs``' dtype, to which the weights are rounded."""
        return nn.functional.linear(inputs, self.decode(inputs.dtype))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights, [out, in]."""
        shape, kernels = self.tensor.shape, self.kernels
        if kernels is not None and kernels.takes(self.tensor.format, shape):
            target = torch.empty(shape, dtype=dtype, device=self.raw.device)
            kernels.decode(self.tensor.format, self.tensor.layout, shape, self.raw, target)
            return target
        nbytes, scale = FORMATS[self.tensor.format].block_nbytes, SCALE_NBYTES[self.tensor.format]
        if self.tensor.layout == PLAIN:
            blocks = self.raw.view(shape[0], -1, nbytes)
            scales, quants = blocks[..., :scale], blocks[..., scale:]
        else:
            # Tiles of 16 rows, see ``moei_core.quant.layouts``: first their scales, then pieces of 4 bytes.
            tiles = self.raw.view(shape[0] // _ROWS, -1, _ROWS * nbytes)
            groups, columns = tiles.shape[:2]
            scales = tiles[..., : _ROWS * scale].view(groups, columns, _ROWS, scale).transpose(1, 2)
            pieces = tiles[..., _ROWS * scale :].view(groups, columns, -1, _ROWS, _PIECE)
            quants = pieces.permute(0, 3, 1, 2, 4).reshape(groups, _ROWS, columns, -1)
        return (_DECODERS[self.tensor.format](quants.contiguous()) * _scales(scales)).view(shape).to(dtype)


class DeviceExpert:
    """An expert in a device slot, or on its way there: ``ready`` is the end of its copy, None once that was seen.

    memory: the bytes of the slot that it takes. kind: as of ``HeldExpert``. starts: where its parts begin, in the order
    in which they are multiplied, in bytes from the beginning of the slots' memory. aligned: as of the kernels.
    """

    __slots__ = (
        "_kernels",
        "_weights",
        "aligned",
        "key",
        "kind",
        "layout",
        "memory",
        "ready",
        "slot",
        "starts",
    )

    def __init__(self, held: HeldExpert, slots: DeviceSlots, slot: int, kernels: Any) -> None:
        self.key, self.layout, self.kind = held.key, held.layout, held.kind
        self.ready: Event | None = None
        self._kernels = kernels
        self.aligned = kernels is not None and are_aligned(self.layout, kernels)
        self.move(slots, slot)

    def move(self, slots: DeviceSlots, slot: int) -> None:
        """Its bytes are in ``slot`` from now on."""
        self.slot, start = slot, slots.start(slot)
        self.starts = [start + part.slot_offset for part in _in_order(self.layout)]
        self.memory = slots.bytes_of(slot, self.layout.slot_nbytes)
        self._weights: ExpertWeights | None = None

    @property
    def weights(self) -> ExpertWeights:
        """Views of its slot; only what is computed after ``ready`` may read them."""
        if self._weights is None:
            self._weights = {}
            for part in sorted(self.layout.parts, key=lambda part: part.tensor.index):
                tensor = part.tensor
                raw = self.memory[part.slot_offset : part.slot_offset + tensor.nbytes]
                self._weights.setdefault(tensor.param, []).append(_view(tensor, raw, self._kernels))
        return self._weights


@dataclass(frozen=True, slots=True)
class FewTokenExperts:
    """Experts of one layer with few tokens, whose matrices have the same shapes and formats: two launches for all.

    first: what makes up the first parameter, one of its equal pieces; pieces: how many. down: the second one. Where
    they lie in a slot is an expert's own matter. aligned: as of the kernels.
    """

    module: Any
    kernels: Any
    first: StoredTensor
    pieces: int
    down: StoredTensor
    aligned: bool

    def takes(self, tokens: int) -> bool:
        """Whether an expert with so many tokens is computed here; a matter of the access, never of residency."""
        return bool(tokens <= self.kernels.FEW_TOKENS)

    def pairs(
        self,
        experts: Sequence[DeviceExpert],
        rows: Mapping[int, NDArray[np.int64]],
        weights: NDArray[np.float32],
        top_k: int,
    ) -> torch.Tensor:
        """The kernels' ``pairs``, on the host. rows: of each expert, ``token * top_k + column``; weights: of all."""
        places = [rows[expert.key.expert] for expert in experts]
        row = np.concatenate(places)
        starts = np.repeat(np.array([expert.starts for expert in experts]).T, [*map(len, places)], axis=1)
        return torch.from_numpy(
            np.stack((row // top_k, row, weights[row].view(np.int32), *starts), dtype=np.int64)
        )

    def __call__(
        self, memory: torch.Tensor, pairs: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Write the weighted outputs of ``pairs`` to their rows of ``outputs``, float32 [rows, hidden].

        memory: of ``DeviceSlots``. inputs: float32 [tokens, hidden], contiguous.
        """
        begin = self.kernels.PAIR_STARTS
        hidden = self._product(self.first, memory, pairs, begin, inputs, self.pieces, None)
        hidden = self.module._apply_gate(hidden) if self.module.has_gate else self.module.act_fn(hidden)
        self._product(self.down, memory, pairs, begin + self.pieces, hidden.contiguous(), 1, outputs)

    def _product(
        self,
        tensor: StoredTensor,
        memory: torch.Tensor,
        pairs: torch.Tensor,
        line: int,
        inputs: torch.Tensor,
        matrices: int,
        outputs: torch.Tensor | None,
    ) -> torch.Tensor:
        form, layout, shape = tensor.format, tensor.layout, tensor.shape
        found: torch.Tensor = self.kernels.few_rows(
            form, layout, shape, memory, pairs, line, inputs, matrices, outputs, self.aligned
        )
        return found


def few_token_experts(module: Any, layout: ExpertLayout, kernels: Any) -> FewTokenExperts | None:
    """How the fused kernels compute experts of ``module`` that are stored as ``layout`` says; None: they cannot."""
    if kernels is None or getattr(module, "has_post_expert_norm", False):
        return None
    parts = _in_order(layout)
    *first, down = [part.tensor for part in parts]
    params = ["gate_up_proj" if module.has_gate else "up_proj"] * len(first) + ["down_proj"]
    if not first or [part.tensor.param for part in parts] != params:
        return None
    for tensor in (*first, down):
        # Floats may be stored as [in, out]; biases, and what else a family has, are left to torch.
        plain = not FORMATS[tensor.format].is_float or bool(module.is_transposed) == tensor.transposed
        if not plain or not kernels.takes(tensor.format, tensor.shape):
            return None
    if len({(tensor.format, tensor.layout, tensor.shape) for tensor in first}) > 1:
        return None
    return FewTokenExperts(module, kernels, first[0], len(first), down, are_aligned(layout, kernels))


def are_aligned(layout: ExpertLayout, kernels: Any) -> bool:
    """Whether all parts of an expert that is stored so begin where the kernels read fastest."""
    return all(part.slot_offset % kernels.ALIGNED == 0 for part in layout.parts)


def _in_order(layout: ExpertLayout) -> list[Part]:
    """The parts of an expert as they are multiplied: what makes up the first parameter, then ``down_proj``."""
    return sorted(layout.parts, key=lambda part: (part.tensor.param == "down_proj", part.tensor.index))


def _view(tensor: StoredTensor, raw: torch.Tensor, kernels: Any) -> torch.Tensor | DeviceBlocks:
    if not FORMATS[tensor.format].is_float:
        return DeviceBlocks(tensor, raw, kernels)
    view = raw.view(TORCH_DTYPES[tensor.format]).view(tensor.shape)
    return view.t() if tensor.transposed else view
