"""Hints made for a trace that has none: how many are right, and that replays and requests know them."""

from __future__ import annotations

import numpy as np
import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.errors import UsageError
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler, PrefetchStatistics
from moei_core.sim.clock import Clock
from moei_core.sim.hardware import Hardware
from moei_core.sim.replay import passes, replay
from moei_core.trace.format import Trace
from moei_core.trace.hints import with_made_hints
from moei_core.types import Phase

from .synthetic import make_trace

TRACE = make_trace(sequences=20)


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_as_many_are_right_as_were_asked_for(right: float) -> None:
    trace = with_made_hints(TRACE, right)
    hints, experts = trace.hints_experts, trace.experts
    assert hints is not None and trace.hints_scores is not None
    named = hints < trace.num_experts
    true = (hints[..., :, None] == experts[..., None, :]).any(-1) & named
    by_chance = (1 - right) ** 2 * experts.shape[2] / trace.num_experts
    assert true.sum() / experts.size == pytest.approx(right + by_chance, abs=0.02)
    for row in hints.reshape(-1, hints.shape[2]).tolist():
        real = [expert for expert in row if expert < trace.num_experts]
        assert len(real) == len(set(real)), "named once"
    assert set(np.unique(trace.hints_scores)) == {np.float16(right)}
    again = with_made_hints(TRACE, right).hints_experts
    assert again is not None and np.array_equal(hints, again)


def test_no_other_share_can_be_right() -> None:
    for right in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            with_made_hints(TRACE, right)


def _replayed(right: float) -> PrefetchStatistics:
    trace = with_made_hints(TRACE, right)
    shape = trace.experts_by_layer
    scheduler = ExpertScheduler(
        ExpertCache(16, POLICIES["layer-lru"](16, shape)), 3, PREDICTORS["router"](shape), PrefetchMode.ON
    )
    machine = Hardware("m", memory_bandwidth=1e9, dense_seconds=1.0, disk_bandwidth=1.0, disk_latency=0.0)
    replay(trace, scheduler, Clock(machine, dict.fromkeys(trace.moe_layers, 1), scheduler))
    return scheduler.prefetch_statistics


def test_a_replay_follows_them() -> None:
    sure, unsure = _replayed(1.0), _replayed(0.6)
    assert sure.useful + sure.late > 0 and sure.wasted == sure.cancelled == 0
    assert unsure.useful + unsure.late > 0 and unsure.wasted + unsure.cancelled > 0


def test_other_requests_keep_the_hints_of_their_single_tokens() -> None:
    trace = with_made_hints(TRACE, 1.0).as_requests([(5, 3)], start=TRACE.tokens - 4)
    prompt, *reply = passes(trace)
    assert prompt.phase is Phase.PREFILL and not any(access.hints for access in prompt.accesses)
    for one in reply:
        for access, later in zip(one.accesses, one.accesses[1:], strict=False):
            assert {hint.key.layer for hint in access.hints} == {later.layer}
            assert tuple(hint.key.expert for hint in access.hints) == later.experts
        assert not one.accesses[-1].hints


def test_256_experts_may_be_bytes() -> None:
    """Where every token has all of its experts, no number is needed for none; hints need one."""
    experts = np.arange(256, dtype=np.uint8).reshape(32, 1, 8).repeat(2, axis=1)
    trace = Trace("wide", 256, 8, (0, 1), experts, np.array([0, 32], np.int64))
    hints = with_made_hints(trace, 0.5).hints_experts
    assert hints is not None and hints.max() == 256
    right = with_made_hints(trace, 1.0).hints_experts
    assert right is not None and np.array_equal(right, experts)
