"""The contract of every registered policy, and the properties of single ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.expert_sizes import ExpertSizes, experts_in, slots_for
from moei_core.cache.policies import DEFAULT_POLICY, POLICIES
from moei_core.cache.policies.allocation import AllocatedLRU, allocate
from moei_core.cache.policies.cost_aware import CostAware
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import Observer, passes, replay
from moei_core.trace import Trace, next_uses
from moei_core.types import ExpertKey, FetchPlan, LayerAccess

from .synthetic import access, make_trace

TRACE = make_trace()
FUTURE = next_uses(TRACE)
ONLINE = [name for name in POLICIES if not POLICIES[name](1, {0: 1}).needs_future]


class Checker(Observer):
    """Carries plans out on a set, as the engine does on slots, and checks every promise of a plan."""

    def __init__(self, slots: int) -> None:
        self.slots, self.held, self.plans = slots, set[ExpertKey](), list[FetchPlan]()

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)
        wanted = {ExpertKey(access.layer, expert) for expert in access.experts}
        assert plan.hits == len(wanted & self.held)
        assert plan.misses == len(wanted) - plan.hits
        computed: list[ExpertKey] = []
        for wave in plan.waves:
            for key in wave.evict:
                assert key not in wanted, "an expert of the access itself must not be evicted for it"
                self.held.remove(key)
            assert not self.held.intersection(wave.load)
            self.held.update(wave.load)
            assert len(self.held) <= self.slots
            assert self.held.issuperset(wave.compute)
            computed += wave.compute
            self.held.difference_update(wave.release)
        assert sorted(computed) == sorted(wanted)


def run(
    name: str, slots: int, trace: Trace = TRACE, working: int | None = None
) -> tuple[ExpertScheduler, Checker]:
    policy = POLICIES[name](slots, trace.experts_by_layer)
    working = trace.num_experts_per_tok if working is None else working
    scheduler = ExpertScheduler(ExpertCache(slots, policy), working)
    checker = Checker(slots + working)
    future = next_uses(trace) if policy.needs_future else None
    replay(trace, scheduler, checker, next_uses=future)
    assert sorted(checker.held) == scheduler.residents()
    return scheduler, checker


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("slots", [0, 1, 5, 16, 40, 64])
def test_every_plan_keeps_its_promises(name: str, slots: int) -> None:
    scheduler, checker = run(name, slots)
    assert scheduler.resident_count <= slots
    assert scheduler.statistics.hits + scheduler.statistics.misses == TRACE.experts.size
    again = run(name, slots)[1]
    assert again.plans == checker.plans, "the same trace must give the same plans"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_events_keep_the_promises(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ONLINE))
    num_experts = {0: 8, 2: 8, 3: 6}
    slots = data.draw(st.integers(0, 22))
    working = data.draw(st.integers(1, 4))
    scheduler = ExpertScheduler(ExpertCache(slots, POLICIES[name](slots, num_experts)), working)
    checker = Checker(slots + working)
    for _ in range(data.draw(st.integers(0, 30))):
        event = data.draw(
            st.sampled_from(["access", "pass", "request", "end", "cancel", "resize", "prefill"])
        )
        if event in ("access", "prefill"):
            layer = data.draw(st.sampled_from(list(num_experts)))
            experts = data.draw(st.sets(st.integers(0, num_experts[layer] - 1)))
            counts = tuple(data.draw(st.integers(1, 5)) for _ in experts) if event == "prefill" else ()
            one = access(layer, *experts, counts=counts)
            checker.carry_out(one, scheduler.access(one))
        elif event == "pass":
            scheduler.forward_pass(one.phase if "one" in locals() else access(0, 0).phase)
        elif event == "request":
            scheduler.request_start()
        elif event == "end":
            scheduler.request_end()
        elif event == "cancel" and checker.held:
            gone = min(checker.held)
            checker.held.remove(gone)
            scheduler.cancel_load(gone)
            scheduler.cancel_load(gone)
        elif event == "resize":
            slots = data.draw(st.integers(0, 22))
            checker.held.difference_update(scheduler.resize(slots))
            checker.slots = slots + working
        assert sorted(checker.held) == scheduler.residents()
        assert scheduler.resident_count <= slots


@pytest.mark.parametrize(
    ("bound", "rivals"),
    [
        ("layer-belady", ["layer-lru", "layer-lfu", "request-lfu", "decayed-lfu"]),
        ("layer-belady-bypass", ["layer-belady", "layer-lru", "layer-lfu", "static"]),
        ("global-belady", ["global-lru", "global-lfu", "activation-aware", "cost-aware", "layer-belady"]),
        ("global-belady-bypass", ["global-belady", "layer-belady-bypass", *ONLINE]),
    ],
)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.25, 0.5, 0.75]))
def test_belady_of_the_same_shape_is_never_beaten(
    bound: str, rivals: list[str], seed: int, share: float
) -> None:
    trace = make_trace(sequences=3, length=25, layers=3, num_experts=12, seed=seed)
    slots = int(share * 12) * 3
    best = run(bound, slots, trace)[0].statistics.hits
    for rival in rivals:
        assert run(rival, slots, trace)[0].statistics.hits <= best, rival


def test_belady_on_a_sequence_worked_out_by_hand() -> None:
    # One layer, two slots, one expert a token: 0 1 2 0 1 2. Optimal with forced admission: 2 hits.
    experts = np.array([0, 1, 2, 0, 1, 2], np.uint8).reshape(6, 1, 1)
    trace = Trace("hand", 3, 1, (0,), experts, np.array([0, 6], np.int64))
    assert run("layer-belady", 2, trace)[0].statistics.hits == 2
    assert run("layer-lru", 2, trace)[0].statistics.hits == 0
    # With bypass expert 2 is never let in, so 0 and 1 stay.
    assert run("layer-belady-bypass", 2, trace)[0].statistics.hits == 2


def test_next_uses_are_those_of_a_slow_search() -> None:
    slow = np.full(TRACE.experts.shape, 1 << 60, np.int64)
    layers = len(TRACE.moe_layers)
    for token, layer, column in np.ndindex(TRACE.experts.shape):
        later = np.flatnonzero(
            (TRACE.experts[token + 1 :, layer] == TRACE.experts[token, layer, column]).any(axis=1)
        )
        if len(later):
            slow[token, layer, column] = (token + 1 + later[0]) * layers + layer
    np.testing.assert_array_equal(FUTURE, slow)


def test_a_global_lru_is_flooded_and_quotas_are_not() -> None:
    slots = (len(TRACE.moe_layers) - 1) * TRACE.num_experts_per_tok
    assert run("global-lru", slots)[0].statistics.hits == 0
    assert run("layer-lru", slots)[0].statistics.hits > 0


def test_on_demand_never_hits() -> None:
    assert run("on-demand", 40)[0].statistics.hits == 0


def test_static_keeps_its_list() -> None:
    policy = POLICIES["static"](4, {0: 8})
    policy.LEARNING = 4  # type: ignore[attr-defined]
    scheduler = ExpertScheduler(ExpertCache(4, policy), 2)
    for number in range(40):
        scheduler.forward_pass(access(0, 0).phase)
        scheduler.access(access(0, number % 2, 2 + number % 2) if number < 4 else access(0, 6, 7))
    assert [key.expert for key in scheduler.residents()] == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [2, 4])
def test_the_default_learns_from_passes_over_a_few_tokens(tokens: int) -> None:
    """Several users' tokens at once are evidence as one user's are, of single steps and not of many."""
    one_by_one = make_trace(sequences=4, length=200 * tokens, layers=3, num_experts=64, top_k=4, seed=5)
    bounds = np.arange(0, one_by_one.tokens + 1, tokens)
    trace = replace(one_by_one, pass_offsets=bounds.astype(np.int64))
    rates = {name: run(name, 16 * 3, trace)[0].statistics.hit_rate for name in (DEFAULT_POLICY, "layer-lru")}
    assert rates[DEFAULT_POLICY] > rates["layer-lru"] + 0.01


def test_allocation_is_optimal() -> None:
    random = np.random.default_rng(1)
    curves = [np.sort(random.integers(0, 50, 5))[::-1].tolist() for _ in range(3)]
    for capacity in range(13):
        quotas = allocate(curves, capacity)
        cost = sum(curve[quota] for curve, quota in zip(curves, quotas, strict=True))
        options = [
            curves[0][a] + curves[1][b] + curves[2][c]
            for a in range(5)
            for b in range(5)
            for c in range(5)
            if a + b + c <= capacity
        ]
        assert sum(quotas) <= capacity
        assert cost == min(options)


def allocated(
    slots: int, first: int, experts: Callable[[int], tuple[int, int]]
) -> tuple[AllocatedLRU, ExpertScheduler]:
    """200 passes over two layers of 16. first: passes before quotas. experts: of both layers, by the pass's number."""
    policy = AllocatedLRU(slots, {0: 16, 1: 16})
    policy.FIRST = policy._next = first
    scheduler = ExpertScheduler(ExpertCache(slots, policy), 1)
    for number in range(200):
        scheduler.forward_pass(access(0, 0).phase)
        for layer, expert in enumerate(experts(number)):
            scheduler.access(access(layer, expert))
    return policy, scheduler


