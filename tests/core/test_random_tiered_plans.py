"""Random plans with a GPU's tier in front of RAM, carried out on stand-ins: both budgets, every slot, every bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.config import ExpertBudget
from moei_core.engine import device_slots
from moei_core.engine.device_slots import LinkedSlotPool
from moei_core.engine.devices import CpuDevice
from moei_core.engine.expert_compute import ExpertWeights, expert_forward, weights_in_slot
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.tiered_runtime import TieredRuntime
from moei_core.engine.tiered_work import TieredWork
from moei_core.errors import ExpertReadError
from moei_core.prefetch import PrefetchMode
from moei_core.store.base import ExpertStore, Extent, read_expert
from moei_core.store.file_store import FileStore
from moei_core.tiers import TieredScheduler
from moei_core.types import ExpertKey, Phase
from tests.core.stepped import SteppedDevice
from tests.core.test_tiers import COSTS, vram_for

PLANS, MANY = 150, 1_500
TOKENS = 24


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_slots, "BLOCK_NBYTES", 1)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether reads fail, and whether the device has no memory to compute in."""
    state, read, compute = [False, False], FileStore.read_extent, TieredWork.compute_on_device

    def read_extent(self: FileStore, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        if state[0]:
            raise ExpertReadError(f"Reading {key} failed.")
        read(self, key, extent, slot)

    def compute_on_device(self: TieredWork, *given: Any) -> None:
        if state[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        compute(self, *given)

    monkeypatch.setattr(FileStore, "read_extent", read_extent)
    monkeypatch.setattr(TieredWork, "compute_on_device", compute_on_device)
    return state


class Watched:
    """A loaded model whose slots of both tiers are counted, whenever one is taken and after each access."""

    def __init__(self, model: LoadedModel, vram: int) -> None:
        assert isinstance(model.runtime, TieredRuntime) and isinstance(model.scheduler, TieredScheduler)
        assert isinstance(model.runtime._pool, LinkedSlotPool) and model.device_budget is not None
        self.engine, self.brain, self.pool = model.runtime, model.scheduler, model.runtime._pool
        self.there, self.device, self.vram = self.engine._device_slots, self.engine.device, vram
        self.beside = sum(line.nbytes for line in model.device_budget.lines[:-1])
        self.allowed = model.budget.slots
        self.most_copying = 0
        self._take = self.pool.take
        self.pool.take = self.take  # type: ignore[method-assign]

    @property
    def in_use(self) -> int:
        """Host slots that hold an expert, or that bytes are on their way to or from."""
        return self.pool.count - len(self.pool._free) - len(self.pool._retired)

    def take(self, layer: int | None = None) -> int:
        slot = self._take(layer)
        assert self.in_use <= self.allowed, "more host slots than the budget has"
        return slot

    def check(self) -> None:
        engine, queue, pool = self.engine, self.engine._transfers, self.pool
        assert self.in_use <= self.allowed
        # RAM: what the brain believes is what is held, and no slot has two owners.
        assert set(self.brain.residents()) == set(engine._held) == set(engine._slots)
        with queue._lock:
            loads = {id(load): load.slot for load in (*queue._active, *queue._prefetches.values())}
            others = [*loads.values(), *queue._spares, *queue._lent, *queue._returned]
        owned = [*engine._slots.values(), *others, *pool._free, *pool._retired, *pool._leaving]
        assert sorted(owned) == list(range(pool.count)), "a host slot is lost, or has two owners"
        # A slot that a copy still reads is nobody's to fill.
        copying = {slot for slot, event in pool._read_by.items() if not event.done()}
        assert not copying & {*pool._free, *pool._retired, *others}
        self.most_copying = max(self.most_copying, len(copying))
        # The device: residents, those copied ahead, and free ones are all slots that there are.
        assert set(self.brain.device.cache.residents()) == set(engine._on_device)
        assert set(self.brain.device.ahead) == {*engine._ahead._waiting, *engine._ahead._copied}
        experts = [*engine._on_device.values(), *engine._ahead.experts()]
        first = self.there._first
        slots = sorted([*(one.slot for one in experts), *self.there._free])
        assert slots == list(range(first, first + self.there.usable)), (
            "a device slot is lost, or has two owners"
        )
        assert self.device.held_nbytes() == self.there.nbytes <= self.vram - self.beside

    def settle(self) -> None:
        """Nothing may be lost in the end either: all comes to rest."""
        self.pool._settle()
        self.engine._settle_prefetches()
        self.check()


class Experts:
    """All experts in plain memory, read by themselves."""

    def __init__(self, store: ExpertStore) -> None:
        self.weights: dict[ExpertKey, ExpertWeights] = {}
        for key in store.experts():
            slot = memoryview(bytearray(store.layout(key).slot_nbytes))
            read_expert(store, key, slot)
            self.weights[key] = weights_in_slot(store.layout(key), slot)
        store.close()

    def mixed(
        self, module: Any, layer: int, hidden: torch.Tensor, index: torch.Tensor, weight: float
    ) -> torch.Tensor:
        """[tokens, hidden]: each token's experts in ascending order, each with the same weight."""
        order, _ = torch.sort(index, dim=-1)
        parts = torch.empty((*index.shape, hidden.shape[-1]))
        for expert in index.unique().tolist():
            tokens, columns = torch.nonzero(order == expert, as_tuple=True)
            output = expert_forward(module, self.weights[ExpertKey(layer, expert)], hidden[tokens])
            parts[tokens, columns] = output.to(torch.float32) * weight
        total = parts[:, 0].clone()
        for column in range(1, index.shape[-1]):
            total += parts[:, column]
        return total.to(hidden.dtype)


@pytest.fixture
def run(
    chat_folder: Callable[..., Path], broken: list[bool]
) -> Iterator[Callable[[str, str | None, str, int], None]]:
    yield lambda *case: carry_out(chat_folder("qwen3_moe"), broken, *case)


def carry_out(
    folder: Path, broken: list[bool], misses: str, predictor: str | None, how: str, plans: int
) -> None:
    """Random accesses, each held against the sum of its experts' products.

    how: the device is ``threads`` that may be late, or works when it is waited for, which is as late as can be:
    ``lazy``; or computes so and copies as early as can be: ``eager``.
    """
    rng, many = random.Random(f"{misses} {predictor} {how}"), plans >= MANY
    rate = 0.02 if many else 0.06
    torch.manual_seed(rng.randrange(1000))

    def delay() -> float:
        # So long and so often that a busy machine, too, meets copies that are on their way.
        return rng.random() * 0.01 if rng.random() < 0.05 else 0.0

    threads = how == "threads"
    device = CpuDevice(copy_delay=delay, compute_delay=delay) if threads else SteppedDevice(how == "eager")
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.4),
        vram=vram_for(folder, 0.4, None),
        misses=misses,
        predictor=predictor,
        prefetch=PrefetchMode.ON,
    )
    with LoadedModel(folder, options, device, COSTS) as model, torch.inference_mode():
        watched, engine, brain, spec = (
            Watched(model, options.vram or 0),
            model.runtime,
            model.scheduler,
            model.spec,
        )
        assert isinstance(engine, TieredRuntime)
        modules = [(layer, module) for _, layer, module in experts_modules(model.adapter.model)]
        experts = Experts(model.adapter.open_store())
        least = model.budget.working + model.budget.spare
        hidden = torch.randn(TOKENS, spec.hidden_size, dtype=model.adapter.dtype)
        failed = {ExpertReadError: 0, torch.OutOfMemoryError: 0}
        while plans > 0:
            if rng.random() < 0.1:
                brain.request_start()
            tokens = 1 if rng.random() < 0.8 else rng.randrange(2, TOKENS)
            phase = Phase.DECODE if tokens == 1 else Phase.PREFILL
            engine.forward_pass(phase, tokens)
            try:
                for layer, module in modules:
                    index = torch.stack(
                        [
                            torch.randperm(module.num_experts)[: spec.num_experts_per_tok]
                            for _ in range(tokens)
                        ]
                    )
                    weights = torch.full(index.shape, 0.25, dtype=model.adapter.dtype)
                    broken[:] = False, False
                    expected = experts.mixed(module, layer, hidden[:tokens], index, 0.25)
                    broken[:] = rng.random() < rate, rng.random() < rate
                    plans -= 1
                    found = engine.run_layer(module, layer, hidden[:tokens], index, weights)
                    if misses == "copy":
                        assert torch.equal(found, expected)
                    else:
                        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                    watched.check()
                engine.end_pass()
            except (ExpertReadError, torch.OutOfMemoryError) as error:
                failed[type(error)] += 1
                engine.abandon_pass()
                watched.check()
            broken[:] = False, False
            if rng.random() < 0.1:
                watched.allowed = rng.randrange(least, model.budget.slots + 1)
                engine.resize(watched.allowed)
                watched.check()
            if rng.random() < 0.1:
                engine.resize_device(rng.randrange(1, watched.there.slots + 1))
                watched.check()
            if rng.random() < 0.1:
                brain.request_end()
        work = engine.statistics
        # Of few plans one kind may meet none.
        assert all(failed.values()) if many else any(failed.values())
        assert work.copies > 0 and (how == "eager" or watched.most_copying > 0)
        assert (work.copies_ahead > 0) == (predictor is not None)
        watched.settle()


CASES = [
    (misses, predictor, how)
    for misses in ("copy", "auto")
    for predictor in (None, "noise", "markov")
    for how in ("threads", "lazy", "eager")
]

SOME = [
    ("copy", "noise", "eager"),
    ("copy", "markov", "threads"),
    ("auto", None, "eager"),
    ("auto", "noise", "lazy"),
]


@pytest.mark.parametrize(("misses", "predictor", "how"), SOME)
def test_both_budgets_are_kept_and_no_bit_changes(
    run: Callable[[str, str | None, str, int], None], misses: str, predictor: str | None, how: str
) -> None:
    run(misses, predictor, how, PLANS)


@pytest.mark.slow
@pytest.mark.parametrize(("misses", "predictor", "how"), CASES)
def test_over_many_plans(
    run: Callable[[str, str | None, str, int], None], misses: str, predictor: str | None, how: str
) -> None:
    run(misses, predictor, how, MANY)
