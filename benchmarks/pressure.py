"""A chat beside a program that takes memory in the middle of it: no paging, no kill, and the speed comes back.

    python benchmarks/pressure.py MODEL [--take 4GiB] [--experts 60%] [--cap 8GiB]

Decodes without an end; after a third of the time a second process takes ``--take`` bytes and holds them, after
another third it leaves. Prints the speed of each third, the pool's resizes with their reasons, major faults and swap;
the last line is JSON. ``--cap`` puts both programs into a control group of so much memory, as in a container; there
what is taken is missing at once, and a program that does not give way is killed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import psutil
from memory_group import capped, join, read_count

from moei_core.config import ExpertBudget, GenerationSettings, format_size, parse_size
from moei_core.engine.generate import GenerationTimes, Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hardware.system import read_memory, read_pressure
from moei_core.hub.resolve import resolve_model

_TAKE = (
    "import sys, time; b = bytearray(int(sys.argv[1])); b[::4096] = b'x' * len(b[::4096]); time.sleep(1e6)"
)
_CONTEXT = 4096


def decode(model: LoadedModel, seconds: float) -> list[float]:
    """Times of the tokens decoded in so many seconds."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times = GenerationTimes()
        cache = ConversationCache(model.adapter.config)
        generator = Generator(model.adapter.model, model.runtime, cache, lambda: time.perf_counter() >= end)
        settings = GenerationSettings(max_new_tokens=_CONTEXT // 2, temperature=1.0, seed=len(found))
        model.scheduler.request_start()
        for _ in generator.tokens([1, 2, 3, 4], settings, frozenset(), times, _CONTEXT):
            pass
        model.scheduler.request_end()
        found += times.token_s
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--take", default="4GiB")
    parser.add_argument("--experts", help="left out: what is free decides, so that memory is short at once")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--cap", help="bound on the memory of both programs together")
    options = parser.parse_args()
    if options.cap is None:
        measure(options)
        return
    with capped(parse_size(options.cap, "--cap")) as group:
        if group is None:
            sys.exit("No memory control group can be made here: run as root, or without --cap.")
        # In a process of its own, so that the group can be removed after it.
        at = sys.argv.index("--cap") if "--cap" in sys.argv else sys.argv.index(f"--cap={options.cap}")
        rest = sys.argv[1:at] + sys.argv[at + (2 if sys.argv[at] == "--cap" else 1) :]
        status = subprocess.run(
            [sys.executable, __file__, *rest], check=False, preexec_fn=partial(join, group)
        ).returncode
        peak = read_count(group, ("memory.max_usage_in_bytes", "memory.peak"))
        print(f"peak of the group: {format_size(peak or 0)} of {options.cap}; exit status {status}")
    sys.exit(status)


def measure(options: argparse.Namespace) -> None:
    """Decode before, beside and after the other program, and print what came."""
    experts = ExpertBudget.parse(options.experts) if options.experts else None
    take = parse_size(options.take, "--take")
    third = options.seconds / 3
    report: dict[str, Any] = {"model": options.model, "take_bytes": take}
    with LoadedModel(
        resolve_model(options.model).folder, LoadOptions(experts=experts, context=_CONTEXT)
    ) as model:
        decode(model, third / 2)  # until the pool is full
        swap, faults = psutil.swap_memory().used, read_pressure().major_faults
        for phase in ("before", "beside", "after"):
            other = None
            if phase == "beside":
                other = subprocess.Popen([sys.executable, "-c", _TAKE, str(take)])
            try:
                tokens = decode(model, third)
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
            governor = model.runtime.governor
            assert governor is not None
            report[phase] = {
                "tokens": len(tokens),
                "tokens_per_s": 1 / statistics.median(tokens) if tokens else 0.0,
                "slots": governor.current,
                "available_bytes": read_memory().usable,
            }
            print(
                f"{phase}: {report[phase]['tokens_per_s']:.2f} tokens/s, {governor.current} slots, "
                f"{format_size(report[phase]['available_bytes'])} available"
            )
        resizes = model.runtime.governor.resizes if model.runtime.governor is not None else []
    report["resizes"] = [(one.before, one.after, one.reason) for one in resizes]
    report["swapped_bytes"] = psutil.swap_memory().used - swap
    report["major_faults"] = read_pressure().major_faults - faults
    report["recovered"] = report["after"]["tokens_per_s"] / report["before"]["tokens_per_s"]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
