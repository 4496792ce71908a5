"""Device memory that other programs take: slots go back in blocks, experts move together, answers stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine import device_slots
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.device_slots import DeviceSlots
from moei_core.engine.devices import CpuDevice
from moei_core.engine.hints import RouterHints
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.placement import device_tier
from moei_core.engine.tiered_runtime import TieredRuntime
from moei_core.errors import DoesNotFitError
from moei_core.hub.resolve import resolve_model
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.sim.replay import replay
from moei_core.tiers import TieredScheduler
from moei_core.trace import read_trace
from tests.core.test_tiers import COSTS, cpu_device, residents, vram_for

PAGE = 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_slots, "BLOCK_NBYTES", 1)


def test_slots_in_blocks_move_together_and_memory_goes_back() -> None:
    device = CpuDevice(1 << 20)
    slots = DeviceSlots(device, 70, 2, PAGE)
    assert slots.block_slots == 3 and slots.usable == 70 and device.held_nbytes() == 72 * PAGE
    taken = [slots.take(stays=True) for _ in range(70)]
    assert len({slots.start(slot) for slot in taken}) == 70
    for slot in taken:
        slots.bytes_of(slot, PAGE).fill_(slot)
        at = slots.start(slot) + slots.memory.data_ptr()
        assert at == slots.bytes_of(slot, PAGE).data_ptr()
    for slot in taken[3:60]:
        slots.give_back(slot)
    used = taken[:3] + taken[60:]
    limit = slots.within(20)
    assert limit == 18
    moved = slots.vacate(limit, used)
    slots.shrink(limit)
    assert slots.usable == 18 and device.held_nbytes() == slots.nbytes == 20 * PAGE
    now = [moved.get(slot, slot) for slot in used]
    assert len(set(now)) == 13 and max(now) < 20
    for before, after in zip(used, now, strict=True):
        assert (slots.bytes_of(after, PAGE) == before).all()
    assert len({slots.take(stays=True) for _ in range(5)} - set(now)) == 5
    device.taken_by_others = device.free_nbytes() - 10 * PAGE
    slots.grow(70)
    assert slots.usable == 27, "as many whole blocks as can be allocated"
    device.taken_by_others = 0
    slots.grow(70)
    assert slots.usable == 70 and len({slots.take(stays=True) for _ in range(52)}) == 52
    device.close()


def options(prefetch: bool = True, share: float = 0.5) -> LoadOptions:
    folder = resolve_model("moei-demo").folder
    return LoadOptions(
        experts=ExpertBudget(fraction=0.5),
        vram=vram_for(folder, share, None),
        misses="copy",
        predictor="markov" if prefetch else None,
        prefetch=PrefetchMode.ON,
    )


def open_model(device: CpuDevice, prefetch: bool = True, share: float = 0.5) -> LoadedModel:
    return LoadedModel(resolve_model("moei-demo").folder, options(prefetch, share), device, COSTS)


def ask(model: LoadedModel, question: str = "What does moei do?") -> str:
    session = ChatSession(model, GenerationSettings(max_new_tokens=16, temperature=0))
    return "".join(piece.text for piece in session.reply(question))


def runtime_of(model: LoadedModel) -> TieredRuntime:
    assert isinstance(model.runtime, TieredRuntime)
    return model.runtime


def test_resizes_between_accesses_change_no_answer_and_replay(tmp_path: Path) -> None:
    with open_model(cpu_device()) as model:
        expected = ask(model)
    plan = {5: 40, 11: 12, 30: 64, 47: 20, 60: 64}
    with open_model(cpu_device()) as model:
        runtime, calls = runtime_of(model), [0]

        class Governor:
            def poll(self) -> int | None:
                calls[0] += 1
                return plan.get(calls[0])

        runtime.device_governor = Governor()  # type: ignore[assignment]
        writer = model.record(tmp_path / "t", "moei-demo")
        writer.begin_sequence()
        assert ask(model) == expected
        assert writer.close()
        believed, there = residents(model)
        assert believed == there
        events = read_trace(tmp_path / "t").events
        assert events is not None and (events[:, 1] == 6).sum() == len(plan)
    budget, spec = model.budget, model.spec
    assert model.device_budget is not None and isinstance(model.scheduler, TieredScheduler)
    make = POLICIES[model.options.policy]
    front = make(model.device_budget.resident, spec.num_experts)
    simulated = TieredScheduler(
        ExpertCache(budget.resident, make(budget.resident, spec.num_experts)),
        budget.working,
        device_tier(model.device_budget, front, spec, "copy", COSTS),
        PREDICTORS["markov"](spec.num_experts),
        PrefetchMode.ON,
        prefetch_slots=budget.spare,
        num_experts=spec.num_experts,
    )
    replay(read_trace(tmp_path / "t"), simulated, recorded_events=True)
    assert simulated.device_statistics == model.scheduler.device_statistics
    assert simulated.device.prefetch_statistics == model.scheduler.device.prefetch_statistics
    assert simulated.device_statistics.evictions > 0


def test_other_programs_take_device_memory_and_give_it_back() -> None:
    device = cpu_device()
    with open_model(device, prefetch=False) as model:
        expected, runtime, now = ask(model), runtime_of(model), [1e12]
        governor = runtime.device_governor
        assert governor is not None and governor.resizes == [], (
            "what the dense part has yet to take is not free"
        )
        governor.clock = lambda: now[0]
        governor.interval = 0.0
        held = device.held_nbytes()
        device.taken_by_others = device.free_nbytes() - (1 << 20)
        assert ask(model) == expected
        assert device.held_nbytes() < held / 2 and governor.current == governor.working
        assert governor.resizes[0].reason == "other programs took memory"
        device.taken_by_others = 0
        for _ in range(12):
            now[0] += 6
            assert ask(model) == expected
        assert device.held_nbytes() == held and governor.current == governor.slots
        assert [tier for tier, resizes in model.resizes.items() if resizes] == ["GPU"]


class Referring(CpuDevice):
    """As CUDA does it: what is still referred to when memory goes back stays with the process."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: list[tuple[StorageWeakRef, int]] = []
        self.kept = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        memory = super().allocate(nbytes)
        self._taken.append((StorageWeakRef(memory.untyped_storage()), nbytes))
        return memory

    def release(self, nbytes: int) -> None:
        super().release(nbytes)
        self.kept = sum(nbytes for storage, nbytes in self._taken if not storage.expired())


