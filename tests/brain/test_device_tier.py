"""The device tier's rule: what is copied, what is computed in RAM, what is promoted, in plain numbers."""

from __future__ import annotations

import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies.lru import LayerLRU
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.tiers import DeviceTier, LinkCosts, TieredScheduler
from moei_core.types import ExpertKey, LayerAccess, Phase, ScoredExpert

EXPERTS = {0: 8, 1: 8}


def tier(slots: int, copy_from: int = 4, share: float = 0.5, prefetch_slots: int = 0) -> DeviceTier:
    cache = ExpertCache(slots, LayerLRU(slots, EXPERTS))
    return DeviceTier(
        cache,
        EXPERTS,
        dict.fromkeys(EXPERTS, copy_from),
        dict.fromkeys(EXPERTS, share),
        prefetch_slots=prefetch_slots,
    )


def access(*experts: int, tokens: int = 1, layer: int = 0, order: tuple[int, ...] = ()) -> LayerAccess:
    return LayerAccess(layer, experts, (tokens,) * len(experts), Phase.DECODE, order=order or experts)


def keys(*experts: int, layer: int = 0) -> tuple[ExpertKey, ...]:
    return tuple(ExpertKey(layer, expert) for expert in experts)


def test_many_tokens_are_copied_and_few_are_left_to_ram() -> None:
    one = tier(8)
    plan, rest = one.plan(LayerAccess(0, (1, 2, 3), (4, 3, 9), Phase.PREFILL))
    assert plan.copy == keys(1, 3) and plan.release == plan.evict == ()
    assert rest.experts == (1, 2, 3), "all of them are looked up in RAM"
    plan, rest = one.plan(LayerAccess(0, (1, 3, 4), (1, 1, 1), Phase.DECODE))
    assert plan.hits == keys(1, 3) and plan.copy == ()
    assert (rest.experts, rest.token_counts) == ((4,), (1,))


def test_copies_beyond_the_quota_pass_through() -> None:
    plan, _ = tier(4).plan(access(0, 1, 2, 3, tokens=5))
    assert plan.copy == keys(0, 1, 2, 3) and plan.release == keys(2, 3)
    plan, _ = tier(0).plan(access(0, 1, tokens=5))
    assert plan.copy == plan.release == keys(0, 1)


def test_as_many_are_promoted_as_the_link_carries_the_routers_favourites_first() -> None:
    one = tier(4)
    one.plan(access(0, 7, tokens=5))
    one.plan(access(0, 7, tokens=5, layer=1))
    plan, _ = one.plan(access(1, 2, 3, 5, order=(5, 2, 1, 3)))
    assert plan.promote == keys(5, 2) and plan.evict == keys(0, 7)
    plan, _ = one.plan(access(4, layer=1))
    assert plan.promote == (), "half an expert's worth of time"
    plan, _ = one.plan(access(4, layer=1))
    assert plan.promote == keys(4, layer=1)


def test_while_there_is_room_one_is_promoted_at_least() -> None:
    one = tier(4, share=0.01)
    assert one.plan(access(1, 2))[0].promote == keys(1)
    assert one.plan(access(1, 2))[0].promote == keys(2)
    one.plan(access(3, 4, layer=1))
    one.plan(access(3, 4, layer=1))
    assert one.plan(access(5, 6, layer=1))[0].promote == (), "full"


def test_unused_time_of_the_link_is_not_saved_up() -> None:
    one = tier(0, share=5.0)
    for _ in range(10):
        assert one.plan(access(1, 2))[0].promote == (), "nothing can stay"
    assert one._credit == 2


def test_promotions_evict_by_the_policy_and_never_what_is_in_use() -> None:
    one = tier(4, share=0.5)
    one.plan(access(0, 1, tokens=5))
    plan, _ = one.plan(access(1, 2, 3))
    assert plan.hits == keys(1) and plan.promote == keys(2) and plan.evict == keys(0)


def test_the_order_of_the_rest_is_the_routers() -> None:
    one = tier(4)
    one.plan(access(2, tokens=5))
    assert one.plan(access(1, 2, 6, order=(6, 2, 1)))[1].order == (6, 1)


@pytest.mark.parametrize(
    ("costs", "least"),
    [
        (LinkCosts(50e9, 0, 25e9), 1),  # a link that is faster than RAM: always copy
        (LinkCosts(20e9, 0, 40e9), 8),  # twice as long: as many tokens as the arithmetic takes to catch up
        (LinkCosts(20e9, 50e-6, 40e9), 16),
    ],
)
def test_costs(costs: LinkCosts, least: int) -> None:
    assert costs.copy_from(1_000_000) == least
    assert costs.copy_seconds(1_000_000) <= costs.ram_seconds(1_000_000, least)
    if least > 1:
        assert costs.copy_seconds(1_000_000) > costs.ram_seconds(1_000_000, least - 1)


def test_each_tier_sees_the_misses_of_the_nearer_one() -> None:
    front = tier(4, copy_from=1)
    both = TieredScheduler(ExpertCache(4, LayerLRU(4, EXPERTS)), 2, front)
    alone = ExpertScheduler(ExpertCache(4, LayerLRU(4, EXPERTS)), 2)
    both.forward_pass(Phase.DECODE)
    first = both.access(access(1, 2))
    assert first.device is not None and first.device.copy == keys(1, 2)
    assert first.waves == alone.access(access(1, 2)).waves
    again = both.access(access(1, 3))
    assert again.device is not None and again.device.hits == keys(1)
    assert [wave.load for wave in again.waves] == [keys(3)]
    assert (both.device_statistics.hits, both.statistics.hits, both.statistics.misses) == (1, 0, 3)
    both.cancel_load(ExpertKey(0, 3))
    assert ExpertKey(0, 3) not in front.cache and ExpertKey(0, 3) not in both.residents()


