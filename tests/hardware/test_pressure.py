"""Pools under memory pressure: when they shrink, how far, when they grow back, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine import slots as slot_pools
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.slots import SlotPool
from moei_core.hardware.pressure import MemoryGovernor
from moei_core.hardware.system import CgroupMemory, MemoryFacts, Pressure
from moei_core.hub.resolve import resolve_model
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import replay
from moei_core.store import slot_memory
from moei_core.trace import TraceEvent, TraceWriter, read_trace
from tests.hardware.fakes import GIB

MIB = 1 << 20
SLOT = 100 * MIB


class System:
    """A machine of 24 GiB whose free memory, pressure and clock a test sets."""

    def __init__(self, available: int = 8 * GIB) -> None:
        self.facts = MemoryFacts(24 * GIB, available, 0, 0, None)
        self.pressure = Pressure(0.0, 0)
        self.now = 0.0

    def governor(self, slots: int = 100, working: int = 8) -> MemoryGovernor:
        return MemoryGovernor(
            slots, working, SLOT, lambda: self.facts, lambda: self.pressure, lambda: self.now
        )

    def after(self, governor: MemoryGovernor, seconds: float, available: int | None = None) -> int:
        """Slots after so many seconds of polling every 100 ms, with so much memory available."""
        if available is not None:
            self.facts = replace(self.facts, available=available)
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1001
            governor.poll()
        return governor.current


def test_nothing_changes_while_memory_is_free() -> None:
    system = System()
    governor = system.governor()
    assert system.after(governor, 60) == 100
    assert governor.resizes == []


def test_a_co_runner_takes_memory_and_gives_it_back() -> None:
    system = System()
    governor = system.governor()
    assert system.after(governor, 0.1) == 100
    # The reserve of 24 GiB is 768 MiB: 468 MiB are missing, and as much as the reserve may be taken until the next
    # look: 13 slots of 100 MiB.
    assert system.after(governor, 0.1, 300 * MIB) == 87
    assert "other programs" in governor.resizes[0].reason
    # Given back slots are available memory again: no further shrinking.
    assert system.after(governor, 20, 768 * MIB) == 87
    # Not enough to keep the reserve twice: it does not swing to and fro.
    assert system.after(governor, 60, 1500 * MIB) == 87
    grown = system.after(governor, 6, 8 * GIB)
    assert grown == 100
    assert governor.resizes[-1].reason == "memory is free again"


def test_it_gives_way_before_a_fast_program_has_taken_the_reserve() -> None:
    """A container of 8 GiB, a program that takes 3 GB a second: the kernel kills whoever needs the last page."""
    limit, taken, freed = 8 * GIB, 0, 0
    system = System()
    governor = system.governor(60)
    held = 60 * SLOT
    for _ in range(64):
        taken = min(4 * GIB, taken + 66 * MIB)
        used = held - freed + taken + GIB
        assert used < limit, "killed"
        system.facts = replace(system.facts, cgroup=CgroupMemory(2, "/x", limit, used))
        system.now += 0.022
        governor.poll()
        freed = (60 - governor.current) * SLOT
    assert taken == 4 * GIB
    # What was given back is what was taken, the reserve, and a little for the next look: not everything.
    assert 2 * GIB < held - freed < 4 * GIB


def test_growing_is_slow_and_shrinking_is_not() -> None:
    system = System(100 * MIB)
    governor = system.governor()
    assert system.after(governor, 30) == 8
    assert system.after(governor, 4, 20 * GIB) == 8
    assert system.after(governor, 2) in (20, 32)
    assert system.after(governor, 10) == 100
    assert all(abs(one.after - one.before) <= 100 // 8 for one in governor.resizes if one.after > one.before)


def test_growing_that_was_refused_memory_is_noted_as_what_came_of_it() -> None:
    system = System()
    governor = system.governor()
    least = system.after(governor, 1, 300 * MIB)
    assert least < 100 and governor.resizes[-1].after == least
    noted = len(governor.resizes)
    grown = system.after(governor, 5.2, 8 * GIB)
    assert grown > least + 1 and len(governor.resizes) == noted + 1
    governor.got(least + 1)
    assert (governor.resizes[-1].before, governor.resizes[-1].after) == (least, least + 1)
    governor.got(least)
    assert governor.current == least and len(governor.resizes) == noted


def test_stalls_and_major_faults_count_when_memory_is_not_plentiful() -> None:
    system = System(GIB)
    governor = system.governor()
    system.pressure = Pressure(0.5, 0)
    assert system.after(governor, 0.1) == 92
    assert governor.resizes[-1].reason == "tasks wait for memory"
    system.pressure = Pressure(0.0, 1000)
    assert system.after(governor, 0.1) == 84
    assert "pages of this process" in governor.resizes[-1].reason
    system.facts = replace(system.facts, available=20 * GIB)
    system.pressure = Pressure(0.5, 10_000)
    assert system.after(governor, 0.1) == 84


def test_a_control_group_counts_too() -> None:
    system = System()
    system.facts = replace(system.facts, cgroup=CgroupMemory(2, "/x", 4 * GIB, 4 * GIB - 28 * MIB))
    governor = system.governor()
    # The reserve is a 32nd of the limit, 128 MiB: one slot.
    assert system.after(governor, 0.1) == 99


@pytest.mark.parametrize(("available", "least", "most"), [(8 * GIB, 8, 11), (900 * MIB, 25, 50)])
def test_looking_is_rare_and_rarer_while_much_is_free(available: int, least: int, most: int) -> None:
    looks = 0

    def memory() -> MemoryFacts:
        nonlocal looks
        looks += 1
        return system.facts

    system = System(available)
    governor = MemoryGovernor(10, 2, SLOT, memory, lambda: system.pressure, lambda: system.now)
    for _ in range(1000):
        system.now += 0.001
        governor.poll()
    assert least <= looks <= most


@given(st.lists(st.tuples(st.integers(0, 20 * GIB), st.floats(0, 1), st.integers(0, 1000)), max_size=60))
def test_always_between_the_working_set_and_the_budget(history: list[tuple[int, float, int]]) -> None:
    system = System()
    governor = system.governor(50, 6)
    faults = 0
    for available, stall, more in history:
        faults += more
        system.pressure = Pressure(stall, faults)
        assert 6 <= system.after(governor, 1.0, available) <= 50
    steps = [governor.slots, *(one.after for one in governor.resizes)]
    assert [one.before for one in governor.resizes] == steps[:-1]


def test_slots_that_are_not_needed_are_no_memory() -> None:
    pool = SlotPool(8, 16 * MIB)
    slots = [pool.take() for _ in range(8)]
    for slot in slots:
        pool.view(slot)[:] = b"x" * pool.slot_nbytes
    full = psutil.Process().memory_info().rss
    for slot in slots[2:]:
        pool.give_back(slot)
    pool.resize(3)
    assert full - psutil.Process().memory_info().rss > 80 * MIB
    assert bytes(pool.view(slots[0])[:4]) == b"xxxx"
    # Two are in use, so one more may be, until it grows again.
    assert pool.free == 1
    pool.resize(8)
    assert pool.free == 6
    assert sorted(pool.take() for _ in range(6)) == sorted(slots[2:])
    # Shrunk below what is in use, nothing is free until that is given back, and more than may be used never is.
    pool.resize(4)
    assert pool.free == 0
    for slot in slots:
        pool.view(slot)[:] = b"x" * pool.slot_nbytes
    full = psutil.Process().memory_info().rss
    for slot in slots:
        pool.give_back(slot)
    assert pool.free == 4
    assert full - psutil.Process().memory_info().rss > 60 * MIB
    pool.resize(8)
    assert pool.free == 8


@pytest.mark.skipif(not Path("/proc/vmstat").exists(), reason="no huge pages here")
def test_scattered_slots_that_share_huge_pages_are_given_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is no multiple of a huge page, so each that goes shares some with one that stays."""
    for place in (slot_memory, slot_pools):
        monkeypatch.setattr(place, "best_pages", lambda: slot_memory.HUGEPAGE)
    pool, got = SlotPool(40, 3 * MIB), _kernel_count("thp_fault_alloc")
    for slot in [pool.take() for _ in range(40)]:
        pool.view(slot)[:] = b"x" * pool.slot_nbytes
    got = _kernel_count("thp_fault_alloc") - got
    split = _kernel_count("thp_split_page")
    for slot in range(0, 40, 2):
        pool.give_back(slot)
    full = psutil.Process().memory_info().rss
    pool.resize(20)
    assert full - psutil.Process().memory_info().rss > 55 * MIB
    assert all(bytes(pool.view(slot)) == b"x" * pool.slot_nbytes for slot in range(1, 40, 2))
    if got < 50:
        pytest.skip("the system had no huge pages for all of the pool")
    # A page that is not split stays with the process, however little of it is mapped.
    assert _kernel_count("thp_split_page") - split >= 15


