"""Real routing at real size: what moving experts costs, beside what this machine could do at best.

    moei bench --synthetic deepseek-v2-lite --quant q4_0          (makes and packs the model, once)
    python benchmarks/tiers.py --trace TRACE.safetensors

Every figure comes with its ceiling, measured or computed in the same run: the bandwidth with which the engine's
readers read experts while nothing computes, before and after; for a decode, the time of its own computing or of its
own missing bytes at that bandwidth, whichever is longer (perfect overlap), and what the best possible cache (Belady's)
would make of it; for a prompt, its absent bytes at that bandwidth, or its computing if that is longer. The simulator's
prediction, with the measured machine, stands beside the measured speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import DEFAULT_POLICY, POLICIES
from moei_core.config import FULL_OVERLAP, ExpertBudget, GenerationSettings
from moei_core.engine.forced_routing import follow
from moei_core.engine.generate import GenerationTimes, Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hub.resolve import resolve_model
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.clock import Clock, Costs
from moei_core.sim.hardware import Hardware
from moei_core.sim.replay import PassAccesses, replay
from moei_core.trace import Trace, next_uses, read_trace
from moei_core.trace.hints import with_made_hints
from moei_core.types import Phase

MODEL = "synthetic:deepseek-v2-lite@26:q4_0"
WARM_UP = 64
"""Tokens of the prompt that fills the cache before anything is measured."""
BEFORE = 256
"""Tokens of its reply, in which policies learn, as they do in the first reply of a chat."""
TURN = 4
"""Tokens of each reply before it is the next one's turn."""


@dataclass(slots=True)
class Measured:
    """One prompt and its reply. Seconds and bytes; stall: waiting for experts. useful: prefetches that were there
    before their router spoke, which are no misses."""

    prefill_s: float
    prefill_stall_s: float
    prefill_nbytes: int
    prefill_absent: int
    decode_s: float
    decode_stall_s: float
    decode_expert_s: float
    misses: int
    useful: int
    tokens: int


class Reply:
    """The next rows of the trace: a prompt of any tokens (its routing is forced) and, in parts, a reply."""

    def __init__(self, model: LoadedModel, prompt_tokens: int, new_tokens: int) -> None:
        self._model, self._times = model, GenerationTimes()
        self._before, self._misses = model.runtime.snapshot(), model.runtime.misses
        self._useful = model.scheduler.prefetch_statistics.useful
        generator = Generator(
            model.adapter.model,
            model.runtime,
            ConversationCache(model.adapter.config),
            lambda: False,
            model.budget.prefill_chunk,
        )
        settings = GenerationSettings(max_new_tokens=new_tokens + 1, temperature=0.0)
        prompt = list(np.random.default_rng(prompt_tokens).integers(0, 1000, prompt_tokens).tolist())
        model.scheduler.request_start()
        self._tokens = generator.tokens(prompt, settings, frozenset(), self._times, model.context)
        next(self._tokens)

    def advance(self, tokens: int) -> float:
        """The next ``tokens`` tokens; the seconds that they took."""
        begin = len(self._times.token_s)
        for _ in islice(self._tokens, tokens):
            pass
        return sum(self._times.token_s[begin:])

    def end(self) -> Measured:
        """What all of it came to."""
        for _ in self._tokens:
            pass
        model, times = self._model, self._times
        model.scheduler.request_end()
        work, first = model.runtime.statistics.minus(self._before), times.prefill_work
        return Measured(
            times.prefill_s,
            first.stall_s,
            first.bytes_read,
            times.prefill_misses,
            sum(times.token_s),
            work.stall_s - first.stall_s,
            work.expert_compute_s - first.expert_compute_s,
            model.runtime.misses - self._misses - times.prefill_misses,
            model.scheduler.prefetch_statistics.useful - self._useful,
            len(times.token_s),
        )


def request(model: LoadedModel, prompt_tokens: int, new_tokens: int) -> Measured:
    return Reply(model, prompt_tokens, new_tokens).end()


def load(
    trace: Trace, share: float, policy: str, *, stream: bool = True, prefetch: bool = False
) -> LoadedModel:
    options = LoadOptions(
        experts=ExpertBudget(fraction=share),
        context=1024,
        policy=policy,
        overlap=replace(FULL_OVERLAP, stream=stream),
        predictor="router" if prefetch else None,
        prefetch=PrefetchMode.ON if prefetch else PrefetchMode.OFF,
    )
    model = LoadedModel(resolve_model(ARGS.model).folder, options)
    follow(model.runtime, model.spec, trace)
    return model


def check_direct(model: LoadedModel) -> None:
    """Buffered reads would measure the page cache and not the disk."""
    assert model.runtime._store.direct, "this file system refuses O_DIRECT"


