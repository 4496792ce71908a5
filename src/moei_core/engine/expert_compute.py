"""The product of one expert with its tokens, in torch, for every layout that transformers' hook describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moei_core.adapters.skeleton import TORCH_DTYPES
from moei_core.quant import native
from moei_core.quant.formats import FORMATS, decode
from moei_core.quant.layouts import from_layout
from moei_core.store.base import ExpertLayout, StoredTensor
from moei_core.types import ExpertKey

_DECODED_WEIGHTS = 1 << 21
DECODED_NBYTES = 4 * 4 * _DECODED_WEIGHTS
"""Bound on the temporary memory of a product with blocks: a few float32 arrays of the rows decoded at once."""


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """A matrix in blocks, in its slot. ``tensor.shape`` is [out, in]; ``raw`` are its bytes as stored."""

    tensor: StoredTensor
    raw: memoryview

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out] in ``inputs``' dtype, computed in float32 from the exact values of the blocks.

        Decodes some rows at a time; how many depends on the shape alone, so the result does too.
        """
        form, (rows, columns) = FORMATS[self.tensor.format], self.tensor.shape
        exact = inputs.to(torch.float32)
        # A multiple of 16, so that no group of interleaved rows is torn.
        step = max(16, _DECODED_WEIGHTS // columns // 16 * 16)
        outputs = []
        for first in range(0, rows, step):
            shape = (min(step, rows - first), columns)
            raw = np.frombuffer(self.raw, np.uint8, form.nbytes(shape), form.nbytes((first, columns)))
            plain = from_layout(self.tensor.layout, form.name, raw, shape)
            weight = torch.from_numpy(decode(form.name, plain, shape))
            outputs.append(nn.functional.linear(exact, weight))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output.to(inputs.dtype)


class Blocks(Protocol):
    """A matrix in blocks, wherever it lies."""

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out] in ``inputs``' dtype."""


ExpertWeights = dict[str, list[torch.Tensor | Blocks]]
"""Parameter name (``gate_up_proj``, ``down_proj_bias``, ...) to the stored pieces that make it up, in order."""


class HeldExpert:
    """An expert that is complete in its slot. address: of the slot. kind: equal for experts stored alike."""

    __slots__ = ("_weights", "address", "key", "kind", "layout", "native", "parts", "view")

    def __init__(
        self, key: ExpertKey, layout: ExpertLayout, view: memoryview, address: int, kind: int
    ) -> None:
        self.key, self.layout, self.view, self.address, self.kind = key, layout, view, address, kind
        self.parts: NDArray[np.int64] | None = None
        self.native: native.ExpertParts | None = None
        """Addresses of its parts, once the native kernels have asked for them."""
        self._weights: ExpertWeights | None = None

    @property
    def weights(self) -> ExpertWeights:
        """Its tensors, made when torch needs them."""
        if self._weights is None:
            self._weights = weights_in_slot(self.layout, self.view)
        return self._weights


def stored_alike(layout: ExpertLayout) -> tuple[object, ...]:
    """Equal for experts whose parts have the same names, shapes and formats, wherever they lie."""
    tensors = (part.tensor for part in layout.parts)
    return tuple((t.param, t.index, t.format, t.shape, t.transposed, t.layout) for t in tensors)


def weights_in_slot(layout: ExpertLayout, slot: memoryview) -> ExpertWeights:
    """The expert's tensors as views of its slot; float ones with their dimensions in the parameter's order."""
    weights: ExpertWeights = {}
    for part in sorted(layout.parts, key=lambda part: part.tensor.index):
        tensor = part.tensor
        raw = slot[part.slot_offset : part.slot_offset + tensor.nbytes]
        weights.setdefault(tensor.param, []).append(_view(tensor, raw, part.slot_offset))
    return weights


def _view(tensor: StoredTensor, raw: memoryview, offset: int) -> torch.Tensor | BlockMatrix:
    if not FORMATS[tensor.format].is_float:
        return BlockMatrix(tensor, raw)
    dtype = TORCH_DTYPES[tensor.format]
    if offset % dtype.itemsize:
        # A header of odd length leaves its tensors unaligned to their own size: those are copied.
        raw = memoryview(bytearray(raw))
    view = torch.frombuffer(raw, dtype=dtype).view(tensor.shape)
    return view.t() if tensor.transposed else view


def expert_forward(module: Any, weights: ExpertWeights, inputs: torch.Tensor) -> torch.Tensor:
    """One expert's output before the router's weight is applied.

    module: transformers' experts module, which describes the layout and owns the activation.
    inputs: [n, hidden_size]. Returns [n, hidden_size].
    """
    gated = bool(module.has_gate)
    hidden = _project(module, weights, "gate_up_proj" if gated else "up_proj", inputs)
    hidden = module._apply_gate(hidden) if gated else module.act_fn(hidden)
    output = _project(module, weights, "down_proj", hidden)
    if getattr(module, "has_post_expert_norm", False):
        output = module.post_expert_norm(output)
    assert isinstance(output, torch.Tensor)
    return output


def _project(module: nn.Module, weights: ExpertWeights, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """``inputs`` times one parameter, each stored piece by itself (their outputs lie side by side)."""
    outputs = []
    for piece in weights[name]:
        if not isinstance(piece, torch.Tensor):
            outputs.append(piece.product(inputs))
            continue
        weight = piece if piece.dtype == inputs.dtype else piece.to(inputs.dtype)
        outputs.append(inputs @ weight if module.is_transposed else nn.functional.linear(inputs, weight))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    if (bias := weights.get(f"{name}_bias")) is None:
        return output
    assert isinstance(bias[0], torch.Tensor)
    return output + bias[0].to(inputs.dtype)
