"""The products of experts by the native kernels: which layers they can compute, and the call itself.

What a module computes between its two products is found by trying it, not by its name: the activation and the
place of gate and up are those whose result equals the module's own on random numbers. A module that matches
nothing is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moei_core.adapters.dense_linear import TYPES
from moei_core.engine.expert_compute import HeldExpert
from moei_core.errors import UsageError
from moei_core.quant import native
from moei_core.quant.formats import FORMATS
from moei_core.quant.native_layer import expert_rows
from moei_core.store.base import ExpertLayout, StoredTensor

FEW_TOKENS = 4
"""Tokens of an expert up to which float weights are read faster than torch reads them; blocks always are."""

_PROBE_WIDTH, _PROBE_SCALE = 16, 4.0
"""Numbers on both sides of every clamp."""


@dataclass(frozen=True, slots=True)
class NativeExperts:
    """How to compute experts of one layer that are stored alike. columns: of ``native.PARTS``, by stored part."""

    ffn: native.ExpertFfn
    columns: tuple[tuple[int, int], ...]
    blocks: bool

    def takes(self, tokens: int) -> bool:
        """Whether an expert with so many tokens is computed here; a matter of the access, never of residency."""
        return self.blocks or tokens <= FEW_TOKENS

    def __call__(
        self,
        experts: Sequence[HeldExpert],
        positions: Sequence[NDArray[np.int64]],
        top_k: int,
        inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Outputs of all pairs, float32 [pairs, hidden], expert after expert.

        positions: flat [token * top_k + column] of each expert. inputs: float32 [tokens, hidden], contiguous.
        """
        place, offsets = _joined(positions)
        out = torch.empty((len(place), inputs.shape[-1]), dtype=torch.float32)
        self.ffn(self._table(experts), offsets, place // top_k, inputs.numpy(), out.numpy())
        return out

    def place(
        self,
        experts: Sequence[HeldExpert],
        positions: Sequence[NDArray[np.int64]],
        top_k: int,
        inputs: torch.Tensor,
        scale: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """The same, each output times its ``scale`` at its position of ``outputs``, float32 [tokens * top_k, hidden].

        scale: float32, one for each position.
        """
        place, offsets = _joined(positions)
        weights = scale.numpy().reshape(-1)[place]
        table = self._table(experts)
        self.ffn(table, offsets, place // top_k, inputs.numpy(), outputs.numpy(), place, weights)

    def token(
        self, experts: Sequence[HeldExpert], weights: list[float], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The outputs for one token times their weights, summed in the order given: [1, hidden], as the input."""
        out = torch.empty_like(hidden_states)
        self.ffn.token(
            [self.parts(expert) for expert in experts],
            weights,
            TYPES[hidden_states.dtype],
            hidden_states.data_ptr(),
            out.data_ptr(),
        )
        return out

    def rows(
        self,
        experts: Sequence[HeldExpert],
        rows: list[int],
        hidden_states: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """What some of a token's experts make of it: ``outputs``, float32 [.., hidden], gets it at ``rows``."""
        expert_rows(
            self.ffn,
            [self.parts(expert) for expert in experts],
            rows,
            TYPES[hidden_states.dtype],
            hidden_states.data_ptr(),
            outputs.data_ptr(),
        )

    def parts(self, expert: HeldExpert) -> native.ExpertParts:
        """Where the expert's parts lie."""
        if expert.native is None:
            expert.native = native.ExpertParts(*(int(address) for address in self._addresses(expert)))
        return expert.native

    def _table(self, experts: Sequence[HeldExpert]) -> NDArray[np.int64]:
        return np.stack([self._addresses(expert) for expert in experts])

    def _addresses(self, expert: HeldExpert) -> NDArray[np.int64]:
        if expert.parts is None:
            expert.parts = np.zeros(len(native.PARTS), np.int64)
            for column, part in self.columns:
                expert.parts[column] = expert.address + expert.layout.parts[part].slot_offset
        return expert.parts


def _joined(positions: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All positions, one expert's after the other's, and where each expert's begin and end."""
    offsets = np.zeros(len(positions) + 1, np.int64)
    np.cumsum([len(one) for one in positions], out=offsets[1:])
    return np.concatenate(positions), offsets


def native_experts(module: Any, layout: ExpertLayout) -> NativeExperts | None:
    """The kernel for experts of ``module`` that are stored as ``layout`` says, or None if there is none."""
    if not native.available():
        return None
    pieces: dict[str, list[int]] = {}
    tensors = [part.tensor for part in layout.parts]
    for i in sorted(range(len(tensors)), key=lambda i: tensors[i].index):
        pieces.setdefault(tensors[i].param, []).append(i)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    ups, downs = pieces.get(first, []), pieces.get("down_proj", [])
    between = _between(module)
    if between is None or len(downs) != 1 or not 1 <= len(ups) <= 2:
        return None
    gating, activation = between
    if len(ups) == 2:
        if gating != "concatenated":
            return None
        gating = "separate"
    parts = {"gate": ups[0], "down": downs[0]}
    if len(ups) == 2:
        parts["up"] = ups[1]
    for bias, name in ((f"{first}_bias", "gate_bias"), ("down_proj_bias", "down_bias")):
        found = pieces.get(bias, [])
        if found:
            parts[name] = found[0]
        if len(found) == 2 and gating == "separate":
            parts["up_bias"] = found[1]
        elif len(found) > 1 or (found and name == "gate_bias" and gating == "separate"):
            return None
    columns = tuple((native.PARTS.index(name), part) for name, part in parts.items())
    return _plan(module, gating, activation, {name: tensors[part] for name, part in parts.items()}, columns)


def _plan(
    module: Any,
    gating: str,
    activation: str,
    tensors: dict[str, StoredTensor],
    columns: tuple[tuple[int, int], ...],
) -> NativeExperts | None:
    gate, down = tensors["gate"], tensors["down"]
    order, down_order = _order(module, gate), _order(module, down)
    outputs, hidden = gate.shape if order != "transposed" else gate.shape[::-1]
    up = tensors.get("up")
    if up is not None and (up.format, up.shape, up.transposed) != (gate.format, gate.shape, gate.transposed):
        return None
    biases = {tensor.format for name, tensor in tensors.items() if name.endswith("_bias")}
    if len(biases) > 1:
        return None
    halves = 2 if gating in ("concatenated", "interleaved") else 1
    try:
        ffn = native.ExpertFfn(
            native.FfnLayout(
                hidden,
                outputs // halves,
                gate.format,
                down.format,
                gating,
                order,
                down_order,
                activation,
                bias_format=biases.pop() if biases else "F32",
            )
        )
    except UsageError:
        return None
    blocks = not (FORMATS[gate.format].is_float and FORMATS[down.format].is_float)
    return NativeExperts(ffn, columns, blocks)


def _order(module: Any, tensor: StoredTensor) -> str:
    """How the stored matrix lies, as the kernels call it."""
    if not FORMATS[tensor.format].is_float:
        return tensor.layout
    return "plain" if bool(module.is_transposed) == tensor.transposed else "transposed"


def _between(module: Any) -> tuple[str, str] | None:
    """(gating, activation) of what ``module`` does between its products, or None if no kernel does that."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn((32, 2 * _PROBE_WIDTH), generator=generator) * _PROBE_SCALE
    with torch.inference_mode():
        try:
            expected = module._apply_gate(given) if module.has_gate else module.act_fn(given)
        except Exception:
            # Some families want more than the hidden values here; torch asks them properly.
            return None
        arrangements = ("concatenated", "interleaved") if module.has_gate else ("none",)
        for gating in arrangements:
            for activation in native.ACTIVATIONS:
                found = _activate(gating, activation, given)
                if found is not None and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
                    return gating, activation
    return None


def _activate(gating: str, activation: str, given: torch.Tensor) -> torch.Tensor | None:
    """What the kernels compute, in torch."""
    if gating == "none":
        return None if activation == "clamped_swiglu" else _SIMPLE[activation](given)
    gate, up = given.chunk(2, dim=-1) if gating == "concatenated" else (given[:, 0::2], given[:, 1::2])
    if activation == "clamped_swiglu":
        limit = native.CLAMP_LIMIT
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(native.CLAMP_ALPHA * gate)
    return _SIMPLE[activation](gate) * up


_SIMPLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}