def _kernel_count(name: str) -> int:
    """What the kernel has counted so far, for all processes."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get(name, 0))


Plan = dict[int, int]


def chat(resizes: Plan, path: Path) -> tuple[list[str], LoadedModel]:
    """The demo's greedy answers, with the pool resized before the given accesses, recorded to ``path``."""

    class Scripted:
        accesses = 0

        def poll(self) -> int | None:
            self.accesses += 1
            return resizes.get(self.accesses)

    options = LoadOptions(experts=ExpertBudget(fraction=0.5))
    with LoadedModel(resolve_model("moei-demo").folder, options) as model:
        model.runtime.governor = Scripted()  # type: ignore[assignment]
        writer = model.runtime.recorder = TraceWriter(
            path, "moei-demo", model.spec.num_experts, model.spec.num_experts_per_tok
        )
        session = ChatSession(model, GenerationSettings(max_new_tokens=12, temperature=0))
        answers = []
        for question in ("What does moei do?", "And what is an expert?"):
            writer.begin_request()
            answers.append("".join(piece.text for piece in session.reply(question)))
        assert writer.close()
    return answers, model


def test_resizes_change_no_answer_and_replay_to_the_same_counters(tmp_path: Path) -> None:
    calm, model = chat({}, tmp_path / "calm")
    resizes = {6: 8, 20: 4, 41: 30, 60: 64}
    answers, resized = chat(resizes, tmp_path / "resized")
    assert answers == calm
    assert resized.scheduler.statistics != model.scheduler.statistics
    trace = read_trace(tmp_path / "resized")
    assert trace.events is not None
    budget = resized.budget
    capacities = [row[2] for row in trace.events.tolist() if row[1] == TraceEvent.RESIZE]
    assert capacities == [slots - budget.working for slots in resizes.values()]
    budget, experts = resized.budget, resized.spec.num_experts
    simulated = ExpertScheduler(
        ExpertCache(budget.resident, POLICIES[resized.options.policy](budget.resident, experts)),
        budget.working,
    )
    replay(trace, simulated, recorded_events=True)
    assert simulated.statistics == resized.scheduler.statistics


def test_a_loaded_model_has_a_governor(chat_folder: Callable[..., Path]) -> None:
    options = LoadOptions(experts=ExpertBudget(fraction=0.5))
    with LoadedModel(chat_folder("qwen3_moe"), options) as model:
        governor = model.runtime.governor
        assert governor is not None
        least = model.budget.working + model.budget.spare
        assert (governor.slots, governor.working) == (model.budget.slots, least)
        model.runtime.resize(governor.working)
        assert model.scheduler.resident_count == 0


@pytest.mark.parametrize("slots", [4, 10])
def test_the_pool_never_holds_more_than_it_may(slots: int) -> None:
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions(experts=ExpertBudget(0.5))) as model:
        model.runtime.governor = None
        model.runtime.resize(slots)
        pool, most = model.runtime._pool, 0
        take = pool.take

        def counted(layer: int | None = None) -> int:
            nonlocal most
            slot = take(layer)
            most = max(most, pool.count - pool.free - len(pool._retired))
            return slot

        pool.take = counted  # type: ignore[method-assign]
        session = ChatSession(model, GenerationSettings(max_new_tokens=8, temperature=0))
        list(session.reply("What is an expert?"))
        assert most == slots
