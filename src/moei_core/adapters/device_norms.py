"""RMS norms on a device in two launches instead of eight: launching is what a token's norms cost there.

As with the native norms, what a module computes is found by trying it, on the processor, before the model moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm

from moei_core.adapters.norm_trial import try_norm


class DeviceNorm:
    """The forward of a norm that rounds to its input's type before it multiplies by its weight."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        self._module, self._eps, self._own = module, eps, module.forward

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        weight: Any = self._module.weight
        if hidden_states.dtype != weight.dtype:
            return self._own(hidden_states)
        return weight * rms_norm(hidden_states, hidden_states.shape[-1:], None, self._eps)


def use_device_norms(model: nn.Module) -> None:
    """Give the norms of ``model`` that compute so this forward."""
    for module in model.modules():
        found = _norm(module)
        if found is not None:
            module.forward = found


def _norm(module: nn.Module) -> DeviceNorm | None:
    trial = try_norm(module)
    if trial is None:
        return None
    found = DeviceNorm(module, trial.eps)
    with torch.inference_mode():
        # A sum in another order moves a rounded value by one place at most.
        return found if trial.agrees(found(trial.given), places=1) else None
