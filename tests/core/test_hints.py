"""Hints: early routers against the model's own choices, the stride predictor, and both recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moei_core.adapters.base import NothingResident
from moei_core.adapters.native_layer import NativeLayer
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.generate import Generator
from moei_core.engine.hints import RouterHints
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.stride import StridePredictor, train
from moei_core.errors import DamagedFileError, ModelNotFoundError, UsageError
from moei_core.hub.resolve import resolve_model
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import Observer, replay
from moei_core.trace import Trace, read_trace, write_trace
from moei_core.trace.hidden import HiddenSampler, HiddenStates, read_hidden, sidecar
from moei_core.types import FetchPlan, LayerAccess, Phase
from tests.watched_plans import watch_plans

Folder = Callable[..., Path]
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss")


class Watcher(NothingResident):
    """An ``ExpertsRuntime`` that computes nothing and checks early routers against what was really chosen."""

    def __init__(self, adapter: TransformersAdapter) -> None:
        self.routers = adapter.early_routers()
        self.seen: list[int] = []

    def run_layer(
        self,
        module: torch.nn.Module,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        if meanwhile is not None:
            meanwhile()
        chosen = top_k_index[0].tolist()
        assert self.routers.route(layer, hidden_states) == chosen
        later = [other for other in self.routers.layers if other > layer]
        if later and len(self.seen) % 2:
            # What a later router says of this layer's stream must not be taken for that layer's own.
            assert self.routers.route_residual(later[0], layer) is not None
        else:
            assert self.routers.route_residual(layer, layer) == chosen
        assert self.routers.route_residual(layer, layer) is None, "a stream is looked at once"
        self.seen.append(layer)
        return hidden_states * 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_norms_are_found_by_what_they_do(family: str, chat_folder: Folder) -> None:
    adapter = TransformersAdapter(chat_folder(family))
    adapter.load()
    watcher = Watcher(adapter)
    assert watcher.routers.layers == adapter.spec().moe_layers
    adapter.install(watcher)
    assert _watched(adapter.model) == len(watcher.routers.layers)
    with torch.inference_mode():
        for token in (3, 7):
            adapter.model(input_ids=torch.tensor([[token]]), use_cache=False)
    assert tuple(watcher.seen) == 2 * adapter.spec().moe_layers
    watcher.routers.close()
    assert _watched(adapter.model) == 0


def _watched(model: torch.nn.Module) -> int:
    """Layers whose residual stream is seen by somebody."""
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    native = [module.forward for module in model.modules() if isinstance(module.forward, NativeLayer)]
    return hooks + sum(layer.watcher is not None for layer in native)


class _FakeRouters:
    """Three layers: what the second chooses is known through its norm alone, the third's without it alone."""

    layers = (0, 1, 2)

    def after(self, layer: int) -> int | None:
        return layer + 1 if layer < 2 else None

    def has_norm(self, layer: int) -> bool:
        return True

    def route_residual(self, layer: int, source: int) -> list[int]:
        assert source == layer - 1
        return [layer, layer + 1] if layer == 1 else [6, 7]

    def route(self, layer: int, hidden_states: torch.Tensor) -> list[int]:
        return [layer, layer + 1] if layer == 2 else [6, 7]

    def recorded(self, source: int, norm: bool) -> None:
        return

    def close(self) -> None:
        return


def test_the_better_of_with_and_without_norm_is_kept_for_each_layer() -> None:
    hints = RouterHints(_FakeRouters())  # type: ignore[arg-type]
    for _ in range(80):
        for layer in (0, 1, 2):
            found = hints.hints(layer, torch.zeros(1, 4), (layer, layer + 1))
            assert (layer == 2) == (not found), "nothing runs after the last layer"
    assert hints.with_norm(1) and not hints.with_norm(2)
    for layer in (0, 1):
        found = hints.hints(layer, torch.zeros(1, 4), (layer, layer + 1))
        assert [hint.key for hint in found] == [(layer + 1, layer + 1), (layer + 1, layer + 2)]
        assert all(hint.score > 0.8 for hint in found), "what was always right lately is believed"
        assert all(hint.score == float(np.float16(hint.score)) for hint in found)


