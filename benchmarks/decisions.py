"""What a decision costs: processor time of one access, for per-layer LRU and the default policy.

    python benchmarks/decisions.py [--tokens 1024] [--experts 0.25]

One access is one layer of one decode token with everything the brain does for it: counting hits and misses,
learning, admitting, choosing victims, making the plan. Reading the trace is not part of it, except in the
line on the simulator. One thread; processor time, so that other work on the machine counts little; the median
over blocks of 64 tokens of a synthetic trace (seeded), the first half of it being warm-up. The last line of
the output is JSON.
"""

from __future__ import annotations

import os

# Before numpy: threads of a matrix library would be counted, and cost more than they bring at these sizes.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import DEFAULT_POLICY, POLICIES
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import passes, replay
from moei_core.trace import Trace
from moei_core.trace.synthetic import synthetic_trace

BLOCK = 64
LEAST_SIMULATED = 50_000
"""Simulated accesses a second on one core that per-layer LRU must reach."""
MOST_MICROSECONDS = {"48 x 128 top-8": 20.0, "48 x 512 top-10": 40.0}
"""What a decision of the default policy may cost."""


def scheduler_for(trace: Trace, policy: str, share: float) -> ExpertScheduler:
    slots = int(share * trace.num_experts) * len(trace.moe_layers)
    return ExpertScheduler(
        ExpertCache(slots, POLICIES[policy](slots, trace.experts_by_layer)), trace.num_experts_per_tok
    )


def decision_microseconds(trace: Trace, policy: str, share: float) -> tuple[float, float, float]:
    """(median over blocks, least, hit rate) of the microseconds of one access."""
    scheduler = scheduler_for(trace, policy, share)
    blocks: list[float] = []
    spent = accesses = 0.0
    for one in passes(trace):
        started = time.process_time_ns()
        if one.starts_request:
            scheduler.request_start()
        scheduler.forward_pass(one.phase, one.tokens)
        for access in one.accesses:
            scheduler.access(access)
        spent += time.process_time_ns() - started
        accesses += len(one.accesses)
        if (one.index + 1) % BLOCK == 0:
            if one.index >= trace.tokens // 2:
                blocks.append(spent / accesses / 1e3)
            spent = accesses = 0.0
    return statistics.median(blocks), min(blocks), scheduler.statistics.hit_rate


def simulated_per_second(trace: Trace, policy: str, share: float) -> float:
    """Accesses a second through the simulator's replay loop, reading the trace included."""
    scheduler = scheduler_for(trace, policy, share)
    started = time.process_time()
    replay(trace, scheduler)
    return trace.tokens * len(trace.moe_layers) / (time.process_time() - started)


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--experts", type=float, default=0.25, help="share of the experts that is resident")
    options = parser.parse_args()
    machine = f"{platform.machine()}, python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, commit {commit()}; {options.experts:.0%} of the experts resident")
    report: dict[str, Any] = {"machine": machine, "commit": commit(), "experts": options.experts}
    for name, shape in (
        ("48 x 128 top-8", {"layers": 48, "num_experts": 128, "top_k": 8}),
        ("48 x 512 top-10", {"layers": 48, "num_experts": 512, "top_k": 10}),
    ):
        trace = synthetic_trace(sequences=max(1, options.tokens // 128), length=128, **shape)
        found: dict[str, Any] = {}
        for policy in ("layer-lru", DEFAULT_POLICY):
            median, least, rate = decision_microseconds(trace, policy, options.experts)
            found[policy] = {"microseconds": round(median, 2), "least": round(least, 2)}
            print(f"{name}  {policy:10} {median:6.1f} us an access (least {least:.1f}), hit rate {rate:.3f}")
        most = MOST_MICROSECONDS[name]
        share = found[DEFAULT_POLICY]["microseconds"] / most
        print(f"{name}  ceiling    {most:6.1f} us for {DEFAULT_POLICY}: {share:.0%} of it used")
        found["simulated_per_second"] = round(simulated_per_second(trace, "layer-lru", options.experts))
        report[name] = found | {"ceiling_microseconds": most}
        print(
            f"{name}  simulator  {found['simulated_per_second']} accesses/s of layer-lru on one core "
            f"(to reach: {LEAST_SIMULATED} at 48 x 128)"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
