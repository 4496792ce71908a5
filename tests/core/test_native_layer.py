"""Whole decoder layers of single tokens: the bits of their modules, known by trial, the brain told of everything."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from moei_core.adapters.native_ffn import NativeFfn
from moei_core.adapters.native_layer import NativeLayer, NativeRouter, _router
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.generate import GenerationTimes, Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.layer_work import TokenWork
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.transfers import TransferQueue
from moei_core.quant import native
from moei_core.quant.native_layer import Layer
from moei_core.trace import read_trace
from moei_core.types import Phase
from tests.core.test_exactness import ours
from tests.packed import pack_folder

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss")
EVERYTHING = ExpertBudget(fraction=1.0)


def kinds(folder: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    adapter = TransformersAdapter(folder, dtype)
    adapter.load()
    forwards = [vars(module).get("forward") for module in adapter.model.modules()]
    return (
        sum(isinstance(one, NativeRouter) for one in forwards),
        sum(isinstance(one, NativeLayer) for one in forwards),
    )


def test_which_families_have_whole_layers(chat_folder: Callable[..., Path]) -> None:
    found = {family: kinds(chat_folder(family, "bfloat16")) for family in FAMILIES}
    # DeepSeek's first layer has no experts.
    assert found == {"mixtral": (3, 3), "qwen3_moe": (3, 3), "deepseek_v2": (2, 2), "gpt_oss": (4, 4)}
    # Routers that choose groups first.
    assert kinds(chat_folder("deepseek_v2_low", "bfloat16")) == (0, 0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("packed", [False, True], ids=["stored", "packed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v2_low"])
def test_e1_every_way_gives_the_same_bits(
    chat_folder: Callable[..., Path],
    family: str,
    dtype: str,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whole layers; layers up to their routers, then experts at once, then one by one; every module by itself."""
    folder = chat_folder(family, "bfloat16")
    if packed:
        pack_folder(folder, tmp_path / "store")
        folder = tmp_path / "store"
    calls: list[str] = []

    def counted(owner: type, name: str) -> None:
        own = getattr(owner, name)

        def call(*arguments: object) -> object:
            calls.append(name)
            return own(*arguments)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Layer, "run"), (Layer, "route"), (TokenWork, "compute")):
        counted(owner, name)
    logits, tokens, _ = ours(folder, dtype, EVERYTHING)
    whole = family != "deepseek_v2_low"
    assert ("run" in calls) == whole and ("compute" in calls) != whole

    def again(*expected: str) -> None:
        calls.clear()
        assert torch.equal(ours(folder, dtype, EVERYTHING, forced=tokens)[0], logits)
        assert set(calls) - {"compute"} == set(expected if whole else ()) and "compute" in calls

    monkeypatch.setattr(ExpertRuntime, "resident_experts", lambda *_: None)
    again("route")
    at_once = TokenWork.compute
    monkeypatch.setattr(
        TokenWork, "compute", lambda self, experts: [at_once(self, [expert]) for expert in experts]
    )
    again("route")
    monkeypatch.setattr(NativeLayer, "_one_token", lambda *_: None)
    again()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("change", ["residual", "input", "weights"])
