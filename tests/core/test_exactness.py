"""E1 and E2 of the architecture: what was cached never changes a bit, and the model is transformers' model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moei_core.adapters.skeleton import experts_modules
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import FULL_OVERLAP, ExpertBudget, Overlap
from moei_core.engine import runtime
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.transfers import TransferQueue
from moei_core.hub.resolve import resolve_model
from moei_core.prefetch import PrefetchMode
from moei_core.store.base import PAGE, Extent
from moei_core.store.file_store import FileStore
from moei_core.types import ExpertKey, Phase
from tests.tiny_models import FAMILIES

PROMPT, STEPS = 64, 16
MODELS = (*FAMILIES, "moei-demo")


@pytest.fixture
def folder(request: pytest.FixtureRequest, chat_folder: Callable[..., Path]) -> Path:
    name = request.param
    return resolve_model(name).folder if name == "moei-demo" else chat_folder(name, "bfloat16")


def smallest(folder: Path) -> ExpertBudget:
    """The least slots that the model runs with: one token's experts."""
    adapter = TransformersAdapter(folder)
    adapter.load()
    spec = adapter.spec()
    return ExpertBudget(fraction=spec.num_experts_per_tok / spec.total_experts)


def budgets(folder: Path) -> list[ExpertBudget]:
    return [ExpertBudget(fraction=1.0), ExpertBudget(fraction=0.5), smallest(folder)]


def prompt_tokens(vocabulary: int) -> list[int]:
    return torch.randint(0, vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(7)).tolist()


