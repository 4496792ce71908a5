"""The product of one expert with its tokens, in torch, for every layout that transformers' hook describes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moei_core.adapters.checkpoint import TORCH_DTYPES
from moei_core.store.base import ExpertLayout

ExpertWeights = dict[str, list[torch.Tensor]]
"""Parameter name (``gate_up_proj``, ``down_proj_bias``, ...) to the stored pieces that make it up, in order."""


def weights_in_slot(layout: ExpertLayout, slot: memoryview) -> ExpertWeights:
    """The expert's tensors as views of its slot, with their dimensions in the parameter's order."""
    weights: ExpertWeights = {}
    for part in sorted(layout.parts, key=lambda part: part.tensor.index):
        tensor, dtype = part.tensor, TORCH_DTYPES[part.tensor.dtype]
        raw = slot[part.slot_offset : part.slot_offset + tensor.nbytes]
        if part.slot_offset % dtype.itemsize:
            # A header of odd length leaves its tensors unaligned to their own size: those are copied.
            raw = memoryview(bytearray(raw))
        view = torch.frombuffer(raw, dtype=dtype).view(tensor.shape)
        weights.setdefault(tensor.param, []).append(view.t() if tensor.transposed else view)
    return weights


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
        weight = piece if piece.dtype == inputs.dtype else piece.to(inputs.dtype)
        outputs.append(inputs @ weight if module.is_transposed else nn.functional.linear(inputs, weight))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    bias = weights.get(f"{name}_bias")
    return output if bias is None else output + bias[0].to(inputs.dtype)
