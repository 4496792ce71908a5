"""A long prompt: what it streams ahead, and what it leaves of the cache that decoding needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import DEFAULT_POLICY, POLICIES
from moei_core.config import PREFILL_CHUNK
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode, PrefillStream
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.clock import Clock
from moei_core.sim.replay import Observer, passes, replay
from moei_core.trace import Trace, read_trace
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase

from .test_simulator import MACHINE, MB, SHARED

DEMO = read_trace(Path(__file__).parents[1] / "data" / "moei-demo.trace.safetensors")
SHAPE = {1: 8, 2: 8, 4: 8}


def scheduler(slots: int = 4, *, stream: bool = True) -> ExpertScheduler:
    cache = ExpertCache(slots, POLICIES["layer-lru"](slots, SHAPE))
    return ExpertScheduler(cache, 2, num_experts=SHAPE if stream else None)


def access(layer: int, experts: list[int], each: int = 4) -> LayerAccess:
    return LayerAccess(layer, tuple(experts), (each,) * len(experts), Phase.PREFILL)


def test_a_long_prompt_streams_what_is_absent_of_the_next_layer() -> None:
    brain = scheduler()
    brain.forward_pass(Phase.PREFILL, 64)
    everything = list(range(8))
    first = brain.access(access(1, everything, 16))
    assert first.stream == tuple(ExpertKey(2, expert) for expert in range(8))
    second = brain.access(access(2, everything[1:], 16))
    assert second.cancel == (ExpertKey(2, 0),), "the router overtook"
    assert second.stream == tuple(ExpertKey(4, expert) for expert in range(8))
    assert brain.access(access(4, everything, 16)).stream == ()
    brain.forward_pass(Phase.PREFILL, 64)
    again = brain.access(access(1, everything, 16))
    resident = {key for key in brain.residents() if key.layer == 2}
    assert resident and set(again.stream) == {ExpertKey(2, expert) for expert in range(8)} - resident


def test_a_few_tokens_stream_nothing_but_what_nearly_every_prompt_used() -> None:
    brain = scheduler()
    for _ in range(20):
        brain.forward_pass(Phase.PREFILL, 64)
        for layer in SHAPE:
            brain.access(LayerAccess(layer, (0, 5), (64, 64), Phase.PREFILL))
    brain.forward_pass(Phase.PREFILL, 3)
    for key in brain.residents():
        brain.cancel_load(key)
    assert brain.access(access(1, [2], 3)).stream == (ExpertKey(2, 0), ExpertKey(2, 5))
    brain.forward_pass(Phase.DECODE, 1)
    plan = brain.access(LayerAccess(2, (1, 2), (1, 1), Phase.DECODE))
    assert plan.stream == () and set(plan.cancel) == {ExpertKey(2, 0), ExpertKey(2, 5)}


def prompts(trace: Trace, tokens: int) -> Trace:
    """Each sequence's first ``tokens`` tokens as a prompt, the rest as its reply."""
    lengths = [int(length) for length in np.diff(trace.sequence_offsets)]
    return trace.as_requests([(min(tokens, length), max(0, length - tokens)) for length in lengths])


class Plans(Observer):
    def __init__(self) -> None:
        self.plans: list[FetchPlan] = []

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)


@pytest.mark.parametrize("policy", [name for name in POLICIES if not POLICIES[name](1, SHAPE).needs_future])
def test_streaming_short_prompts_changes_no_decision(policy: str) -> None:
    trace = prompts(DEMO.subset(0, 6), 24)
    found = []
    for num_experts in (None, trace.experts_by_layer):
        slots = trace.num_experts // 4 * len(trace.moe_layers)
        cache = ExpertCache(slots, POLICIES[policy](slots, trace.experts_by_layer))
        brain, seen = ExpertScheduler(cache, trace.num_experts_per_tok, num_experts=num_experts), Plans()
        replay(trace, brain, seen)
        found.append([plan._replace(cancel=(), stream=()) for plan in seen.plans])
        streamed = sum(len(plan.stream) for plan in seen.plans)
        assert (streamed > 0) == (num_experts is not None)
    assert found[0] == found[1]


def test_residents_lend_slots_to_a_long_prompt_and_take_them_again() -> None:
    brain = scheduler(16)
    everything = list(range(8))
    for _ in range(3):
        for layer in SHAPE:
            brain.access(access(layer, everything))
    assert (brain.resident_count, brain.free_slots) == (16, 2)
    brain.forward_pass(Phase.PREFILL, PrefillStream.LONG - 1)
    assert not brain.access(access(1, everything)).waves[0].evict and brain.free_slots == 2
    brain.forward_pass(Phase.PREFILL, PrefillStream.LONG)
    # Of 24 experts 8 are absent, 2 or 3 of a layer: half of that is 1.
    plan = brain.access(access(1, everything))
    assert len(plan.waves[0].evict) == 1 and not plan.waves[0].load
    assert (brain.resident_count, brain.free_slots) == (15, 3)
    brain.access(access(2, everything))
    assert (brain.resident_count, brain.free_slots) == (15, 3)
    # A smaller budget lacks more, but has less to give.
    brain.resize(8)
    assert (brain.resident_count, brain.free_slots) == (7, 3)
    brain.forward_pass(Phase.DECODE, 1)
    brain.access(access(4, [0, 1], 1))
    assert brain.resident_count + brain.free_slots == 8 + 2


