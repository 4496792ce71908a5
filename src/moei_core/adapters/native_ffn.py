"""Gated feed-forward modules of single tokens (dense layers, shared experts) as one native call each.

As in ``native_decode`` a module is known by trying it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from moei_core.adapters.dense_clock import DENSE_CLOCK
from moei_core.adapters.dense_linear import TYPES, BlockLinear, NativeLinear
from moei_core.adapters.native_decode import some, tolerance
from moei_core.quant import native

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_KNOWN_ATTRIBUTES = frozenset({"act_fn", "config", "hidden_size", "intermediate_size", "training"})
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_TRIALS = (1.0, 4.0)
"""Scales of a trial's input."""


class NativeFfn:
    """The forward of such a module: native for one row, else its own."""

    def __init__(self, module: Any, activation: str, dtype: torch.dtype) -> None:
        """Raises: ValueError if the parts do not fit together, UsageError for what no kernel computes."""
        projections = [getattr(module, name) for name in _PROJECTIONS]
        (gate, gate_at), (up, up_at), (down, down_at) = (_stored(one) for one in projections)
        if gate != up or (down.rows, down.cols) != (gate.cols, gate.rows):
            raise ValueError("the projections do not fit together")
        self._own, self._kept = module.forward, projections
        self.width, self.dtype, self._type = gate.cols, dtype, TYPES[dtype]
        self.tolerance = tolerance(dtype, projections)
        layout = native.FfnLayout(
            gate.cols,
            gate.rows,
            gate.format,
            down.format,
            gate_up_order=gate.order,
            down_order=down.order,
            activation=activation,
        )
        self.kernel = native.ExpertFfn(layout)
        self.parts = native.ExpertParts(gate_at, up_at, down_at, 0, 0, 0)

    def __call__(self, x: torch.Tensor) -> Any:
        if x.numel() != self.width or x.dtype != self.dtype or not x.is_contiguous():
            return self._own(x)
        out = torch.empty_like(x)
        started = time.perf_counter()
        self.kernel.token([self.parts], [1.0], self._type, x.data_ptr(), out.data_ptr())
        DENSE_CLOCK.seconds += time.perf_counter() - started
        return out


def _stored(module: Any) -> tuple[native.Matrix, int]:
    """The weight of a linear layer without a bias, and its address. Raises: ValueError if it is no such layer."""
    if module.bias is None and isinstance(module, BlockLinear):
        return module.matrix, module.get_buffer("blocks").data_ptr()
    if module.bias is None and (isinstance(module, NativeLinear) or type(module) is nn.Linear):
        weight = module.weight
        if weight.dtype in TYPES and weight.is_contiguous():
            return native.Matrix(TYPES[weight.dtype], *weight.shape), weight.data_ptr()
    raise ValueError("not a linear layer without a bias")


def use_native_ffns(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every gated feed-forward module of ``model`` the native forward."""
    if not native.available() or dtype not in TYPES:
        return
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        own = {name for name in vars(module) if not name.startswith("_")}
        if children - {"act_fn"} != set(_PROJECTIONS) or not own <= _KNOWN_ATTRIBUTES:
            continue
        for activation in _ACTIVATIONS:
            try:
                found = NativeFfn(module, activation, dtype)
                agrees = all(_agrees(found, scale) for scale in _TRIALS)
            except Exception:
                # Parts of another kind, or whatever a trial raises.
                break
            if agrees:
                module.forward = found
                break


def _agrees(found: NativeFfn, scale: float) -> bool:
    given = (some((1, 1, found.width), torch.Generator().manual_seed(0), torch.float32) * scale).to(
        found.dtype
    )
    theirs, ours = found._own(given), found(given)
    error = (ours.float() - theirs.float()).square().mean().sqrt()
    return bool(error <= found.tolerance * theirs.float().square().mean().sqrt())
