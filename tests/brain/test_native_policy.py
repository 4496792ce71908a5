"""The native arithmetic of the default policy is the Python one to the bit: the same plans, and the same state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies.learned import LearnedMixture
from moei_core.cache.policies.learned_native import NativeMixture
from moei_core.quant import native
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import passes
from moei_core.trace import Trace, read_trace
from moei_core.trace.synthetic import synthetic_trace
from moei_core.types import Phase

from .synthetic import access

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

STATE = (
    "values", "_candidates", "_absence", "_follows", "_seen", "_trust", "_source_trace", "_feature_trace",
    "_gram", "_moment", "_weights", "_ranking", "_floor",
)  # fmt: skip


def both(slots: int, num_experts: dict[int, int], working: int) -> tuple[ExpertScheduler, ExpertScheduler]:
    kinds = (LearnedMixture, NativeMixture)
    return tuple(ExpertScheduler(ExpertCache(slots, kind(slots, num_experts)), working) for kind in kinds)  # type: ignore[return-value]


def assert_same_state(brains: tuple[ExpertScheduler, ExpertScheduler]) -> None:
    plain, fast = (brain._cache.policy for brain in brains)
    assert isinstance(plain, LearnedMixture) and isinstance(fast, NativeMixture)
    for name in STATE:
        np.testing.assert_array_equal(getattr(plain, name), getattr(fast, name), err_msg=name)
    assert plain._total == fast._total.tolist()  # type: ignore[attr-defined]
    for one in (plain, fast):
        for i in range(len(one.layers)):
            one._learn(i)
    for name in STATE:
        np.testing.assert_array_equal(getattr(plain, name), getattr(fast, name), err_msg=name)
    np.testing.assert_array_equal(plain._batches[:, -1], fast._batches[:, -1])


def compare(trace: Trace, share: float) -> None:
    slots = int(share * trace.num_experts) * len(trace.moe_layers)
    brains = both(slots, trace.experts_by_layer, trace.num_experts_per_tok)
    for one in passes(trace):
        for brain in brains:
            if one.starts_request:
                brain.request_start()
            brain.forward_pass(one.phase, one.tokens)
        for event in one.accesses:
            assert brains[0].access(event) == brains[1].access(event)
    assert brains[0].statistics == brains[1].statistics
    assert brains[0].statistics.evictions > 0
    assert_same_state(brains)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_on_the_demos_own_trace(share: float) -> None:
    compare(read_trace(Path(__file__).parents[1] / "data" / "moei-demo.trace.safetensors"), share)


@pytest.mark.parametrize(
    ("layers", "num_experts", "top_k", "tokens"),
    # The second has layers that leave a rest in every vector, the third and fourth larger batches and a sampled fit.
    [(6, 64, 6, 100), (3, 37, 3, 300), (2, 200, 8, 300), (2, 256, 8, 300)],
)
def test_on_shapes_of_all_kinds(layers: int, num_experts: int, top_k: int, tokens: int) -> None:
    shape = {"layers": layers, "num_experts": num_experts, "top_k": top_k}
    compare(synthetic_trace(sequences=3, length=tokens // 3, **shape), 0.25)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_on_any_events(data: st.DataObject) -> None:
    num_experts = {0: 8, 2: 8, 3: 6}
    slots = data.draw(st.integers(0, 22))
    brains = both(slots, num_experts, data.draw(st.integers(1, 4)))
    kinds = ["pass", "token", "token", "access", "prefill", "request", "cancel", "resize"]
    for _ in range(data.draw(st.integers(0, 60))):
        kind = data.draw(st.sampled_from(kinds))
        if kind in ("access", "prefill"):
            layer = data.draw(st.sampled_from(list(num_experts)))
            experts = data.draw(st.sets(st.integers(0, num_experts[layer] - 1)))
            counts = tuple(data.draw(st.integers(1, 12)) for _ in experts) if kind == "prefill" else ()
            event = access(layer, *experts, counts=counts)
            assert brains[0].access(event) == brains[1].access(event)
        elif kind == "token":
            seed = data.draw(st.integers(0, 1000))
            random = np.random.default_rng(seed)
            for brain in brains:
                brain.forward_pass(Phase.DECODE)
            for layer, count in num_experts.items():
                event = access(layer, *random.choice(count, 2, replace=False).tolist())
                assert brains[0].access(event) == brains[1].access(event)
        elif kind == "cancel" and brains[0].residents():
            gone = data.draw(st.sampled_from(brains[0].residents()))
            for brain in brains:
                brain.cancel_load(gone)
        elif kind == "resize":
            slots = data.draw(st.integers(0, 22))
            assert brains[0].resize(slots) == brains[1].resize(slots)
        else:
            for brain in brains:
                if kind == "pass":
                    brain.forward_pass(Phase.DECODE)
                elif kind == "request":
                    brain.request_start()
        assert brains[0].residents() == brains[1].residents()
    assert_same_state(brains)


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = NativeMixture(4, {0: 8, 1: 8})
    with pytest.raises(ValueError, match="no such expert"):
        policy.on_access(access(0, 8))
    with pytest.raises(ValueError, match="no such layer"):
        policy._core.learn(2)
    make = LearnedMixture.__init__

    def smaller(self: LearnedMixture, capacity: int, num_experts: dict[int, int]) -> None:
        make(self, capacity, num_experts)
        self._gram = self._gram[:1]

    monkeypatch.setattr(LearnedMixture, "__init__", smaller)
    with pytest.raises(ValueError, match="gram has another shape"):
        NativeMixture(4, {0: 8, 1: 8})
