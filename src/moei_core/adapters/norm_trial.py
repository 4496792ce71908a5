"""What a norm computes, found by trying it: families write the same RMS norm in many variants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class NormTrial:
    """A norm's weight [width] and epsilon, random hidden states ``given`` [3, width], and what it made of them."""

    weight: torch.Tensor
    eps: float
    given: torch.Tensor
    expected: torch.Tensor

    def agrees(self, found: torch.Tensor, places: int) -> bool:
        """Whether ``found`` is what the norm gave, within so many last places of a 16-bit type."""
        dtype = self.weight.dtype
        tolerance = 1e-5 if dtype == torch.float32 else places * torch.finfo(dtype).eps
        return torch.allclose(found.float(), self.expected.float(), rtol=tolerance, atol=1e-6)


def try_norm(module: nn.Module) -> NormTrial | None:
    """What ``module`` did when it was tried; None if it is no norm with one weight and an epsilon."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if "norm" not in type(module).__name__.lower() or not isinstance(eps, float) or weight is None:
        return None
    if len(parameters) > 1 or weight.dim() != 1 or not weight.is_floating_point() or any(module.buffers()):
        return None
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn((3, len(weight)), generator=generator) * 2 + 0.5).to(weight.dtype)
    try:
        with torch.inference_mode():
            expected = module(given)
    except Exception:
        # It wants more than the hidden states.
        return None
    if not isinstance(expected, torch.Tensor) or expected.dtype != given.dtype:
        return None
    return NormTrial(weight, eps, given, expected)