def test_nobody_lends_what_prefetches_have() -> None:
    cache = ExpertCache(8, POLICIES["layer-lru"](8, SHAPE))
    made = PREDICTORS["router"](SHAPE)
    brain = ExpertScheduler(cache, 2, made, PrefetchMode.ON, prefetch_slots=8, num_experts=SHAPE)
    brain.forward_pass(Phase.PREFILL, 512)
    plan = brain.access(access(1, list(range(8))))
    assert plan.prefetch_slots == 8 and brain.free_slots == 2 and brain.resident_count == 0


def test_what_is_all_there_lends_nothing() -> None:
    brain = scheduler(24)
    for _ in range(2):
        brain.forward_pass(Phase.PREFILL, 512)
        for layer in SHAPE:
            brain.access(access(layer, list(range(8)), 64))
    assert brain.resident_count == 24


def test_the_simulated_prompt_takes_its_bytes_over_the_bandwidth() -> None:
    """Two layers of eight experts: nothing waits for the second router, and each expert is read once."""
    experts = np.tile(np.arange(8, dtype=np.uint8).reshape(4, 1, 2), (16, 3, 1))
    bounds = np.array([0, len(experts)], np.int64)
    trace = Trace("t", 8, 2, tuple(SHAPE), experts, bounds, pass_offsets=bounds)
    seconds = {}
    for stream in (False, True):
        brain = scheduler(4, stream=stream)
        clock = Clock(replace(MACHINE, dense_seconds=2e-3), dict.fromkeys(SHAPE, MB), brain)
        replay(trace, brain, clock)
        assert clock.costs.disk_nbytes == 24 * MB
        seconds[stream] = clock.costs.seconds
    # Streamed, only the first layer's router and the last expert's compute stand outside.
    assert seconds[True] == pytest.approx(2e-3 + 24 * MB / 1e9, rel=0.02)
    assert seconds[False] == pytest.approx(3 * 2e-3 + 24 * MB / 1e9, rel=0.02)


CONVERSATIONS = [
    "moei-demo",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek-v2-lite-esft", "gpt-oss-20b-decode")),
]


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_does_not_flush_what_decoding_needs(name: str, share: float) -> None:
    """The next 16 tokens hit within three points of a cache that never saw the prompt (or better)."""
    file = SHARED / f"{name}.safetensors"
    if name != "moei-demo" and not file.exists():
        pytest.skip(f"{file} is not here")
    trace = DEMO if name == "moei-demo" else read_trace(file).subset(0, 60 if "deepseek" in name else 20)
    width = 512
    slots = int(share * trace.num_experts) * len(trace.moe_layers)
    # Half of the trace fills the cache; what comes next is once prompts and replies, once the replies alone.
    middle = trace.sequences // 2
    rest = trace.subset(middle, trace.sequences)
    starts = range(0, rest.tokens - width - 16, width + 16)
    assert len(starts) >= 3
    rates = {}
    for skip in (False, True):
        cache = ExpertCache(slots, POLICIES[DEFAULT_POLICY](slots, trace.experts_by_layer))
        brain = ExpertScheduler(cache, trace.num_experts_per_tok, num_experts=trace.experts_by_layer)
        replay(trace.subset(0, middle), brain)
        hits = lookups = 0
        for at in starts:
            for start in range(at, at + width, PREFILL_CHUNK):
                if not skip:
                    send(brain, rest, start, start + PREFILL_CHUNK, Phase.PREFILL)
            before = replace(brain.statistics)
            for token in range(at + width, at + width + 16):
                send(brain, rest, token, token + 1, Phase.DECODE)
            change = brain.statistics.minus(before)
            hits, lookups = hits + change.hits, lookups + change.hits + change.misses
        rates[skip] = hits / lookups
    print(name, share, rates)
    assert rates[False] >= rates[True] - 0.03, rates


def send(brain: ExpertScheduler, trace: Trace, start: int, end: int, phase: Phase) -> None:
    prompt = phase is Phase.PREFILL
    part = trace.as_requests([(end - start, 0) if prompt else (0, end - start)], start)
    for one in passes(part):
        brain.forward_pass(phase, one.tokens)
        for event in one.accesses:
            brain.access(event)
