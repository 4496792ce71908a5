"""The only replay loop: a trace becomes the events that a live run would have sent to the brain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.tiers import TieredScheduler
from moei_core.trace.format import Trace, TraceEvent
from moei_core.trace.hints import hints_of_token
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class PassAccesses:
    """One forward pass: its accesses in layer order, and which request and sequence it opens, if any.

    next_uses: for each access the next uses of its experts, if they were asked for.
    """

    index: int
    phase: Phase
    tokens: int
    starts_request: bool
    sequence: int
    accesses: list[LayerAccess]
    next_uses: list[list[int]] | None


def passes(trace: Trace, next_uses: NDArray[np.int64] | None = None) -> Iterator[PassAccesses]:
    """The forward passes of ``trace`` in order. Single-token passes, nearly all of them, take a fast path."""
    bounds = trace.passes
    starts = set(trace.requests[:-1].tolist())
    sequence_of = np.repeat(np.arange(trace.sequences), np.diff(trace.sequence_offsets))
    phase_of = None if trace.phase is None else trace.phase.tolist()
    single = np.diff(bounds) == 1
    index = 0
    while index < len(single):
        stop = index
        while stop < len(single) and single[stop] and stop - index < _BLOCK:
            stop += 1
        if stop > index:
            block = _single_rows(trace, int(bounds[index]), int(bounds[stop]), next_uses)
        else:
            stop = index + 1
            block = [_merged_rows(trace, int(bounds[index]), int(bounds[stop]), next_uses)]
        for rows, ahead in block:
            first = int(bounds[index])
            phase = Phase.DECODE if phase_of is None else Phase(phase_of[first])
            # As in the engine, hints are of single tokens.
            hints = hints_of_token(trace, first) if bounds[index + 1] - first == 1 else {}
            accesses = [
                LayerAccess(layer, tuple(experts), counts, phase, hints.get(i, ()), tuple(named))
                for i, (layer, (experts, counts, named)) in enumerate(
                    zip(trace.moe_layers, rows, strict=True)
                )
            ]
            yield PassAccesses(
                index,
                phase,
                int(bounds[index + 1]) - first,
                first in starts,
                int(sequence_of[first]),
                accesses,
                ahead,
            )
            index += 1


_ONES = [(1,) * length for length in range(65)]


def _single_rows(trace: Trace, start: int, stop: int, next_uses: NDArray[np.int64] | None) -> Any:
    block = np.asarray(trace.experts[start:stop])
    order = np.argsort(block, axis=2, kind="stable") if next_uses is not None else None
    rows = (np.sort(block, axis=2) if order is None else np.take_along_axis(block, order, 2)).tolist()
    ahead = (
        None
        if order is None or next_uses is None
        else np.take_along_axis(next_uses[start:stop], order, 2).tolist()
    )
    none, width, named = trace.num_experts, block.shape[2], block.tolist()
    ones = _ONES[width] if width < len(_ONES) else (1,) * width
    for token, layers in enumerate(rows):
        future = None if ahead is None else ahead[token]
        result = []
        for i, row in enumerate(layers):
            if row[-1] == none:
                row = row[: row.index(none)]
                if future is not None:
                    future[i] = future[i][: len(row)]
                chosen = [expert for expert in named[token][i] if expert != none]
                result.append((row, ones[: len(row)], chosen))
            else:
                result.append((row, ones, named[token][i]))
        yield result, future


def _merged_rows(trace: Trace, start: int, stop: int, next_uses: NDArray[np.int64] | None) -> Any:
    result, future = [], []
    for i in range(len(trace.moe_layers)):
        flat = np.asarray(trace.experts[start:stop, i]).reshape(-1)
        experts, first, counts = np.unique(flat, return_index=True, return_counts=True)
        real = experts < trace.num_experts
        result.append((experts[real].tolist(), tuple(counts[real].tolist()), ()))
        if next_uses is not None:
            future.append(next_uses[start:stop, i].reshape(-1)[first[real]].tolist())
    return result, (None if next_uses is None else future)


@dataclass(slots=True)
class Observer:
    """What a driver does at the seams of the replay. The base class does nothing; the clock subclasses it."""

    def begin_pass(self, one: PassAccesses) -> None:
        """A forward pass starts."""

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        """The plan of one access."""

    def end_pass(self) -> tuple[float, float] | None:
        """The pass is over: (seconds waited for experts, seconds in all), if this driver has a clock."""
        return None


class _RecordedEvents:
    """Sends what depended on the machine in the recorded run, each after as many steps as there."""

    def __init__(self, trace: Trace, scheduler: ExpertScheduler) -> None:
        self._events = [] if trace.events is None else trace.events.tolist()[::-1]
        self._scheduler, self._steps = scheduler, 0

    def step(self) -> None:
        """A forward pass or an access has begun, and its plan is made."""
        self._steps += 1
        while self._events and self._events[-1][0] <= self._steps:
            _, kind, a, b = self._events.pop()
            self._send(TraceEvent(kind), a, b)

    def _send(self, kind: TraceEvent, a: int, b: int) -> None:
        scheduler = self._scheduler
        if kind is TraceEvent.START_LOAD:
            scheduler.start_load(ExpertKey(a, b))
        elif kind is TraceEvent.FINISH_LOAD:
            scheduler.finish_load(ExpertKey(a, b))
        elif kind is TraceEvent.CANCEL_LOAD:
            scheduler.cancel_load(ExpertKey(a, b))
        elif kind is TraceEvent.RESIZE:
            scheduler.resize(a)
        elif kind is TraceEvent.RESIZE_DEVICE:
            assert isinstance(scheduler, TieredScheduler), "this trace was recorded with a device"
            scheduler.resize_device(a)
        elif kind is TraceEvent.PREFETCH_MODE:
            scheduler.prefetch_mode(PrefetchMode(a))
        elif kind is TraceEvent.STALL:
            scheduler.pass_end(a / 1e9, b / 1e9)


def replay(
    trace: Trace,
    scheduler: ExpertScheduler,
    observer: Observer | None = None,
    *,
    next_uses: NDArray[np.int64] | None = None,
    on_sequence: Callable[[int], None] | None = None,
    recorded_events: bool = False,
) -> None:
    """Send the whole trace to ``scheduler`` and its plans to ``observer``.

    next_uses: of ``trace.next_use.next_uses``, for policies that need the future. on_sequence: called before
    each new sequence (for statistics by task, and for progress). recorded_events: send the trace's own events
    too, which reproduces the recorded run; without them the observer's clock decides what happens when.
    """
    foresee = scheduler.foresee if next_uses is not None else None
    watch = observer if observer is not None else Observer()
    events = _RecordedEvents(trace, scheduler) if recorded_events else None
    open_request, sequence = False, -1
    for one in passes(trace, next_uses):
        if one.starts_request:
            if open_request:
                scheduler.request_end()
            if one.sequence != sequence:
                sequence = one.sequence
                if on_sequence is not None:
                    on_sequence(sequence)
            scheduler.request_start()
            open_request = True
        scheduler.forward_pass(one.phase, one.tokens)
        if observer is None and foresee is None and events is None:
            for access in one.accesses:
                scheduler.access(access)
            continue
        watch.begin_pass(one)
        if events is not None:
            events.step()
        for i, access in enumerate(one.accesses):
            if foresee is not None and one.next_uses is not None:
                foresee(one.next_uses[i])
            watch.carry_out(access, scheduler.access(access))
            if events is not None:
                events.step()
        times = watch.end_pass()
        if times is not None and events is None:
            scheduler.pass_end(*times)
    if open_request:
        scheduler.request_end()