def test_a_stream_that_nobody_saw_leaves_the_hidden_state() -> None:
    routers = _FakeRouters()
    routers.route_residual = lambda layer, source: None  # type: ignore[method-assign, assignment, return-value]
    found = RouterHints(routers).hints(0, torch.zeros(1, 4), (0, 1))  # type: ignore[arg-type]
    assert [hint.key for hint in found] == [(1, 6), (1, 7)]


def _learnable(tokens: int = 400, layers: int = 4, experts: int = 16) -> tuple[Trace, HiddenStates]:
    """The layer input says plainly what the layer two further on chooses."""
    random = np.random.default_rng(0)
    chosen = np.stack([random.permuted(np.arange(experts))[:2] for _ in range(tokens * layers)])
    chosen = chosen.reshape(tokens, layers, 2).astype(np.uint8)
    states = random.normal(size=(tokens, layers, experts)).astype(np.float16)
    for at in range(layers - 2):
        for column in range(2):
            states[np.arange(tokens), at, chosen[:, at + 2, column]] += 4
    offsets = np.arange(0, tokens + 1, tokens // 8, dtype=np.int64)
    trace = Trace("learnable", experts, 2, tuple(range(1, layers + 1)), chosen, offsets)
    return trace, HiddenStates(np.arange(tokens, dtype=np.int64), states)


def test_the_stride_predictor_learns_what_can_be_learned(tmp_path: Path) -> None:
    trace, hidden = _learnable()
    predictor, recalls = train(trace, hidden, width=32)
    assert set(recalls) == {1, 2} and all(recall > 0.8 for recall in recalls.values())
    predictor.save(tmp_path / "p.safetensors")
    loaded = StridePredictor.load(tmp_path / "p.safetensors")
    inputs = torch.from_numpy(hidden.states[:1, 0])
    expected, found = predictor.predict(1, inputs), loaded.predict(1, inputs)
    assert expected is not None and found is not None
    assert found[0] == 3 and torch.equal(found[1], expected[1])
    assert set(torch.topk(found[1], 2).indices.tolist()) == set(trace.experts[0, 2].tolist())
    assert loaded.predict(3, inputs) is None, "nothing is two layers after the last but one"


def test_what_cannot_be_trained_or_used_is_refused(tmp_path: Path) -> None:
    trace, hidden = _learnable()
    with pytest.raises(UsageError, match="too few"):
        train(trace, HiddenStates(hidden.tokens[:40], hidden.states[:40]))
    with pytest.raises(UsageError, match="beyond"):
        train(trace, hidden, stride=3)
    with pytest.raises(ModelNotFoundError):
        StridePredictor.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nonsense")
    with pytest.raises(DamagedFileError):
        StridePredictor.load(tmp_path / "bad")
    with pytest.raises(UsageError, match="another model"):
        train(trace, hidden, width=4)[0].check({1: 8}, 16)


def test_sampled_layer_inputs_are_those_of_their_tokens(tmp_path: Path) -> None:
    sampler, tokens = HiddenSampler(6, (1, 3), 4), 0
    for count in (5, 1, 1, 9, 1):
        sampler.begin_pass(count)
        for layer in (1, 3):
            if sampler.wants:
                sampler.record(layer, np.array([[tokens + row + layer / 10] * 4 for row in sampler.wants]))
        tokens += count
    path = sidecar(tmp_path / "t.safetensors")
    assert sampler.save(path) == 6
    trace = Trace("t", 4, 1, (1, 3), np.zeros((tokens, 2, 1), np.uint8), np.array([0, tokens], np.int64))
    hidden = read_hidden(path, trace)
    assert len(set(hidden.tokens.tolist())) == 6 and hidden.tokens.max() > 5, (
        "later tokens replace earlier ones"
    )
    for at, layer in enumerate((1, 3)):
        np.testing.assert_allclose(hidden.states[:, at, 0], hidden.tokens + layer / 10, rtol=1e-2)
    with pytest.raises(DamagedFileError, match="do not belong"):
        read_hidden(path, Trace("t", 4, 1, (1,), trace.experts[:, :1], trace.sequence_offsets))
    with pytest.raises(ModelNotFoundError, match="layer inputs"):
        read_hidden(tmp_path / "none", trace)


class Collector(Observer):
    def __init__(self) -> None:
        self.plans: list[FetchPlan] = []

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)