def test_allocation_moves_slots_to_where_they_help() -> None:
    """Layer 0 cycles through more experts than fit; layer 1 has a working set that needs one slot more."""
    policy, scheduler = allocated(6, 64, lambda number: (number % 16, number % 5))
    assert policy.quota(1) >= 5
    assert scheduler.resident_count <= 6


def test_allocation_leaves_no_slot_unused() -> None:
    """With room for all experts each misses once, also one that is first used after quotas were computed."""
    # Quotas are computed after 8, 16, 32, 64 and 128 passes, which have met a third of these at most.
    _, scheduler = allocated(32, 8, lambda number: (number // 10 % 16, number % 2))
    assert scheduler.statistics.misses == 16 + 2
    assert scheduler.statistics.evictions == 0


def test_cost_aware_prefers_small_experts_when_latency_counts() -> None:
    policy = CostAware(2, {0: 4, 1: 4})
    policy.set_sizes({0: 10_000_000, 1: 1_000_000}, latency=1e-3, bandwidth=1e9)
    scheduler = ExpertScheduler(ExpertCache(2, policy), 1)
    for layer, expert in ((0, 0), (1, 0), (0, 1)):
        scheduler.access(access(layer, expert))
    assert ExpertKey(1, 0) in scheduler.residents()


def test_unequal_sizes_keep_the_byte_budget() -> None:
    num_experts, nbytes = {0: 4, 1: 4}, {0: 3, 1: 5}
    sizes = ExpertSizes(nbytes, num_experts)
    policy = CostAware(experts_in(4, sizes), num_experts)
    cache = ExpertCache(4, policy, sizes=sizes)
    scheduler = ExpertScheduler(cache, 2)
    assert (policy._weight[0] > policy._weight[1]).all(), "small ones cost more a byte"
    most, rng = 0, np.random.default_rng(0)
    for number in range(80):
        scheduler.access(access(number % 2, *sorted(rng.choice(4, 2, replace=False).tolist())))
        assert sum(nbytes[key.layer] for key in scheduler.residents()) <= 4 * 5
        most = max(most, len(scheduler.residents()))
    assert most == 5, "four large ones, or five that are not all large"
    assert scheduler.resize(2)
    assert sum(nbytes[key.layer] for key in scheduler.residents()) <= 2 * 5


def test_slots_of_unequal_experts() -> None:
    sizes = ExpertSizes({0: 3, 1: 5}, {0: 4, 1: 8})
    assert (sizes.largest, sizes.smallest, sizes.total, sizes.whole) == (5, 3, 12, 11)
    assert [sizes.experts(slots) for slots in (0, 1, 5, 10, 11, 99)] == [0, 1, 5, 11, 12, 12]
    assert experts_in(5, None) == 5
    assert slots_for({0: 4, 1: 8}, None) == 12
    assert slots_for({0: 4, 1: 8}, sizes) == 11


def test_the_default_beats_both_lrus_where_there_is_something_to_learn() -> None:
    trace = make_trace(sequences=30, length=40, layers=4, num_experts=32, top_k=4, seed=5)
    slots = 8 * 4
    rates = {
        name: run(name, slots, trace)[0].statistics.hit_rate
        for name in (DEFAULT_POLICY, "layer-lru", "global-lru", "layer-belady")
    }
    gap = rates["layer-belady"] - rates["layer-lru"]
    assert rates[DEFAULT_POLICY] - rates["layer-lru"] > 0.2 * gap
    assert rates[DEFAULT_POLICY] > rates["global-lru"]


def test_the_default_needs_no_more_than_the_past() -> None:
    """Plans of a prefix do not change with what comes after it."""
    short = run(DEFAULT_POLICY, 20, TRACE.subset(0, 3))[1].plans
    assert run(DEFAULT_POLICY, 20)[1].plans[: len(short)] == short


def test_passes_merge_tokens_into_one_access() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[3, 4]]], np.uint8)
    trace = Trace(
        "hand", 5, 2, (7,), experts, np.array([0, 3], np.int64), pass_offsets=np.array([0, 2, 3], np.int64)
    )
    first, second = passes(trace)
    assert first.accesses[0].experts == (0, 1, 2)
    assert first.accesses[0].token_counts == (1, 2, 1)
    assert second.accesses[0].experts == (3, 4)
