"""The native kernels take the layers that they can compute, and give what torch gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget
from moei_core.engine import runtime
from moei_core.engine.expert_compute import HeldExpert, expert_forward, stored_alike
from moei_core.engine.generate import Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.layer_work import Choice, LayerWork, TokenWork
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.native_compute import FEW_TOKENS, NativeExperts, native_experts
from moei_core.hub.resolve import resolve_model
from moei_core.quant import native
from moei_core.store.base import read_expert
from moei_core.types import Phase
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


@pytest.mark.parametrize("share", [0.04, 0.25])
def test_a_token_of_small_experts_is_one_call_whatever_is_absent(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where experts are worth computing as they come, there are more calls and the same bits."""

    def reply() -> tuple[list[float], int, int]:
        calls: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            for name in ("token", "rows", "__call__"):
                one = getattr(NativeExperts, name)

                def counted(self: NativeExperts, *given: Any, name: str = name, one: Any = one) -> Any:
                    calls[name] += 1
                    return one(self, *given)

                patch.setattr(NativeExperts, name, counted)
            options = LoadOptions(experts=ExpertBudget(fraction=share))
            with LoadedModel(resolve_model("moei-demo").folder, options) as model:
                cache = ConversationCache(model.adapter.config)
                generator = Generator(model.adapter.model, model.runtime, cache, lambda: False)
                generator._forward([5, 6, 7], Phase.PREFILL)
                calls.clear()
                logits = [generator._forward([token], Phase.DECODE) for token in (8, 9, 10, 11, 12, 13)]
                assert model.scheduler.statistics.misses > 0
        assert not calls["__call__"]
        return torch.cat(logits).tolist(), calls["token"], calls["rows"]

    logits, whole, parts = reply()
    assert (whole, parts) == (6 * 4, 0)
    monkeypatch.setattr(runtime, "_WORTH_BEGINNING", 0)
    again, whole, parts = reply()
    assert again == logits and parts > 0
    assert whole < 6 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_goes_on_in_general_where_an_expert_has_no_kernel(
    dtype: torch.dtype, chat_folder: Callable[..., Path]
) -> None:
    """What was computed before, one by one and in any order, is taken over: the same bits."""
    adapter = TransformersAdapter(chat_folder("qwen3_moe", "float32"), dtype)
    experts = held(adapter)
    adapter.load()
    module = next(m for _, layer, m in experts_modules(adapter.model) if layer == experts[0].key.layer)
    kernel = native_experts(module, experts[0].layout)
    hidden = torch.randn((1, adapter.spec().hidden_size), generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    weights = {expert.key.expert: 0.1 + 0.3 * expert.key.expert for expert in experts}

    def total(order: list[int], without: tuple[int, ...] = ()) -> torch.Tensor:
        work = TokenWork(module, hidden, weights, lambda one: None if one.key.expert in without else kernel)
        for at in order:
            work.compute([experts[at]])
        return work.total()

    whole = TokenWork(module, hidden, weights, lambda _: kernel)
    whole.compute(experts)
    for order in ([0, 1, 2], [2, 0, 1]):
        assert torch.equal(total(order), whole.total())
    # Torch rounds its own way: what counts is that all ways through it agree.
    index, scale = torch.tensor([list(weights)]), torch.tensor([list(weights.values())])
    choice = Choice.of(index, scale, (), 4)
    assert Choice.of(index, scale, tuple(weights), 4).rows == choice.rows
    in_torch = LayerWork(module, hidden, choice, lambda one: None if one.key.expert == 1 else kernel)
    in_torch.compute(experts)
    for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0]):
        assert torch.equal(total(order, without=(1,)), in_torch.total())
