"""Make ``moei_core/forecast/routing.json``: what real routing does to a cache, in a table small enough to ship.

Every trace given is replayed by the simulator (the code behind ``moei bench --trace``) through the default policy at
several residencies. Kept: the share of decode lookups that hit, by the share of a layer's experts that may stay,
and the share of a layer's experts that so many consecutive tokens touch, which decides what a prompt reads.

    python benchmarks/routing_table.py TRACE.safetensors ... > src/moei_core/forecast/routing.json
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from moei_core.cache.policies import DEFAULT_POLICY
from moei_core.sim.hardware import PRESETS, UNKNOWN_EXPERT, expert_nbytes
from moei_core.sim.sweep import Run, simulate
from moei_core.trace import Trace, read_trace

RESIDENCIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MOST_TOKENS = 12_000
"""Of a long trace only its first sequences are replayed: the rates change little after that."""


def sequences(trace: Trace) -> int:
    """How many sequences from the start hold ``MOST_TOKENS`` tokens; all of a shorter trace."""
    return max(1, int(np.searchsorted(trace.sequence_offsets, MOST_TOKENS, side="right")) - 1)


def hit_rates(path: Path, trace: Trace, last: int) -> dict[str, float]:
    """Hit rate by residency, as of a cache that has long been warm.

    Short recordings begin with an empty cache: an expert's first use counts as a hit as often as chance would have
    had it resident.
    """
    rates = {}
    tokens = int(trace.sequence_offsets[last])
    first = sum(
        int(np.count_nonzero(np.unique(trace.experts[:tokens, layer]) < trace.num_experts))
        for layer in range(len(trace.moe_layers))
    )
    for residency in RESIDENCIES:
        a_layer = int(residency * trace.num_experts + 1e-9)
        if a_layer < 1:
            continue
        slots = a_layer * len(trace.moe_layers)
        nbytes = (expert_nbytes(trace.model) or UNKNOWN_EXPERT)[0]
        run = Run(str(path), DEFAULT_POLICY, slots, PRESETS["disk-1g"], nbytes, last_sequence=last)
        result = simulate(run)
        share = a_layer / trace.num_experts
        rate = (result.hits + share * first) / (result.hits + result.misses)
        rates[f"{share:.4f}"] = round(rate, 4)
    return rates


def touched(trace: Trace, last: int) -> dict[str, float]:
    """Share of a layer's experts that a window of so many consecutive tokens touches, on average."""
    shares = {}
    offsets = trace.sequence_offsets[: last + 1].tolist()
    for length in TOKENS:
        found = []
        for begin, end in pairwise(offsets):
            for start in range(begin, end - length + 1, max(length, 64)):
                window = np.asarray(trace.experts[start : start + length])
                for layer in range(0, window.shape[1], 3):
                    chosen = np.unique(window[:, layer])
                    found.append(np.count_nonzero(chosen < trace.num_experts) / trace.num_experts)
        if found:
            shares[str(length)] = round(float(np.mean(found)), 4)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", nargs="+", type=Path)
    rows = []
    for path in parser.parse_args().trace:
        trace = read_trace(path)
        last = sequences(trace)
        tokens = int(trace.sequence_offsets[last])
        print(f"{path.name}: {tokens} of {trace.tokens} tokens", file=sys.stderr)
        rows.append(
            {
                "model": trace.model,
                "source": trace.source,
                "experts": trace.num_experts,
                "top_k": trace.num_experts_per_tok,
                "moe_layers": len(trace.moe_layers),
                "tokens": tokens,
                "hit": hit_rates(path, trace, last),
                "touched": touched(trace, last),
            }
        )
    about = (
        "Made by benchmarks/routing_table.py from public recordings of real models' routing (each row's source). "
        f"hit: share of lookups that hit in a warm cache under the policy {DEFAULT_POLICY!r}, by the share of a "
        "layer's experts that may stay resident. touched: share of a layer's experts that so many consecutive "
        "tokens use."
    )
    print(json.dumps({"about": about, "policy": DEFAULT_POLICY, "traces": rows}, indent=1))


if __name__ == "__main__":
    main()