def test_nothing_refers_to_memory_that_goes_back() -> None:
    with open_model(device := Referring()) as model:
        expected, runtime = ask(model), runtime_of(model)
        assert runtime.resize_device(runtime._device_slots.usable // 2)
        assert device.kept == device.held_nbytes() == runtime._device_slots.nbytes
        assert ask(model) == expected


def test_slots_that_could_not_grow_are_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory was free when the governor looked, and taken when the slots were allocated."""
    device, now = CpuDevice(), [1e12]
    with open_model(device, prefetch=False) as model:
        expected, runtime = ask(model), runtime_of(model)
        governor, place = runtime.device_governor, runtime._device_slots
        assert governor is not None
        governor.clock, governor.interval = lambda: now[0], 0.0
        device.taken_by_others = device.free_nbytes() - (1 << 20)
        assert ask(model) == expected
        least, device.taken_by_others = place.usable, 0
        with monkeypatch.context() as patch:
            patch.setattr(CpuDevice, "allocate", no_memory)
            for _ in range(8):
                now[0] += 6
                assert ask(model) == expected
        assert governor.current == place.usable == least
        assert not runtime.make_room() and place.usable == least, "asked for room, it took some"


@pytest.mark.parametrize("believed", [50, 58])
def test_a_refused_allocation_gives_a_block_back_whatever_the_step(
    believed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_slots, "BLOCK_NBYTES", 10 * open_slot_nbytes())
    with open_model(cpu_device(), prefetch=False) as model:
        runtime, place = runtime_of(model), runtime_of(model)._device_slots
        assert runtime.device_governor is not None
        runtime.device_governor._current = believed
        runtime.resize_device(believed)
        before = place.usable
        assert runtime.make_room() and place.usable < before


def no_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("taken in between")


def open_slot_nbytes() -> int:
    with open_model(cpu_device(), prefetch=False) as model:
        return runtime_of(model)._device_slots.slot_nbytes


def failing_forward(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """The attention of the second layer is refused memory for so many times."""
    left = [times]
    layer = model.adapter.model.model.layers[1].self_attn
    forward = layer.forward

    def refused(*given: Any, **named: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(*given, **named)

    monkeypatch.setattr(layer, "forward", refused)
    return left


def test_a_refused_allocation_shrinks_the_slots_once_and_the_pass_is_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_model(cpu_device()) as model:
        expected = ask(model)
    with open_model(cpu_device()) as model:
        before = runtime_of(model)._device_slots.usable
        failing_forward(model, monkeypatch, 1)
        assert ask(model) == expected
        assert runtime_of(model)._device_slots.usable < before
        assert model.resizes["GPU"][0].reason == "a GPU allocation failed"
        believed, there = residents(model)
        assert believed == there
        left = failing_forward(model, monkeypatch, 100)
        with pytest.raises(DoesNotFitError, match="GPU's memory is not enough"):
            ask(model)
        assert left[0] == 98, "once and once more"
        left[0] = 0
        assert ask(model) == expected


@pytest.mark.parametrize("call", [1, 6, 40])
def test_an_early_router_that_is_refused_memory_is_asked_again(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had been decided on by then was never carried out."""
    asked = replace(options(share=0.4), predictor="router")
    folder, left, hints = resolve_model("moei-demo").folder, [0], RouterHints.hints

    def refused(self: RouterHints, *given: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return hints(self, *given)

    monkeypatch.setattr(RouterHints, "hints", refused)
    with LoadedModel(folder, asked, cpu_device(), COSTS) as model:
        expected = ask(model)
    with LoadedModel(folder, asked, cpu_device(), COSTS) as model:
        left[0] = call
        assert ask(model) == expected and left[0] < 0
        believed, there = residents(model)
        assert believed == there


def test_without_a_device_nothing_can_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions()) as model:
        failing_forward(model, monkeypatch, 1)
        with pytest.raises(DoesNotFitError):
            ask(model)


@pytest.mark.parametrize("slow", [0.0, 0.004])
def test_prefetches_that_come_late_change_no_answer(slow: float) -> None:
    questions = ("What does moei do?", "And what is an expert?", "What is the capital of France?")
    with open_model(CpuDevice(), prefetch=False) as model:
        expected = [ask(model, question) for question in questions]
    with open_model(CpuDevice(copy_delay=lambda: slow), share=0.25) as model:
        runtime_of(model)._ahead._at_once = 1
        assert [ask(model, question) for question in questions] == expected
        work, counts = model.runtime.statistics, model.device_prefetch_statistics
        assert counts.useful > 0 and counts.wasted > 0
        assert work.copies_late <= counts.useful
        if slow:
            assert work.copies_late > 0
            assert work.copies_ahead < counts.started, "what was wrong and had not begun never moved"
