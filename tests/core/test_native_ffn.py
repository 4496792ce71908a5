"""Gated feed-forward modules of one token: known by trial, and nearer to the truth than torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from moei_core.adapters.dense_linear import BlockLinear
from moei_core.adapters.native_ffn import NativeFfn, use_native_ffns
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.quant import native
from tests.packed import pack_folder

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


class Gated(nn.Module):
    """down(activation(gate(x)) * up(x)) of random weights."""

    def __init__(self, activation: nn.Module, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(96, 160, bias=bias), nn.Linear(96, 160, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(160, 96, bias=bias), activation
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def natively(model: nn.Module, dtype: torch.dtype) -> list[NativeFfn]:
    use_native_ffns(model, dtype)
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [one for one in forwards if isinstance(one, NativeFfn)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh")], ids=str)
def test_one_token_is_nearer_to_the_truth(activation: nn.Module, dtype: torch.dtype) -> None:
    model = Gated(activation).to(dtype)
    exact = Gated(activation).to(dtype).double()
    own = model.forward
    (found,) = natively(model, dtype)
    generator = torch.Generator().manual_seed(1)
    errors = torch.zeros(2, dtype=torch.double)
    for _ in range(50):
        given = torch.randn((1, 1, 96), generator=generator).to(dtype)
        truth = exact(given.double())
        assert not torch.equal(found(given), torch.zeros_like(given))
        errors += torch.stack([(forward(given).double() - truth).square().sum() for forward in (model, own)])
    assert errors[0] <= 1.5 * errors[1]
    # More rows are the module's own.
    many = torch.randn((1, 3, 96), generator=generator).to(dtype)
    assert torch.equal(model(many), own(many))


def test_another_module_is_left_alone() -> None:
    class Doubled(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Swapped(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    limited = Gated(nn.SiLU())
    limited.limit = 7.0
    others = [Gated(nn.Tanh()), Gated(nn.SiLU(), bias=True), Doubled(nn.SiLU()), Swapped(nn.SiLU()), limited]
    assert len(natively(Gated(nn.SiLU()), torch.float32)) == 1
    for other in others:
        assert not natively(other, torch.float32)


def test_dense_layers_and_shared_experts_in_blocks(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    pack_folder(chat_folder("deepseek_v3", "bfloat16"), tmp_path / "store")
    adapter = TransformersAdapter(tmp_path / "store")
    adapter.load()
    found = [
        module for module in adapter.model.modules() if isinstance(vars(module).get("forward"), NativeFfn)
    ]
    assert len(found) == 3 and all(isinstance(one.down_proj, BlockLinear) for one in found)
