"""Miss counts of every policy on the demo's own trace: any change of a decision shows here.

Decisions are the same on every machine, so the counts are exact. After a wanted change, or a new trace:

    python -m tests.brain.test_golden
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import replay
from moei_core.trace import next_uses, read_trace

DATA = Path(__file__).parents[1] / "data"
TRACE = read_trace(DATA / "moei-demo.trace.safetensors")
GOLDEN = DATA / "golden-misses.json"
"""Policy to misses with 25% and with 50% of the experts resident."""


def misses(policy: str) -> list[int]:
    counts = []
    for share in (0.25, 0.5):
        slots = int(share * TRACE.num_experts) * len(TRACE.moe_layers)
        made = POLICIES[policy](slots, TRACE.experts_by_layer)
        scheduler = ExpertScheduler(ExpertCache(slots, made), TRACE.num_experts_per_tok)
        replay(TRACE, scheduler, next_uses=next_uses(TRACE) if made.needs_future else None)
        counts.append(scheduler.statistics.misses)
    return counts


@pytest.mark.sampled(2)
@pytest.mark.parametrize("policy", POLICIES)
def test_misses_are_those_of_the_record(policy: str) -> None:
    assert misses(policy) == json.loads(GOLDEN.read_text())[policy]


if __name__ == "__main__":
    rows = ",\n".join(f'  "{policy}": {misses(policy)}' for policy in POLICIES)
    GOLDEN.write_text(f"{{\n{rows}\n}}\n")
    print(GOLDEN.read_text())
