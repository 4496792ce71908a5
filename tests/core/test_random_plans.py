"""10,000 random plans carried out for real: the budget of slots is never exceeded and no slot is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.errors import ExpertReadError
from moei_core.prefetch import PrefetchMode
from moei_core.store.base import Extent
from moei_core.store.file_store import FileStore
from moei_core.types import ExpertKey, Phase
from tests.watched_plans import slots_of

PLANS = 10_000
LIVE = [name for name, policy in POLICIES.items() if not getattr(policy, "needs_future", False)]
CASES = [(policy, "noise" if number % 3 else None) for number, policy in enumerate(LIVE)]


class Bound:
    """Counts the slots in use whenever one is taken, and holds them against what is allowed."""

    def __init__(self, model: LoadedModel) -> None:
        self.pool, self.allowed, self.most = model.runtime._pool, model.budget.slots, 0
        self._take = self.pool.take
        self.pool.take = self.take  # type: ignore[method-assign]

    @property
    def in_use(self) -> int:
        return self.pool.count - self.pool.free - len(self.pool._retired)

    def take(self, layer: int | None = None) -> int:
        slot = self._take(layer)
        self.most = max(self.most, self.in_use)
        assert self.in_use <= self.allowed, "more slots than the budget has"
        return slot


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("policy", "predictor"), CASES)
def test_the_budget_is_kept(
    policy: str, predictor: str | None, chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single tokens and prompts, requests that end anywhere, resizes, and reads that fail."""
    rng = random.Random(f"{policy} {predictor}")
    broken = [False]
    read = FileStore.read_extent

    def read_extent(self: FileStore, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        if broken[0]:
            raise ExpertReadError(f"Reading {key} failed.")
        read(self, key, extent, slot)

    monkeypatch.setattr(FileStore, "read_extent", read_extent)
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.4),
        policy=policy,
        predictor=predictor,
        prefetch=PrefetchMode.ON,
        context=64,
    )
    with LoadedModel(chat_folder("qwen3_moe"), options) as model, torch.inference_mode():
        engine, brain, spec = model.runtime, model.scheduler, model.spec
        bound = Bound(model)
        least = model.budget.working + model.budget.spare
        modules = [(layer, module) for _, layer, module in experts_modules(model.adapter.model)]
        hidden = torch.randn(24, spec.hidden_size, dtype=model.adapter.dtype)
        left = -(-PLANS // len(CASES))
        failed = 0
        while left > 0:
            if rng.random() < 0.1:
                brain.request_start()
            tokens = 1 if rng.random() < 0.9 else rng.randrange(2, 24)
            engine.forward_pass(Phase.DECODE if tokens == 1 else Phase.PREFILL, tokens)
            try:
                for layer, module in modules:
                    index = torch.stack(
                        [
                            torch.randperm(module.num_experts)[: spec.num_experts_per_tok]
                            for _ in range(tokens)
                        ]
                    )
                    broken[0] = rng.random() < 0.02
                    left -= 1
                    weights = torch.full(index.shape, 0.25, dtype=model.adapter.dtype)
                    engine.run_layer(module, layer, hidden[:tokens], index, weights)
                    assert set(brain.residents()) == set(engine._held) == set(engine._slots)
                    assert bound.in_use <= bound.allowed
                engine.end_pass()
            except ExpertReadError:
                failed += 1
            broken[0] = False
            assert set(brain.residents()) == set(engine._held) == set(engine._slots)
            if rng.random() < 0.1:
                bound.allowed = rng.randrange(least, model.budget.slots + 1)
                engine.resize(bound.allowed)
                assert bound.in_use <= bound.allowed
            if rng.random() < 0.1:
                brain.request_end()
        assert failed > 0 and bound.most > least
        # No slot was lost: each is free, held, or with the queue.
        engine.resize(model.budget.slots)
        engine._settle_prefetches()
        others = slots_of(engine._transfers)
        assert engine._pool.free + len(engine._slots) + len(others) == model.budget.slots