def bandwidth(model: LoadedModel) -> float:
    """Bytes a second of the engine's own readers over absent experts in file order, nothing computing.

    The second time: the first commits the memory of the slots.
    """
    read_absent(model)
    return read_absent(model)


def latency(model: LoadedModel) -> float:
    """Seconds from asking for one expert until it is handed out, beyond its share of the bandwidth.

    A system call, waking a reader, the checksum of what came last, waking the engine. In turns, as the disk changes.
    """
    nbytes, found = max(model.spec.expert_nbytes.values()), []
    for _ in range(5):
        found.append(nbytes / read_absent(model, 60, at_once=1) - nbytes / read_absent(model, 60))
    return max(0.0, statistics.median(found))


def read_absent(model: LoadedModel, count: int = 300, at_once: int | None = None) -> float:
    """Read so many absent experts; bytes a second. at_once: asked for before the first is there; None: what fits."""
    runtime = model.runtime
    runtime._settle_prefetches()
    resident = set(model.scheduler.residents())
    keys = [key for key in runtime._store.experts() if key not in resident][:count]
    started, nbytes, asked, done_with = time.perf_counter(), 0, 0, 0
    while done_with < len(keys):
        while asked < len(keys) and runtime._pool.free and (at_once is None or asked - done_with < at_once):
            runtime._transfers.demand(keys[asked], runtime._pool.take())
            asked += 1
        done = runtime._transfers.next_ready()
        done_with += 1
        assert done.failure is None
        nbytes += done.nbytes
        runtime._pool.give_back(done.slot)
    return nbytes / (time.perf_counter() - started)


def prompts(trace: Trace, share: float, rounds: int) -> list[dict[str, float | str]]:
    """Times to the first token on a warm cache, with and without streaming."""
    rows: list[dict[str, float | str]] = []
    for stream in (True, False):
        with load(trace, share, DEFAULT_POLICY, stream=stream) as model:
            disk, nbytes = bandwidth(model), max(model.spec.expert_nbytes.values())
            request(model, WARM_UP, 1)
            for tokens in ARGS.prompts:
                several = [request(model, tokens, 1) for _ in range(rounds)]
                absent = [one.prefill_absent * nbytes for one in several]
                computing = [one.prefill_s - one.prefill_stall_s for one in several]
                bounds = [max(a / disk, c) for a, c in zip(absent, computing, strict=True)]
                ratios = [one.prefill_s / bound for one, bound in zip(several, bounds, strict=True)]
                rows.append(
                    {
                        "experts": share,
                        "prompt": tokens,
                        "streaming": "yes" if stream else "no",
                        "ttft_s": statistics.median(one.prefill_s for one in several),
                        "waiting_s": statistics.median(one.prefill_stall_s for one in several),
                        "absent_over_bandwidth_s": statistics.median(absent) / disk,
                        "computing_s": statistics.median(computing),
                        "over_bound": statistics.median(ratios),
                        "read_over_absent": sum(one.prefill_nbytes for one in several) / sum(absent),
                        "disk_gb_per_s": disk / 1e9,
                    }
                )
    return rows