def test_what_is_prefetched_has_a_slot_until_its_router_speaks() -> None:
    one = tier(5, 99, 0.0, prefetch_slots=3)
    assert one.prefetch(keys(1)) == (), "the slots are the residents'"
    one.plan(access(), prefetching=True)
    assert one.prefetch(keys(1, 2) + keys(7, 6, layer=1)) == keys(1, 2) + keys(7, layer=1)
    assert one.prefetch(keys(3, layer=1)) == (), "all slots are taken"
    plan, rest = one.plan(access(2, 4), prefetching=True)
    assert (plan.foreseen, plan.cancel, plan.hits, plan.release) == (keys(2), keys(1), (), ())
    assert rest.experts == (4,), "what is on the device is no access of RAM"
    assert ExpertKey(0, 2) in one.cache, "its slot changes roles"
    assert list(one.ahead) == [*keys(7, layer=1)]
    assert one.prefetch(keys(2, 3)) == keys(3), "resident, absent"
    counts, lookups = one.prefetch_statistics, one.cache.statistics
    assert (counts.started, counts.useful, counts.wasted) == (4, 1, 1)
    assert (lookups.hits, lookups.misses) == (1, 1)


def test_prefetched_experts_go_with_the_slots_that_they_have() -> None:
    one = tier(6, 1, 0.0, prefetch_slots=4)
    one.plan(access(0), prefetching=True)
    assert one.prefetch(keys(1, 2, 3, 4, layer=1)) == keys(1, 2, 3, 4, layer=1)
    assert one.resize(5) == []
    assert one.resize(3) == [*keys(0), *keys(4, layer=1)], "residents first, then the least likely"
    assert list(one.ahead) == [*keys(1, 2, 3, layer=1)]
    assert one.prefetch_statistics.wasted == 1
    assert one.resize(6) == [] and one.prefetch(keys(5, layer=1)) == keys(5, layer=1)


def test_a_read_ahead_that_fails_takes_nothing_from_the_device() -> None:
    """RAM gave an expert up after the device had been given it, and prefetches it again."""
    front = tier(4, 99, 0.0, prefetch_slots=2)
    both = TieredScheduler(ExpertCache(8, LayerLRU(8, EXPERTS)), 3, front, Sure(), PrefetchMode.ON)
    both.forward_pass(Phase.DECODE)
    plan = both.access(access(1))
    assert front.prefetch(keys(4, layer=1)) == keys(4, layer=1)
    both.start_load(plan.prefetch[0])
    both.cancel_load(plan.prefetch[0])
    assert plan.prefetch[0] in front.ahead
    both.cancel_load(plan.prefetch[0])
    assert plan.prefetch[0] not in front.ahead, "bytes that the device itself was promised"


def test_a_prefetched_expert_stays_only_by_the_policy() -> None:
    one = tier(1, 99, 0.0, prefetch_slots=1)
    one.plan(access(), prefetching=True)
    assert one.prefetch(keys(5)) == keys(5)
    plan, _ = one.plan(access(5, 6), prefetching=True)
    assert plan.foreseen == plan.release == keys(5) and not one.ahead


class Sure:
    """Predicts the experts 4, 5 and 6 of the next layer."""

    learns = True

    def observe(self, event: object) -> None:
        pass

    def predict(self, layer: int) -> list[ScoredExpert]:
        return [ScoredExpert(key, 0.9) for key in keys(4, 5, 6, layer=layer)]

    def layers_after(self, layer: int, count: int) -> tuple[int, ...]:
        return (1 - layer,)

    def candidates(self) -> tuple[Sure, ...]:
        return (self,)


def test_predictions_go_to_ram_and_from_ram_to_the_device() -> None:
    front = tier(2, 99, 0.0, prefetch_slots=2)
    both = TieredScheduler(ExpertCache(8, LayerLRU(8, EXPERTS)), 3, front, Sure(), PrefetchMode.ON)
    both.forward_pass(Phase.DECODE)
    first = both.access(access(1))
    assert first.prefetch == keys(4, 5, 6, layer=1) and first.device is not None
    assert first.device.prefetch == (), "RAM does not hold them yet"
    second = both.access(access(4, 5, layer=1))
    assert second.waves[0].load == keys(4, 5, layer=1)
    again = both.access(access(1))
    assert again.prefetch == keys(6, layer=1) and again.device is not None
    assert again.device.prefetch == keys(4, 5, layer=1)
    then = both.access(access(4, 6, layer=1))
    assert then.device is not None
    assert (then.device.foreseen, then.device.cancel) == (keys(4, layer=1), keys(5, layer=1))


def test_the_controller_may_keep_prefetches_into_ram_alone() -> None:
    both = TieredScheduler(
        ExpertCache(8, LayerLRU(8, EXPERTS)),
        3,
        tier(2, 99, 0.0, prefetch_slots=2),
        Sure(),
    )
    both.access(access(4, 5, layer=1))
    for kept, into_ram, to_device in (
        (None, (), ()),
        (1, keys(6, layer=1), ()),
        (0, keys(6, layer=1), keys(4, 5, layer=1)),
    ):
        both.controller.kept = kept
        both.forward_pass(Phase.DECODE)
        plan = both.access(access(1))
        assert plan.device is not None
        assert (plan.prefetch, plan.device.prefetch) == (into_ram, to_device)
    assert both.prefetching_by == "Sure"