def stepwise(
    model: nn.Module,
    cache: object,
    prompt: list[int],
    forced: list[int] | None,
    before_pass: Callable[[Phase, int], None] = lambda phase, tokens: None,
) -> tuple[torch.Tensor, list[int]]:
    """Logits of every position [PROMPT + STEPS, vocabulary], the decode tokens greedy or ``forced``."""
    with torch.inference_mode():
        before_pass(Phase.PREFILL, len(prompt))
        rows = [model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits[0]]
        tokens: list[int] = []
        for step in range(STEPS):
            tokens.append(int(rows[-1][-1].argmax()) if forced is None else forced[step])
            before_pass(Phase.DECODE, 1)
            rows.append(model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(rows).float(), tokens


def reference(
    folder: Path, dtype: torch.dtype, implementation: str, forced: list[int] | None = None
) -> tuple[torch.Tensor, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=implementation)
    assert all(list(m.parameters(recurse=False)) for _, _, m in experts_modules(model))
    return stepwise(model, _dynamic(model), prompt_tokens(model.config.vocab_size), forced)


def _dynamic(model: nn.Module) -> object:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def ours(
    folder: Path,
    dtype: str,
    budget: ExpertBudget,
    forced: list[int] | None = None,
    predictor: str | None = None,
    overlap: Overlap = FULL_OVERLAP,
) -> tuple[torch.Tensor, list[int], LoadedModel]:
    options = LoadOptions(
        None, budget, None, dtype=dtype, predictor=predictor, prefetch=PrefetchMode.ON, overlap=overlap
    )
    with LoadedModel(folder, options) as loaded:
        torch.set_num_threads(1)
        assert loaded.budget.slots <= budget.slots(loaded.spec.total_experts, loaded.budget.slot_nbytes)
        cache = ConversationCache(loaded.adapter.config)
        prompt = prompt_tokens(loaded.adapter.config.vocab_size)
        logits, tokens = stepwise(
            loaded.adapter.model, cache.cache, prompt, forced, loaded.runtime.forward_pass
        )
        return logits, tokens, loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_e1_logits_are_bit_identical_whatever_is_resident(folder: Path, dtype: str) -> None:
    everything, tokens, loaded = ours(folder, dtype, ExpertBudget(fraction=1.0))
    assert loaded.scheduler.statistics.evictions == loaded.scheduler.statistics.bypasses == 0
    for budget in budgets(folder)[1:]:
        logits, _, loaded = ours(folder, dtype, budget, forced=tokens)
        assert loaded.runtime.statistics.loads > loaded.budget.slots, "the smaller budget never had to reload"
        assert torch.equal(logits, everything)


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_e2_float32_is_transformers_eager(folder: Path) -> None:
    expected, expected_tokens = reference(folder, torch.float32, "eager")
    for budget in budgets(folder):
        logits, tokens, _ = ours(folder, "float32", budget)
        assert tokens == expected_tokens
        assert (logits - expected).abs().max() <= 1e-4


THEIRS = ("eager", "grouped_mm", "batched_mm")


def rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_e2_bfloat16_layer_error_is_within_transformers_own(folder: Path) -> None:
    """The experts of each layer, on the inputs of a float32 run: nearer to float32 than transformers' ways."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    calls: dict[int, tuple[torch.Tensor, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _, given, __, layer=layer: calls.__setitem__(layer, given))
        for _, layer, module in experts_modules(exact)
    ]
    with torch.inference_mode():
        exact(torch.tensor([prompt_tokens(exact.config.vocab_size)]))
    for hook in hooks:
        hook.remove()
    calls = {layer: (x.bfloat16(), index, scale.bfloat16()) for layer, (x, index, scale) in calls.items()}
    expected = {
        layer: module(calls[layer][0].float(), calls[layer][1], calls[layer][2].float())
        for _, layer, module in experts_modules(exact)
    }

    def errors(model: nn.Module) -> list[float]:
        with torch.inference_mode():
            return [rms(m(*calls[layer]).float() - expected[layer]) for _, layer, m in experts_modules(model)]

    theirs = [
        errors(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation=name)
        )
        for name in THEIRS
    ]
    with LoadedModel(folder, LoadOptions(experts=smallest(folder), dtype="bfloat16")) as loaded:
        torch.set_num_threads(1)
        for ours_of_layer, *theirs_of_layer in zip(errors(loaded.adapter.model), *theirs, strict=True):
            assert 0 < ours_of_layer <= max(theirs_of_layer)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_e2_bfloat16_logits_are_as_near_as_transformers_own(folder: Path) -> None:
    """Whole runs, against float32: the median error of a logit. Where a router's choice is close, rounding flips
    it, and then the error of any implementation jumps: hence the slack here, and the strict bound above."""

    def median(logits: torch.Tensor) -> float:
        return float((logits - exact).abs().median())

    exact, tokens = reference(folder, torch.float32, "eager")
    theirs = [median(reference(folder, torch.bfloat16, name, tokens)[0]) for name in THEIRS]
    for budget in budgets(folder):
        assert median(ours(folder, "bfloat16", budget, tokens)[0]) <= 1.5 * max(theirs)


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_tiny_models_are_a_real_test(folder: Path, chat_folder: Callable[..., Path]) -> None:
    """Logits of a standard deviation near 1, and every expert used: otherwise the tests above prove little."""
    logits, _, loaded = ours(folder, "float32", ExpertBudget(fraction=1.0))
    assert 0.5 < logits.std() < 2
    assert loaded.scheduler.resident_count == loaded.spec.total_experts


def poison(adapter: TransformersAdapter) -> None:
    """Give every experts module weights of NaN, where it now has placeholders without memory."""
    for _, _, module in experts_modules(adapter.model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            bad = torch.full(parameter.shape, float("nan"), dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(bad, requires_grad=False))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    original = TransformersAdapter.load

    def load(self: TransformersAdapter) -> None:
        poison(self)
        original(self)

    monkeypatch.setattr(TransformersAdapter, "load", load)
    yield


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_the_modules_own_expert_weights_are_gone(folder: Path) -> None:
    logits, _, loaded = ours(folder, "float32", smallest(folder))
    for _, _, module in experts_modules(loaded.adapter.model):
        assert not list(module.named_parameters(recurse=False))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_buffers_and_dense_weights_equal_a_normal_load(folder: Path) -> None:
    """Non-persistent buffers such as inv_freq are what the loading traps spoil."""
    normal = AutoModelForCausalLM.from_pretrained(folder)
    adapter = TransformersAdapter(folder)
    adapter.load()
    expected = {**dict(normal.named_parameters()), **dict(normal.named_buffers())}
    found = {**dict(adapter.model.named_parameters()), **dict(adapter.model.named_buffers())}
    missing = expected.keys() - found.keys()
    assert missing and all(".experts." in name for name in missing)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


WAYS = (
    ("noise", 1, Overlap(PAGE)),
    ("mixed", 4, Overlap(3 * PAGE, reorder=False)),
    ("popularity", 2, Overlap(1 << 20, preempt=False)),
    ("noise", 3, Overlap(PAGE, preempt=False, stream=False)),
)


def check_every_way_of_arriving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are those of a run with everything resident when experts are prefetched by good and by random
    predictions, in chunks of any size, by any number of readers, late, and however moving and computing share the
    time."""
    everything, tokens, _ = ours(folder, "bfloat16", ExpertBudget(fraction=1.0))
    read, rng = FileStore.read_extent, random.Random(5)

    def read_late(self: FileStore, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        time.sleep(rng.random() * 5e-4)
        read(self, key, extent, slot)

    monkeypatch.setattr(FileStore, "read_extent", read_late)
    for predictor, readers, overlap in WAYS:
        monkeypatch.setattr(runtime, "TransferQueue", partial(TransferQueue, readers=readers))
        half = ExpertBudget(fraction=0.5)
        logits, _, loaded = ours(folder, "bfloat16", half, tokens, predictor, overlap)
        assert loaded.scheduler.prefetch_statistics.started > 0
        assert torch.equal(logits, everything)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_e1_however_experts_arrive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_every_way_of_arriving(folder, monkeypatch)
