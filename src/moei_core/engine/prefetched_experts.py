"""Experts that arrive before their router has spoken, and the slots that they arrive in."""

from __future__ import annotations

import time

import torch

from moei_core.engine.hints import Hinter
from moei_core.engine.loads import Load, Step
from moei_core.engine.slots import SlotPool
from moei_core.engine.statistics import RuntimeStatistics
from moei_core.engine.transfers import TransferQueue
from moei_core.scheduler import ExpertScheduler
from moei_core.trace.format import TraceEvent
from moei_core.trace.writer import TraceWriter
from moei_core.types import ExpertKey, LayerAccess, ScoredExpert


class PrefetchedExperts:
    """The part of an ``ExpertRuntime`` that settles prefetches with the brain."""

    _hints_first = False
    """Whether hints are computed before a layer's experts, and not while those are on their way."""
    _scheduler: ExpertScheduler
    _transfers: TransferQueue
    _pool: SlotPool
    _slots: dict[ExpertKey, int]
    _prefetch_slots: int
    """Slots that the queue has, or that prefetches are arriving in."""
    _unforeseen: tuple[LayerAccess, torch.Tensor | None] | None = None
    """A layer that was decided on and not looked ahead from: its access, and its hidden states to make hints of."""
    hinter: Hinter | None
    recorder: TraceWriter | None
    statistics: RuntimeStatistics

    def _hints(self, access: LayerAccess, hidden_states: torch.Tensor) -> tuple[ScoredExpert, ...]:
        """What the model says of later layers for a single token, if anybody wants to know."""
        if self.hinter is None or len(hidden_states) > 1 or not self._wants_hints:
            return ()
        hints = self.hinter.hints(access.layer, hidden_states, access.order)
        if self.recorder is not None:
            self.recorder.record_hints(access.layer, hints)
        return hints

    def _foresee(self, hinted: bool = True) -> None:
        """Let the brain look ahead, if it has not since it decided on this layer. What the layer lacks has been asked
        for by then, so nothing waits for hints and predictions but who would wait anyway."""
        if self._unforeseen is None:
            return
        started = time.perf_counter()
        (access, hidden_states), self._unforeseen = self._unforeseen, None
        if hidden_states is not None and hinted:
            access = access._replace(hints=self._hints(access, hidden_states))
        self._follow(self._scheduler.look_ahead(access))
        self.statistics.decide_s += time.perf_counter() - started

    def _follow(self, foreseen: tuple[ExpertKey, ...]) -> None:
        """Begin to prefetch."""
        # Readers woken for nothing would take the interpreter's lock from whoever computes.
        if foreseen:
            self._transfers.prefetch(foreseen)

    def _settle_prefetches(self) -> None:
        """Tell the scheduler what became of prefetches, in order. Raises: what reading one of them has raised."""
        self._transfers.end_stream()
        self._take_returned()
        failure: Exception | None = None
        for step, load in self._transfers.take_events():
            key = load.key
            if step is Step.STARTED:
                self._scheduler.start_load(key)
                self._note(TraceEvent.START_LOAD, *key)
            elif step is Step.FAILED:
                self._scheduler.cancel_load(key)
                self._note(TraceEvent.CANCEL_LOAD, *key)
                failure = failure if load.excused else load.failure
            else:
                stays, evicted = self._scheduler.finish_load(key)
                self._note(TraceEvent.FINISH_LOAD, *key)
                self.statistics.bytes_read += load.nbytes
                self.statistics.bytes_prefetched += load.nbytes
                for victim in evicted:
                    self._forget(victim)
                if stays:
                    self._slots[key] = load.slot
                    self._hold(load)
                    self._add_spare()
                else:
                    self._transfers.add_spare(load.slot)
        if failure is not None:
            # The turn has failed: what else was begun in it must not fail the next one, too.
            self._transfers.abandon_demand()
            raise failure

    def _share_with_prefetches(self, wanted: int) -> None:
        """Let prefetches have ``wanted`` slots. Some may come at later accesses: not all that are free of experts are
        free of readers."""
        if wanted < self._prefetch_slots:
            self._transfers.end_prefetching()
            self._take_returned()
            self._prefetch_slots = 0
        while self._prefetch_slots < wanted and self._pool.free:
            self._transfers.add_spare(self._pool.take())
            self._prefetch_slots += 1

    def _promote(self, key: ExpertKey) -> bool:
        """Whether ``key`` was on its way; then it is demanded now, and the queue gets another spare."""
        load = self._transfers.promote(key)
        if load is None:
            return False
        self._slots[key] = load.slot
        if not load.borrowed:
            self._add_spare()
        return True

    def _add_spare(self) -> None:
        """Give the queue another slot for the one that it had, if there is any: pools are made smaller in between."""
        if self._pool.free:
            self._transfers.add_spare(self._pool.take())
        else:
            self._prefetch_slots -= 1

    def _take_returned(self, wait: bool = False) -> None:
        for slot in self._transfers.take_returned(wait):
            self._pool.give_back(slot)

    @property
    def _wants_hints(self) -> bool:
        raise NotImplementedError

    def _hold(self, load: Load) -> None:
        raise NotImplementedError

    def _forget(self, key: ExpertKey) -> None:
        raise NotImplementedError

    def _note(self, kind: TraceEvent, a: int = 0, b: int = 0) -> None:
        raise NotImplementedError