@pytest.mark.parametrize("kind", ["router", "mixed", "file"])
def test_hints_of_a_live_run_replay_to_the_same_plans(kind: str, tmp_path: Path, chat_folder: Folder) -> None:
    folder, predictor = chat_folder("qwen3_moe"), kind
    if kind == "file":
        predictor = str(_trained(folder, tmp_path))
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.5), predictor=predictor, prefetch=PrefetchMode.ON, context=128
    )
    with LoadedModel(folder, options) as model:
        plans = watch_plans(model)
        assert model.runtime.hinter is not None
        spec, budget = model.spec, model.budget
        writer = model.record(tmp_path / "t", "m")
        session = ChatSession(model, GenerationSettings(max_new_tokens=12, temperature=0))
        writer.begin_sequence()
        list(session.reply("a"))
        writer.close()
    trace = read_trace(tmp_path / "t")
    assert trace.hints_experts is not None and (trace.hints_experts < trace.num_experts).any()
    name = "stride" if kind == "file" else kind
    simulated = ExpertScheduler(
        ExpertCache(budget.resident, POLICIES["learned"](budget.resident, spec.num_experts)),
        budget.working,
        PREDICTORS[name](spec.num_experts),
        PrefetchMode.ON,
        prefetch_slots=budget.spare,
        num_experts=spec.num_experts,
    )
    collector = Collector()
    replay(trace, simulated, collector, recorded_events=True)
    assert any(plan.prefetch for plan in plans)
    assert collector.plans == plans


def _trained(folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "stride.safetensors"
    with LoadedModel(folder, LoadOptions(context=128)) as model:
        spec, random = model.spec, np.random.default_rng(1)
    tokens, layers = 400, spec.moe_layers
    experts = random.integers(0, max(spec.num_experts.values()), (tokens, len(layers), 1)).astype(np.uint8)
    states = random.normal(size=(tokens, len(layers), spec.hidden_size)).astype(np.float16)
    offsets = np.arange(0, tokens + 1, 50, dtype=np.int64)
    trace = Trace("random", max(spec.num_experts.values()), 1, layers, experts, offsets)
    write_trace(trace, tmp_path / "random.safetensors")
    predictor, _ = train(trace, HiddenStates(np.arange(tokens), states), width=8)
    for weights in predictor.weights.values():
        weights["b2"] += 3.0  # sure of itself, so that there is something to prefetch
    predictor.save(file)
    return file


def test_a_predictor_that_is_not_there_is_refused(chat_folder: Folder, tmp_path: Path) -> None:
    folder = chat_folder("mixtral")
    for predictor, error in (
        ("oracle", UsageError),
        ("stride", UsageError),
        (str(tmp_path / "none.safetensors"), ModelNotFoundError),
        (str(_trained(chat_folder("qwen3_moe"), tmp_path)), UsageError),
    ):
        with pytest.raises(error):
            LoadedModel(folder, LoadOptions(predictor=predictor, context=128))


@pytest.mark.parametrize("mode", PrefetchMode)
def test_a_model_is_watched_only_while_hints_are_wanted(mode: PrefetchMode) -> None:
    """A hook takes its layer off the native way; a predictor that nobody follows must not cost that."""
    options = LoadOptions(experts=ExpertBudget(fraction=0.25), predictor="mixed", prefetch=mode)
    with LoadedModel(resolve_model("moei-demo").folder, options) as model:
        generator = Generator(
            model.adapter.model, model.runtime, ConversationCache(model.adapter.config), lambda: False
        )
        generator._forward([1, 2, 3], Phase.PREFILL)
        generator._forward([4], Phase.DECODE)
        layers = sum(isinstance(module.forward, NativeLayer) for module in model.adapter.model.modules())
        assert _watched(model.adapter.model) == (layers if mode is PrefetchMode.ON else 0)
        assert not any(module._forward_pre_hooks for module in model.adapter.model.modules())
        model.scheduler.prefetch_mode(PrefetchMode.OFF)
        generator._forward([5], Phase.DECODE)
        assert _watched(model.adapter.model) == 0