def test_another_layer_is_left_alone(
    chat_folder: Callable[..., Path], change: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chat_folder(family, "bfloat16")
    layer = type(TransformersAdapter(folder).model.model.layers[0])
    code = sys.modules[layer.__module__]
    own = layer.forward
    if change == "residual":
        monkeypatch.setattr(
            layer, "forward", lambda self, hidden_states, **a: own(self, hidden_states, **a) * 0.5
        )
    elif change == "input":
        monkeypatch.setattr(
            layer, "forward", lambda self, hidden_states, **a: own(self, hidden_states * 2, **a)
        )
    else:
        block = code.Qwen3MoeSparseMoeBlock if family == "qwen3_moe" else code.DeepseekV2Moe
        mix = block.forward
        monkeypatch.setattr(block, "forward", lambda self, x: mix(self, x) * 2)
    assert kinds(folder) == (3 if family == "qwen3_moe" else 2, 0)


def test_a_shared_expert_counts_once(
    chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, or added where it rounds otherwise: the layer keeps its own forward."""
    code = sys.modules[type(TransformersAdapter(chat_folder("deepseek_v2")).model).__module__]
    block = code.DeepseekV2Moe

    def without(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        _, weights, experts = self.gate(x)
        return self.experts(x.view(-1, x.shape[-1]), experts, weights).view(*x.shape)

    def twice(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return without(self, x) + 2 * self.shared_experts(x)

    for forward in (without, twice):
        monkeypatch.setattr(block, "forward", forward)
        assert kinds(chat_folder("deepseek_v2", "bfloat16")) == (2, 0)


class _Router(MixtralTopKRouter):
    """A router of 64 experts, of which 6 are chosen."""

    def __init__(self, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.top_k, self.num_experts, self.hidden_dim = 6, 64, 96
        weight = torch.randn((64, 96), generator=torch.Generator().manual_seed(2)) / 8
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)


class _Groups(_Router):
    """Chooses among half of the experts."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = nn.functional.linear(hidden_states, self.weight)
        probabilities = torch.softmax(logits.float(), -1)
        best, index = torch.topk(probabilities[:, :32], self.top_k, -1)
        return logits, best, index


class _Scaled(_Router):
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, best, index = super().forward(hidden_states)
        return logits, best * 1.5, index


class _Wide(_Router):
    """Float32 throughout, the chosen in any order, their weights scaled."""

    routed_scaling_factor = 2.5

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        best, index = torch.topk(torch.softmax(logits, -1), self.top_k, -1, sorted=False)
        return logits, best * self.routed_scaling_factor, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [_Router, _Wide])
def test_a_router_chooses_as_its_module_does(kind: type[_Router], dtype: torch.dtype) -> None:
    router, wide = kind(dtype), kind is _Wide
    found = _router(router)
    assert found is not None
    generator, differ = torch.Generator().manual_seed(1), 0
    # The module's own logits are rounded to its type.
    close = (1e-5, 1e-5) if wide else (2 * torch.finfo(dtype).eps, 1e-2)
    for _ in range(200):
        given = (torch.randn((2, 96), generator=generator) * 2).to(dtype)
        logits, weights, experts = found(given)
        expected = router(given)
        assert logits.dtype == (torch.float32 if wide else dtype)
        assert torch.allclose(logits.float(), expected[0].float(), *close)
        # From its own logits, which round otherwise at times, it must be exactly torch's choice, equal ones included.
        best, index = torch.topk(torch.softmax(logits.float(), -1), 6, -1, sorted=not wide)
        assert torch.equal(index, experts)
        scores = best * router.routed_scaling_factor if wide else best / best.sum(-1, keepdim=True)
        assert torch.allclose(weights, scores, rtol=1e-6)
        differ += not torch.equal(experts.sort().values, expected[2].sort().values)
    assert differ <= (2 if wide else 20)
    many = torch.randn((9, 96), generator=generator).to(dtype)
    assert torch.equal(found(many)[2], router(many)[2])


def test_equal_logits_are_chosen_as_torch_chooses() -> None:
    """Few different logits among many experts, for both of the ways in which torch.topk sorts."""
    for count, top_k in ((512, 8), (512, 7), (128, 8), (64, 6), (9, 9)):
        router = _Router(torch.float32)
        router.top_k, router.num_experts, router.hidden_dim = top_k, count, 1
        generator = torch.Generator().manual_seed(count)
        router.weight = nn.Parameter(torch.randint(0, 4, (count, 1), generator=generator).float())
        found = _router(router)
        assert found is not None
        for value in (1.0, 2.0, -1.0, 0.0):
            given = torch.tensor([[value]])
            assert torch.equal(found(given)[2], router(given)[2])


@pytest.mark.parametrize("other", [_Groups, _Scaled])
def test_another_router_is_left_alone(other: type[_Router]) -> None:
    assert _router(_Router(torch.float32)) is not None
    assert _router(other(torch.float32)) is None


def chat(loaded: LoadedModel, prompt: list[int], cache: ConversationCache, tokens: int = 20) -> list[int]:
    generator = Generator(loaded.adapter.model, loaded.runtime, cache, lambda: False)
    settings = GenerationSettings(max_new_tokens=tokens, temperature=0)
    return list(generator.tokens(prompt, settings, frozenset(), GenerationTimes(), 512))


class _Calls:
    """Does something at some of its calls."""

    def __init__(self, then: dict[int, object]) -> None:
        self.count, self.then = 0, then

    def __call__(self) -> object:
        self.count += 1
        found = self.then.get(self.count)
        if isinstance(found, BaseException):
            raise found
        return found


@pytest.mark.parametrize("policy", ["learned", "layer-lru"])
def test_the_brain_hears_of_every_layer_also_of_a_pass_that_failed(
    chat_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """What is decided later is what would have been decided at once: trace, counters, what the policy has learned."""
    told: list[int] = []
    tell = ExpertRuntime.computed
    monkeypatch.setattr(ExpertRuntime, "computed", lambda self, *given: (told.append(1), tell(self, *given)))
    found = []
    for way in ("whole", "routed"):
        if way == "routed":
            monkeypatch.setattr(ExpertRuntime, "resident_experts", lambda *_: None)
        options = LoadOptions(experts=EVERYTHING, policy=policy)
        with LoadedModel(chat_folder("qwen3_moe"), options) as loaded:
            told.clear()
            writer = loaded.record(tmp_path / f"{way}.safetensors", "tiny")
            writer.begin_sequence()
            cache = ConversationCache(loaded.adapter.config)
            loaded.scheduler.request_start()
            reply = chat(loaded, list(range(100)), cache)
            generator = Generator(loaded.adapter.model, loaded.runtime, cache, lambda: False)
            loaded.runtime.before_access = _Calls({3: InterruptedError()})  # type: ignore[assignment]
            with pytest.raises(InterruptedError):
                generator._forward([5], Phase.DECODE)
            loaded.runtime.before_access = None
            counters = loaded.scheduler.statistics.hits, loaded.scheduler.statistics.misses
            reply += chat(loaded, [*cache.tokens, 7], cache)
            loaded.scheduler.request_end()
            writer.close()
            trace = read_trace(tmp_path / f"{way}.safetensors")
            learned = loaded.scheduler._cache.policy
            order = learned.values.tolist() if policy == "learned" else loaded.scheduler.residents()
            found.append((reply, counters, trace.experts.tolist(), trace.phase.tolist(), order))
            # 19 tokens, two layers of the pass that failed, a prompt of one token and 19 more.
            assert len(told) == (19 * 3 + 2 + 20 * 3 if way == "whole" else 0)
    assert found[0] == found[1]
    assert found[0][1][0] > 19 * 3 * 4


def test_a_smaller_budget_takes_the_general_way_and_back(chat_folder: Callable[..., Path]) -> None:
    """When memory is short some experts go in the middle of a pass; the tokens stay the same."""
    results = []
    for shrinks in (False, True):
        with LoadedModel(chat_folder("qwen3_moe"), LoadOptions(experts=EVERYTHING)) as loaded:
            slots = loaded.budget.slots
            polled = _Calls({20: slots // 2, 50: slots} if shrinks else {})
            loaded.runtime.governor = type("Governor", (), {"poll": staticmethod(polled)})  # type: ignore[assignment]
            loaded.scheduler.request_start()
            results.append(chat(loaded, list(range(100)), ConversationCache(loaded.adapter.config), 24))
            loaded.scheduler.request_end()
            assert (loaded.scheduler.statistics.evictions > 0) == shrinks and polled.count >= 72
    assert results[0] == results[1]


def test_the_shared_expert_is_computed_while_the_absent_ones_are_read(
    chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After they have been asked for, before the first is waited for; its time is the dense part's."""
    steps: list[str] = []
    for owner, name in ((TransferQueue, "demand"), (NativeFfn, "__call__"), (ExpertRuntime, "_arrival")):
        own = getattr(owner, name)

        def noted(self: object, *given: object, name: str = name, own: Callable[..., object] = own) -> object:
            steps.append(name)
            if name == "__call__":
                time.sleep(0.02)
            return own(self, *given)

        monkeypatch.setattr(owner, name, noted)
    with LoadedModel(chat_folder("deepseek_v2"), LoadOptions(experts=ExpertBudget(fraction=0.3))) as loaded:
        cache = ConversationCache(loaded.adapter.config)
        chat(loaded, [1, 2, 3], cache)
        before = loaded.runtime.snapshot()
        steps.clear()
        chat(loaded, [*cache.tokens, 4], cache)
        spent = loaded.runtime.statistics.minus(before)
    after_asking = [then for one, then in pairwise(steps) if one == "demand" and then != "demand"]
    assert len(after_asking) > 10 and set(after_asking) == {"__call__"}
    # The first of three layers is dense, and slept outside of all clocks.
    slept = 0.02 * steps.count("__call__") * 2 / 3
    assert spent.dense_s > slept and min(spent.move_s, spent.combine_s) >= 0
    assert spent.move_s + spent.combine_s < slept
