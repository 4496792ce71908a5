"""The clock of the chain disk -> RAM -> GPU in closed forms, and the tier's rule judged by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.sim.hardware import PRESETS
from moei_core.sim.replay import PassAccesses, replay
from moei_core.sim.tiered_clock import TieredClock, link_costs
from moei_core.tiers import DeviceTier, TieredScheduler
from moei_core.trace.synthetic import synthetic_trace
from moei_core.types import DevicePlan, ExpertKey, FetchPlan, LayerAccess, Phase, Wave

MB = 1_000_000
MACHINE = replace(PRESETS["gpu-pcie4"], dense_seconds=1e-3, link_latency=0.0, disk_latency=0.0)
RAM = 40e9
KEYS = tuple(ExpertKey(0, expert) for expert in range(4))
ACCESS = LayerAccess(0, (0, 1, 2, 3), (1, 1, 1, 1), Phase.DECODE)
HELD = (Wave((), (), KEYS, ()),)
ABSENT = (Wave((), KEYS, KEYS, ()),)


def seconds(*plans: FetchPlan) -> list[float]:
    clock = TieredClock(MACHINE, RAM, {0: MB})
    found = []
    for plan in plans:
        clock.begin_pass(PassAccesses(0, Phase.DECODE, 1, True, 0, [ACCESS], None))
        clock.carry_out(ACCESS, plan)
        found.append(clock.end_pass()[1] - MACHINE.dense_seconds)
    return found


def test_closed_forms() -> None:
    gpu, ram = MB / MACHINE.memory_bandwidth, MB / RAM
    link, disk = MB / MACHINE.link_bandwidth, MB / MACHINE.disk_bandwidth
    on_gpu = FetchPlan(0, (), 0, 0, device=DevicePlan(KEYS))
    in_ram = FetchPlan(0, HELD, 4, 0, device=DevicePlan(()))
    copied = FetchPlan(0, HELD, 4, 0, device=DevicePlan((), copy=KEYS))
    read = FetchPlan(0, ABSENT, 0, 4, device=DevicePlan(()))
    all_the_way = FetchPlan(0, ABSENT, 0, 4, device=DevicePlan((), copy=KEYS))
    for plan, expected in (
        (on_gpu, 4 * gpu),
        (in_ram, 4 * ram),
        (copied, 4 * link + gpu),
        (read, 4 * disk + ram),
        (all_the_way, 4 * disk + link + gpu),
    ):
        assert seconds(plan) == [pytest.approx(expected)]


def test_a_promotion_is_waited_for_only_if_it_is_wanted_too_soon() -> None:
    promoting = FetchPlan(0, HELD, 4, 0, device=DevicePlan((), promote=KEYS))
    then = FetchPlan(0, (), 0, 0, device=DevicePlan(KEYS))
    first, second = seconds(promoting, then)
    assert first == pytest.approx(4 * MB / RAM), "promotions go on behind it"
    assert second == pytest.approx(4 * MB / MACHINE.memory_bandwidth), "a dense part later they are there"


@pytest.mark.parametrize("ram_bandwidth", [10e9, 40e9, 80e9])
def test_the_rule_is_no_slower_than_always_copying(ram_bandwidth: float) -> None:
    """Half of the experts on the GPU, all of them in RAM; a tenth of slack for what the rule cannot know."""
    trace = synthetic_trace(4, 50, 4, 32, 4, 1)

    def run(rule: bool) -> float:
        slots, experts = 64, trace.experts_by_layer
        costs = link_costs(MACHINE, ram_bandwidth)
        tier = DeviceTier(
            ExpertCache(slots, POLICIES["layer-lru"](slots, experts)),
            experts,
            dict.fromkeys(experts, costs.copy_from(MB) if rule else 1),
            dict.fromkeys(experts, costs.promote_share(MB)),
        )
        everything = sum(experts.values())
        ram = ExpertCache(everything, POLICIES["layer-lru"](everything, experts))
        clock = TieredClock(MACHINE, ram_bandwidth, dict.fromkeys(experts, MB))
        replay(trace, TieredScheduler(ram, trace.num_experts_per_tok, tier), clock)
        assert clock.costs.link_nbytes > 0 and clock.costs.disk_nbytes <= everything * MB
        return clock.costs.seconds

    assert run(True) <= 1.1 * run(False)


def test_a_prefetch_moves_while_the_link_is_idle_and_is_waited_for_if_it_is_late() -> None:
    gpu, link, ram = MB / MACHINE.memory_bandwidth, MB / MACHINE.link_bandwidth, MB / RAM
    ahead = FetchPlan(0, HELD, 4, 0, device=DevicePlan((), prefetch=KEYS))
    right = FetchPlan(0, (), 0, 0, device=DevicePlan((), foreseen=KEYS))
    wrong = FetchPlan(0, HELD, 4, 0, device=DevicePlan((), cancel=KEYS))
    first, second = seconds(ahead, right)
    assert first == pytest.approx(4 * ram) and second == pytest.approx(4 * gpu)
    assert seconds(ahead, wrong)[1] == pytest.approx(4 * ram)
    slow = replace(MACHINE, dense_seconds=1e-9)
    clock = TieredClock(slow, RAM, {0: MB})
    for plan in (ahead, right):
        clock.begin_pass(PassAccesses(0, Phase.DECODE, 1, True, 0, [ACCESS], None))
        clock.carry_out(ACCESS, plan)
        took = clock.end_pass()[1]
    # While RAM computed, the link carried as much as it can; the rest came when its router had spoken.
    assert took == pytest.approx(4 * link - 4 * ram + gpu) and clock.late == 2


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_replay_with_prefetches_into_both_tiers(share: float) -> None:
    """The same trace twice: the same plans; most prefetches arrive; nothing is in two places at once."""
    trace = synthetic_trace(4, 60, 4, 32, 4, 1)
    experts = trace.experts_by_layer

    def run() -> tuple[TieredScheduler, TieredClock]:
        costs, slots = link_costs(MACHINE, RAM), 32
        tier = DeviceTier(
            ExpertCache(slots, POLICIES["layer-lru"](slots, experts)),
            experts,
            dict.fromkeys(experts, costs.copy_from(MB)),
            dict.fromkeys(experts, 0.0),
            prefetch_slots=8,
        )
        held = int(share * sum(experts.values()))
        ram = ExpertCache(held, POLICIES["layer-lru"](held, experts))
        predictor = PREDICTORS["markov"](experts)
        scheduler = TieredScheduler(ram, trace.num_experts_per_tok, tier, predictor, PrefetchMode.ON)
        clock = TieredClock(MACHINE, RAM, dict.fromkeys(experts, MB), scheduler)
        replay(trace, scheduler, clock)
        return scheduler, clock

    (scheduler, clock), (again, other) = run(), run()
    counts = scheduler.device.prefetch_statistics
    assert counts == again.device.prefetch_statistics and clock.costs == other.costs
    assert counts.started == counts.useful + counts.wasted + len(scheduler.device.ahead)
    assert counts.useful > 30 and clock.late < counts.useful
    if share < 1:
        assert scheduler.prefetch_statistics.started > 0