def decode(
    trace: Trace, share: float, cases: Sequence[tuple[str, float | None]]
) -> list[dict[str, float | str]]:
    """A long reply on a warm cache, after another one, by each case: in turns of a few tokens, that meet the same disk.

    cases: policy, and how many hints to prefetch by are right; None: no prefetching.
    """
    with ExitStack() as stack:
        traces = [trace if hints is None else with_made_hints(trace, hints) for _, hints in cases]
        models = [
            stack.enter_context(load(one, share, policy, prefetch=hints is not None))
            for one, (policy, hints) in zip(traces, cases, strict=True)
        ]
        check_direct(models[0])
        disk, delay = [bandwidth(models[0])], latency(models[0])
        for model in models:
            request(model, WARM_UP, ARGS.before)
        replies = [Reply(model, WARM_UP, ARGS.tokens) for model in models]
        turns: list[list[float]] = [[] for _ in cases]
        for number in range(ARGS.tokens // TURN):
            if 2 * number * TURN == ARGS.tokens:
                disk.append(read_absent(models[0]))
            for at in range(len(cases)):
                at = (at + number) % len(cases)
                turns[at].append(replies[at].advance(TURN))
        done = [reply.end() for reply in replies]
        disk.append(read_absent(models[0]))
        return [
            row(one, model, case, measured, statistics.fmean(disk), delay, seconds, turns[0])
            for one, model, case, measured, seconds in zip(traces, models, cases, done, turns, strict=True)
        ]


def row(
    trace: Trace,
    model: LoadedModel,
    case: tuple[str, float | None],
    one: Measured,
    disk: float,
    delay: float,
    seconds: list[float],
    base: list[float],
) -> dict[str, float | str]:
    """A reply and its ceilings. disk, delay: ``bandwidth``, ``latency``. seconds: of its turns. base: of those of the
    first case."""
    policy, hints = case
    nbytes = max(model.spec.expert_nbytes.values())
    layers, width = len(model.spec.num_experts), model.spec.num_experts_per_tok
    slots, chunk = model.budget.resident, model.budget.prefill_chunk
    lookups = one.tokens * layers * width
    computing = one.decode_s - one.decode_stall_s
    bound = max(computing, (one.misses + one.useful) * nbytes / disk)
    machine = Hardware(
        name="measured",
        memory_bandwidth=lookups * nbytes / one.decode_expert_s,
        dense_seconds=(computing - one.decode_expert_s) / one.tokens / layers,
        disk_bandwidth=disk,
        disk_latency=delay,
    )
    simulated = simulate(trace, policy, slots, machine, nbytes, chunk, hints is not None)
    best = simulate(trace, "global-belady-bypass", slots, machine, nbytes, chunk)
    belady = max(computing, best.disk_nbytes / disk)
    ratios = [theirs / ours for theirs, ours in zip(base, seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "experts": model.budget.slots / model.spec.total_experts,
        "policy": policy if hints is None else f"{policy}, hints {hints:g}",
        "tokens_per_s": one.tokens / one.decode_s,
        "x_first": f"{middle:.2f} ({low:.2f}-{high:.2f})",
        "hit_rate": 1 - one.misses / lookups,
        "waiting": one.decode_stall_s / one.decode_s,
        "of_own_bound": bound / one.decode_s,
        "of_belady_bound": belady / one.decode_s,
        "simulated_tokens_per_s": simulated.decode_tokens / simulated.decode_seconds,
        "disk_gb_per_s": disk / 1e9,
        "disk_latency_ms": 1e3 * delay,
    }


class ReplyClock(Clock):
    """Counts only the passes after the second prompt, as ``decode`` does."""

    prompts = 0

    def begin_pass(self, one: PassAccesses) -> None:
        if one.phase is Phase.PREFILL:
            self.prompts += 1
        elif self.prompts == 2:
            self.prompts += 1
            # In place: the links count into the same object.
            for field in fields(self.costs):
                setattr(self.costs, field.name, 0)
        super().begin_pass(one)


def simulate(
    trace: Trace, policy: str, slots: int, machine: Hardware, nbytes: int, chunk: int, prefetch: bool = False
) -> Costs:
    """What the clock says of the same two requests: costs of the second reply."""
    part = trace.as_requests([(WARM_UP, ARGS.before), (WARM_UP, ARGS.tokens)], chunk=chunk)
    made = POLICIES[policy](slots, part.experts_by_layer)
    brain = ExpertScheduler(
        ExpertCache(slots, made),
        part.num_experts_per_tok,
        PREDICTORS["router"](part.experts_by_layer) if prefetch else None,
        PrefetchMode.ON,
        prefetch_slots=2 * part.num_experts_per_tok,
        num_experts=part.experts_by_layer,
    )
    clock = ReplyClock(machine, dict.fromkeys(part.moe_layers, nbytes), brain)
    replay(part, brain, clock, next_uses=next_uses(part) if made.needs_future else None)
    return clock.costs


def show(rows: list[dict[str, float | str]]) -> None:
    names = list(rows[0])
    cells = [[name if row is None else _text(row[name]) for name in names] for row in (None, *rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    print(flush=True)


def _text(value: float | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    trace = read_trace(ARGS.trace)
    report: dict[str, list[dict[str, float | str]]] = {"decode": [], "prompts": []}
    for share in ARGS.experts:
        if ARGS.tokens:
            cases: list[tuple[str, float | None]] = [("layer-lru", None), (DEFAULT_POLICY, None)]
            cases += [(DEFAULT_POLICY, right) for right in ARGS.hints]
            rows = decode(trace, share, cases)
            show(rows)
            report["decode"] += rows
        if ARGS.rounds:
            report["prompts"] += prompts(trace, share, ARGS.rounds)
            show(report["prompts"][-2 * len(ARGS.prompts) :])
    if ARGS.json:
        json.dump(report, sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", required=True, help="a recorded trace whose routing is followed")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--experts", type=lambda text: [float(part) for part in text.split(",")], default="0.25,0.5"
    )
    parser.add_argument("--tokens", type=int, default=96, help="of the reply that is measured; 0: none")
    parser.add_argument(
        "--before", type=int, default=BEFORE, help="tokens of a reply before it, in which policies learn"
    )
    parser.add_argument(
        "--prompts", type=lambda text: [int(part) for part in text.split(",")], default="32,512"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each prompt; 0: none")
    parser.add_argument(
        "--hints",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[],
        help="also prefetch by hints of which such a share is right: .8,1",
    )
    parser.add_argument("--json", action="store_true")
    ARGS = parser.parse_args()
    main()
