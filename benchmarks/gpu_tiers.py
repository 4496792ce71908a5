"""What the rule for experts that a GPU does not hold is worth, by the simulator's cost model and a trace.

    python benchmarks/gpu_tiers.py TRACE [--expert-size 3.5MB] [--ram-bandwidth 40GB] [--sequences 4]

All experts are in RAM. For GPU memory of 10%, 25% and 50% of them: tokens a second with copies only, by cost, and by
cost but without promotions; hits on the GPU; bytes that crossed the link for a token. The machine is the simulator's
gpu-pcie4; its processor computes experts at --ram-bandwidth bytes a second. Nothing is measured on a GPU here.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import DEFAULT_POLICY, POLICIES
from moei_core.config import parse_size
from moei_core.errors import MoeiError
from moei_core.sim.hardware import PRESETS
from moei_core.sim.replay import replay
from moei_core.sim.tiered_clock import TieredClock, link_costs
from moei_core.tiers import DeviceTier, TieredScheduler
from moei_core.trace import Trace, read_trace

SHARES = (0.1, 0.25, 0.5)
WAYS = ("copy", "by cost", "by cost, no promotions")


def run(
    trace: Trace, share: float, way: str, nbytes: int, ram_bandwidth: float, policy: str
) -> dict[str, float]:
    experts, machine = trace.experts_by_layer, PRESETS["gpu-pcie4"]
    costs = link_costs(machine, ram_bandwidth)
    slots = int(share * trace.num_experts) * len(trace.moe_layers)
    total = sum(experts.values())
    tier = DeviceTier(
        ExpertCache(slots, POLICIES[policy](slots, experts)),
        experts,
        dict.fromkeys(experts, 1 if way == "copy" else costs.copy_from(nbytes)),
        dict.fromkeys(experts, 0.0 if way == WAYS[2] else costs.promote_share(nbytes)),
    )
    ram = ExpertCache(total, POLICIES["layer-lru"](total, experts))
    scheduler = TieredScheduler(ram, trace.num_experts_per_tok, tier)
    # Reading each expert from disk once is the same for all: not what this is about.
    no_disk = replace(machine, disk_bandwidth=1e15, disk_latency=0.0)
    clock = TieredClock(no_disk, ram_bandwidth, dict.fromkeys(experts, nbytes))
    replay(trace, scheduler, clock)
    return {
        "tokens_per_s": clock.costs.tokens / clock.costs.seconds,
        "gpu_hit_rate": scheduler.device_statistics.hit_rate,
        "link_bytes_per_token": clock.costs.link_nbytes / clock.costs.tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--expert-size", default="3.5MB")
    parser.add_argument("--ram-bandwidth", default="40GB")
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    parser.add_argument("--sequences", type=int, default=4)
    given = parser.parse_args()
    trace = read_trace(given.trace)
    trace = trace.subset(0, min(given.sequences, trace.sequences))
    nbytes = parse_size(given.expert_size, "--expert-size")
    bandwidth = float(parse_size(given.ram_bandwidth, "--ram-bandwidth"))
    rows = []
    for share in SHARES:
        for way in WAYS:
            found = run(trace, share, way, nbytes, bandwidth, given.policy)
            rows.append(
                {"share": share, "way": way, **{name: round(value, 4) for name, value in found.items()}}
            )
            print(
                f"{share:4.0%}  {way:24} {found['tokens_per_s']:8.2f} tokens/s  {found['gpu_hit_rate']:6.1%} hits  "
                f"{found['link_bytes_per_token'] / 1e6:8.1f} MB a token"
            )
    print(json.dumps({"trace": given.trace, "tokens": trace.tokens, "expert_bytes": nbytes, "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except MoeiError as error:
        sys.exit(str(error))
