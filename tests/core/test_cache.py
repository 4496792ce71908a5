"""The miss loop and the first policy: every plan within its slots, every expert computed once, LRU order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.scheduler import ExpertScheduler
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase

NUM_EXPERTS = {0: 8, 2: 8, 3: 6}


def make(resident: int, working: int, policy: str = "layer-lru") -> ExpertScheduler:
    return ExpertScheduler(ExpertCache(resident, POLICIES[policy](resident, NUM_EXPERTS)), working)


def access(layer: int, *experts: int) -> LayerAccess:
    return LayerAccess(layer, tuple(experts), (1,) * len(experts), Phase.DECODE)


def carry_out(plan: FetchPlan, held: set[ExpertKey], slots: int) -> list[ExpertKey]:
    """Do to ``held`` what the engine does to slots; returns the experts in the order of computing."""
    computed: list[ExpertKey] = []
    for wave in plan.waves:
        for key in wave.evict:
            held.remove(key)
        for key in wave.load:
            assert key not in held
            held.add(key)
        assert len(held) <= slots
        assert held.issuperset(wave.compute)
        computed += wave.compute
        for key in wave.release:
            held.remove(key)
    return computed


accesses = st.sampled_from(sorted(NUM_EXPERTS)).flatmap(
    lambda layer: st.builds(
        lambda experts: access(layer, *sorted(experts)),
        st.sets(st.integers(0, NUM_EXPERTS[layer] - 1), min_size=1),
    )
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(accesses, max_size=40),
    st.integers(0, 22),
    st.integers(1, 4),
    st.lists(st.integers(0, 39), max_size=3),
)
def test_every_plan_fits_its_slots(
    events: list[LayerAccess], resident: int, working: int, failing: list[int]
) -> None:
    scheduler, held = make(resident, working), set[ExpertKey]()
    for number, event in enumerate(events):
        before = set(held)
        plan = scheduler.access(event)
        wanted = [ExpertKey(event.layer, expert) for expert in event.experts]
        assert (plan.hits, plan.misses) == (len(before.intersection(wanted)), len(set(wanted) - before))
        assert sorted(carry_out(plan, held, resident + working)) == wanted
        if number in failing and held:
            gone = min(held)
            held.remove(gone)
            scheduler.cancel_load(gone)
            scheduler.cancel_load(gone)  # told twice is no harm
        assert held == set(scheduler.residents())
        assert scheduler.resident_count == len(held) <= resident


def test_least_recently_used_goes_first() -> None:
    scheduler = make(resident=9, working=2)  # three a layer
    for experts in ((0, 1), (2,), (0,), (3,)):
        scheduler.access(access(0, *experts))
    assert [key.expert for key in scheduler.residents()] == [0, 2, 3]
    plan = scheduler.access(access(0, 4, 5))
    assert plan.waves[0].evict == (ExpertKey(0, 2), ExpertKey(0, 0))
    assert scheduler.statistics.hits == 1
    assert scheduler.statistics.misses == 6


def test_residents_compute_first_and_what_is_missing_comes_in_waves() -> None:
    scheduler = make(resident=6, working=2)  # two a layer
    scheduler.access(access(0, 5))
    plan = scheduler.access(access(0, 0, 1, 2, 3, 5))
    assert [[key.expert for key in wave.compute] for wave in plan.waves] == [[5], [0, 1], [2, 3]]
    # A long prompt passes through: one newcomer found room, the resident that it used was not flushed.
    assert [key.expert for key in scheduler.residents()] == [0, 5]
    assert scheduler.statistics.bypasses == 3


def test_one_layer_cannot_flush_another() -> None:
    scheduler = make(resident=6, working=2)
    scheduler.access(access(2, 0, 1))
    for expert in range(8):
        scheduler.access(access(0, expert))
    assert {key for key in scheduler.residents() if key.layer == 2} == {ExpertKey(2, 0), ExpertKey(2, 1)}


def test_the_smallest_cache_holds_nothing() -> None:
    scheduler = make(resident=0, working=2)
    plan = scheduler.access(access(3, 1, 2))
    assert plan.waves[0].release == plan.waves[0].load == (ExpertKey(3, 1), ExpertKey(3, 2))
    assert scheduler.resident_count == 0


def test_quotas_share_what_a_small_layer_cannot_use() -> None:
    policy = POLICIES["layer-lru"](20, NUM_EXPERTS)
    assert [policy.quota(layer) for layer in NUM_EXPERTS] == [7, 7, 6]
    policy = POLICIES["layer-lru"](22, NUM_EXPERTS)
    assert [policy.quota(layer) for layer in NUM_EXPERTS] == [8, 8, 6]
    policy = POLICIES["layer-lru"](2, NUM_EXPERTS)
    assert [policy.quota(layer) for layer in NUM_EXPERTS] == [1, 1, 0]
