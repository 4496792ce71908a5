"""Runs of policies at budgets: one run, and sweeps of them over processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moei_core.cache.expert_cache import CacheStatistics, ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget
from moei_core.errors import UsageError
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.baselines import BASELINES
from moei_core.sim.clock import Clock, Costs
from moei_core.sim.hardware import Hardware
from moei_core.sim.replay import passes, replay
from moei_core.trace.format import Trace, read_trace
from moei_core.trace.hints import with_made_hints
from moei_core.trace.next_use import next_uses

NAMES = (*POLICIES, *BASELINES)
"""Everything that a run can be about: policies of the brain, and other systems' rules."""


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation. slots: residents of all layers, beside the working set."""

    path: str
    policy: str
    slots: int
    hardware: Hardware
    expert_nbytes: int
    first_sequence: int = 0
    last_sequence: int | None = None
    interleave: int = 1
    predictor: str | None = None
    prefetch: PrefetchMode = PrefetchMode.AUTO
    hints: float | None = None
    """Share of right ones among hints made for the trace; None: those that it has."""


@dataclass(slots=True)
class Result:
    """What one run came to. Rates are shares of expert lookups; bounds and speeds in tokens a second."""

    run: Run
    hit_rate: float
    hits: int
    misses: int
    bypasses: int
    costs: Costs
    by_task: dict[str, float] = field(default_factory=dict)
    prefetch: dict[str, int] = field(default_factory=dict)
    prefetch_kept: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.costs.tokens / self.costs.seconds if self.costs.seconds else 0.0

    @property
    def bound_tokens_per_second(self) -> float:
        """With these hits and everything else hidden perfectly."""
        seconds = self.costs.perfect_overlap_seconds(self.run.hardware)
        return self.costs.tokens / seconds if seconds else 0.0

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        costs = self.costs
        started = self.prefetch.get("started", 0)
        useful = self.prefetch.get("useful", 0)
        late = self.prefetch.get("late", 0)
        return {
            "policy": self.run.policy,
            "slots": self.run.slots,
            "hit_rate": round(self.hit_rate, 5),
            "ram_hit_rate": round(costs.ram_hits / costs.loads, 5)
            if costs.loads and self.run.hardware.has_gpu
            else None,
            "hits": self.hits,
            "misses": self.misses,
            "bypasses": self.bypasses,
            "demand_missed_bytes": costs.demand_nbytes,
            "prefetched_bytes": costs.prefetch_nbytes,
            "prefetch": self.prefetch
            | {
                "coverage": round((useful + late) / (useful + self.misses), 5) if started else 0.0,
                "waste": round(1 - (useful + late) / started, 5) if started else 0.0,
                "lateness": round(late / (useful + late), 5) if useful + late else 0.0,
                "kept": self.prefetch_kept,
            },
            "seconds": round(costs.seconds, 6),
            "stall_seconds": round(costs.stall_seconds, 6),
            "stall_share": round(costs.stall_seconds / costs.seconds, 5) if costs.seconds else 0.0,
            "tokens": costs.tokens,
            "tokens_per_second": round(self.tokens_per_second, 4),
            "bound_own_hits_tokens_per_second": round(self.bound_tokens_per_second, 4),
            "hit_rate_by_task": {task: round(rate, 5) for task, rate in self.by_task.items()},
        }


def interleaved(trace: Trace, users: int) -> Trace:
    """``users`` sequences at a time mixed token by token, as a server of several people would run them.

    Each group becomes one sequence and one request: that is what a brain sees that cannot tell users apart.
    """
    if users <= 1:
        return trace
    if trace.pass_offsets is not None:
        raise UsageError("--interleave needs a trace in which every token is a forward pass.")
    order: list[NDArray[np.int64]] = []
    bounds = [0]
    offsets = trace.sequence_offsets
    for start in range(0, trace.sequences, users):
        group = range(start, min(start + users, trace.sequences))
        token = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in group])
        turn = np.concatenate([np.arange(offsets[i + 1] - offsets[i]) for i in group])
        order.append(token[np.argsort(turn, kind="stable")])
        bounds.append(bounds[-1] + len(token))
    tokens = np.concatenate(order)
    return replace(
        trace,
        experts=trace.experts[tokens],
        sequence_offsets=np.asarray(bounds, np.int64),
        request_offsets=None,
        phase=None if trace.phase is None else trace.phase[tokens],
        weights=None,
        hints_experts=None,
        hints_scores=None,
        events=None,
        sequence_tasks=(),
    )


@lru_cache(maxsize=2)
def _prepared(path: str, first: int, last: int | None, users: int, hints: float | None) -> Trace:
    trace = read_trace(path)
    trace = interleaved(trace.subset(first, trace.sequences if last is None else last), users)
    return trace if hints is None else with_made_hints(trace, hints)


@lru_cache(maxsize=1)
def _future(path: str, first: int, last: int | None, users: int, hints: float | None) -> NDArray[np.int64]:
    return next_uses(_prepared(path, first, last, users, hints))


def simulate(run: Run) -> Result:
    """Carry out one run. Deterministic: the same run gives the same result on every machine."""
    source = (run.path, run.first_sequence, run.last_sequence, run.interleave, run.hints)
    trace = _prepared(*source)
    if run.policy in BASELINES:
        return _simulate_baseline(run, trace)
    policy = POLICIES[run.policy](run.slots, trace.experts_by_layer)
    predictor = PREDICTORS[run.predictor](trace.experts_by_layer) if run.predictor else None
    cache = ExpertCache(run.slots, policy)
    scheduler = ExpertScheduler(
        cache, trace.num_experts_per_tok, predictor, run.prefetch, num_experts=trace.experts_by_layer
    )
    nbytes = dict.fromkeys(trace.moe_layers, run.expert_nbytes)
    clock = Clock(run.hardware, nbytes, scheduler)
    marks: list[tuple[int, CacheStatistics]] = []
    replay(
        trace,
        scheduler,
        clock,
        next_uses=_future(*source) if policy.needs_future else None,
        on_sequence=lambda at: marks.append((at, replace(cache.statistics))),
    )
    statistics = cache.statistics
    return Result(
        run,
        statistics.hit_rate,
        statistics.hits,
        statistics.misses,
        statistics.bypasses,
        clock.costs,
        _by_task(trace, marks, statistics),
        asdict(scheduler.prefetch_statistics),
        scheduler.prefetching_by,
    )


def _by_task(
    trace: Trace, marks: Sequence[tuple[int, CacheStatistics]], final: CacheStatistics
) -> dict[str, float]:
    if not trace.sequence_tasks:
        return {}
    sums: dict[str, list[int]] = {}
    ends = [statistics for _, statistics in marks[1:]] + [final]
    for (sequence, begin), end in zip(marks, ends, strict=True):
        total = sums.setdefault(trace.sequence_tasks[sequence], [0, 0])
        total[0] += end.hits - begin.hits
        total[1] += end.hits + end.misses - begin.hits - begin.misses
    return {task: hits / max(lookups, 1) for task, (hits, lookups) in sorted(sums.items())}


def _simulate_baseline(run: Run, trace: Trace) -> Result:
    slots = run.slots + trace.num_experts_per_tok
    baseline = BASELINES[run.policy](run.hardware, trace.experts_by_layer, run.expert_nbytes, slots)
    for one in passes(trace):
        for access in one.accesses:
            baseline.access(access)
        baseline.end_pass(one.tokens)
    lookups = baseline.hits + baseline.misses
    rate = baseline.hits / lookups if lookups else 0.0
    return Result(run, rate, baseline.hits, baseline.misses, 0, baseline.costs)


def sweep(
    runs: Sequence[Run], workers: int | None = None, progress: Callable[[Result], None] | None = None
) -> list[Result]:
    """Carry out ``runs`` on ``workers`` processes (default: all cores), in the order given."""
    workers = min(workers or os.cpu_count() or 1, len(runs))
    done: dict[int, Result] = {}
    for at, result in _carry_out(runs, workers):
        done[at] = result
        if progress is not None:
            progress(result)
    return [done[at] for at in range(len(runs))]


def _carry_out(runs: Sequence[Run], workers: int) -> Iterator[tuple[int, Result]]:
    if workers <= 1:
        for at, run in enumerate(runs):
            yield at, simulate(run)
        return
    # One process a core is the parallelism; BLAS threads beside it only fight each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(simulate, run): at for at, run in enumerate(runs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def resident_slots(budget: ExpertBudget, trace: Trace, expert_nbytes: int) -> int:
    """Resident slots that ``budget`` means for ``trace``.

    A percentage is floor(P x experts) slots in each layer, the working set beside it, as in the literature's
    tables. A size is one budget for all slots, of which the working set takes its share first.

    Raises: UsageError if the budget does not even hold the working set.
    """
    layers = len(trace.moe_layers)
    if budget.fraction is not None:
        return int(budget.fraction * trace.num_experts + 1e-9) * layers
    slots = budget.slots(layers * trace.num_experts, expert_nbytes) - trace.num_experts_per_tok
    if slots < 0:
        raise UsageError(
            "--experts: this is less than the experts of one token of one layer.",
            hint=f"The smallest is {trace.num_experts_per_tok * expert_nbytes} bytes.",
        )
    return slots
