"""Which norms get the short way on a device, and that it gives what they give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moei_core.adapters.device_norms import DeviceNorm, use_device_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [MixtralRMSNorm, Qwen3MoeRMSNorm])
def test_norms_that_round_before_their_weight(kind: type[nn.Module], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    module = kind(96, 1e-5).to(dtype)
    module.weight.data = torch.randn(96, generator=generator).to(dtype)
    given = (torch.randn((5, 7, 96), generator=generator) * 3).to(dtype)
    expected = module(given)
    use_device_norms(module)
    assert isinstance(module.forward, DeviceNorm)
    found = module(given)
    assert found.dtype is dtype
    eps = torch.finfo(dtype).eps if dtype is not torch.float32 else 1e-5
    assert ((found.float() - expected.float()).abs() <= eps * expected.float().abs() + 1e-6).all()
    # Another type than the weight's is the module's own matter.
    assert torch.equal(module(given.double()), kind.forward(module, given.double()))


def test_other_norms_are_left_alone() -> None:
    ones = Gemma2RMSNorm(64)
    ones.weight.data = torch.randn(64, generator=torch.Generator().manual_seed(5))
    model = nn.ModuleList([ones, nn.LayerNorm(64), nn.RMSNorm(64), nn.Linear(64, 64)])
    use_device_norms(model)
    assert not any(isinstance(module.forward, DeviceNorm) for module in model)
