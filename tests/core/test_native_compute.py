"""The native kernels take the layers that they can compute, and give what torch gives."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.engine.expert_compute import HeldExpert, expert_forward, stored_alike
from moei_core.engine.native_compute import FEW_TOKENS, native_experts
from moei_core.quant import native
from moei_core.store.base import read_expert
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


def held(adapter: TransformersAdapter) -> list[HeldExpert]:
    store, experts = adapter.open_store(), []
    for key in list(store.experts())[:3]:
        layout = store.layout(key)
        view = memoryview(mmap(-1, layout.slot_nbytes))
        read_expert(store, key, view)
        experts.append(HeldExpert(key, layout, view, np.frombuffer(view, np.uint8).ctypes.data, 0))
    store.close()
    return experts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_computed_natively(family: str, chat_folder: Callable[..., Path]) -> None:
    adapter = TransformersAdapter(chat_folder(family, "float32"), torch.float32)
    experts = held(adapter)
    adapter.load()
    module = next(m for _, layer, m in experts_modules(adapter.model) if layer == experts[0].key.layer)
    kernel = native_experts(module, experts[0].layout)
    assert kernel is not None
    assert len({stored_alike(expert.layout) for expert in experts}) == 1
    inputs = torch.randn((5, adapter.spec().hidden_size), generator=torch.Generator().manual_seed(1))
    positions = [[0, 3], [2], [4, 5, 7, 9]]  # of two experts a token
    found = kernel(experts, positions, 2, inputs)
    at = 0
    for expert, one in zip(experts, positions, strict=True):
        expected = expert_forward(module, expert.weights, inputs[torch.tensor(one) // 2])
        assert torch.allclose(found[at : at + len(one)], expected, rtol=1e-4, atol=1e-5)
        at += len(one)


def test_an_unknown_activation_is_left_to_torch(chat_folder: Callable[..., Path]) -> None:
    adapter = TransformersAdapter(chat_folder("mixtral"))
    (expert, *_) = held(adapter)
    module = next(m for _, _, m in experts_modules(adapter.model))
    assert native_experts(module, expert.layout) is not None
    module.act_fn = torch.nn.Mish()
    assert native_experts(module, expert.layout) is None


def test_floats_with_many_tokens_are_left_to_torch(chat_folder: Callable[..., Path]) -> None:
    adapter = TransformersAdapter(chat_folder("mixtral"))
    (expert, *_) = held(adapter)
    kernel = native_experts(next(m for _, _, m in experts_modules(adapter.model)), expert.layout)
    assert kernel is not None and kernel.takes(FEW_TOKENS) and not kernel.takes(FEW_TOKENS + 1)
