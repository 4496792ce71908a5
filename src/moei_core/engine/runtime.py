"""``ExpertRuntime``: carries out the scheduler's plans for a hooked model.

Exactness: every expert's output goes to rows of its own in a float32 buffer, and the rows of a token are
summed in ascending expert order. So what was resident, and the order in which experts arrived, never changes
a bit of the result.

Order (reordered execution: ProMoE, arXiv 2410.22134, section 4): a shared expert and resident ones are computed while
the absent ones are on their way, and each absent one as it arrives, which frees its slot for the next. A single token
computes all that is there in one call, and if its experts are small nothing until all are there. An absent expert is
asked for as soon as a slot is free, in the order of the files; when all are, a long prompt streams those of the next
layer into what becomes free.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moei_core.adapters.dense_clock import DENSE_CLOCK
from moei_core.config import FULL_OVERLAP, Overlap
from moei_core.engine.expert_compute import HeldExpert, stored_alike
from moei_core.engine.forced_routing import ForcedRouting
from moei_core.engine.hints import Hinter
from moei_core.engine.layer_work import Choice, LayerWork, TokenWork
from moei_core.engine.loads import Load
from moei_core.engine.native_compute import NativeExperts, native_experts
from moei_core.engine.prefetched_experts import PrefetchedExperts
from moei_core.engine.resident_layers import ResidentLayers
from moei_core.engine.slots import SlotPool
from moei_core.engine.statistics import LayerClock, RuntimeStatistics
from moei_core.engine.transfers import TransferQueue
from moei_core.engine.turns import Turns
from moei_core.hardware.budget import residents
from moei_core.hardware.pressure import MemoryGovernor
from moei_core.quant import native
from moei_core.scheduler import ExpertScheduler
from moei_core.store.base import ExpertLayout, ExpertStore
from moei_core.trace.format import TraceEvent
from moei_core.trace.hidden import HiddenSampler
from moei_core.trace.writer import TraceWriter
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase

_AT_ONCE = 8
"""Experts of a prompt that one call computes while others arrive; of what arrives, at most half of the working set."""
_WORTH_BEGINNING = 2 << 20
"""Bytes of a token's experts in a layer from which it pays to compute some before the others are there."""


class ExpertRuntime(PrefetchedExperts, ResidentLayers, Turns):
    """An ``ExpertsRuntime`` over a store, a slot pool and a scheduler.

    before_access is called at the start of every access; it may raise to abandon the forward pass.
    recorder notes what the routers chose. routing, where given, chooses in their place. governor, where given,
    is asked before every access how many slots the system's memory allows. hinter tells the brain what later
    layers are likely to choose. sampler keeps layer inputs for training predictors.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        scheduler: ExpertScheduler,
        threads: int = 1,
        overlap: Overlap = FULL_OVERLAP,
    ) -> None:
        """threads: for torch to compute with.

        torch's waiting threads spin: beside the native kernels, which have threads of their own, it gets one
        in decoding. The counts follow the phase and never a budget (other counts may round otherwise).
        """
        self._store, self._pool, self._scheduler = store, pool, scheduler
        self._total_experts = sum(1 for _ in store.experts())
        self._prefetch_slots = 0
        self._slots: dict[ExpertKey, int] = {}
        self._held: dict[ExpertKey, HeldExpert] = {}
        self._kinds: dict[tuple[object, ...], int] = {}
        self._kind_of: dict[ExpertKey, int] = {}
        self._kernels: dict[tuple[int, int], NativeExperts | None] = {}
        self._tables = {}
        self._computed = []
        self._reorder = overlap.reorder
        self._transfers = TransferQueue(
            store, pool.view, chunk_nbytes=overlap.chunk_nbytes, preempt=overlap.preempt
        )
        self._phase = Phase.PREFILL
        self._threads = {Phase.PREFILL: threads, Phase.DECODE: 1 if native.available() else threads}
        self._pass_started = self._pass_stall = self._pass_dense = 0.0
        self._meanwhile: Callable[[], None] | None = None
        self.before_access: Callable[[], None] | None = None
        self.recorder: TraceWriter | None = None
        self.routing: ForcedRouting | None = None
        self.governor: MemoryGovernor | None = None
        self.hinter: Hinter | None = None
        self.sampler: HiddenSampler | None = None
        self.statistics = RuntimeStatistics()

    @property
    def misses(self) -> int:
        """Lookups that found no resident expert, so far."""
        return self._scheduler.statistics.misses

    @property
    def _wants_hints(self) -> bool:
        return self._scheduler.wants_hints or self.recorder is not None

    def snapshot(self) -> RuntimeStatistics:
        """A copy of the statistics so far."""
        return replace(self.statistics)

    def forward_pass(self, phase: Phase, tokens: int) -> None:
        """A forward pass of the model over ``tokens`` tokens starts."""
        self.settle()
        self._phase = phase
        if torch.get_num_threads() != self._threads[phase]:
            torch.set_num_threads(self._threads[phase])
        started = self._pass_started = time.perf_counter()
        self._pass_stall, self._pass_dense = self.statistics.stall_s, DENSE_CLOCK.seconds
        if self.recorder is not None:
            self.recorder.begin_pass(phase, tokens)
        if self.sampler is not None:
            self.sampler.begin_pass(tokens)
        if self.routing is not None:
            self.routing.forward_pass(tokens)
        self._scheduler.forward_pass(phase, tokens)
        if self.hinter is not None:
            self.hinter.watch(self._wants_hints)
        self.statistics.decide_s += time.perf_counter() - started

    def end_pass(self) -> None:
        """The forward pass is complete."""
        self.abandon_pass()
        if self.routing is not None:
            self.routing.end_pass()
        stall = self.statistics.stall_s - self._pass_stall
        ended = time.perf_counter()
        took = ended - self._pass_started
        self._scheduler.pass_end(stall, took)
        self.statistics.decide_s += time.perf_counter() - ended
        self._note(TraceEvent.STALL, round(stall * 1e9), round(took * 1e9))

    def abandon_pass(self) -> None:
        """The forward pass goes no further."""
        self.settle()
        self.statistics.dense_s += DENSE_CLOCK.seconds - self._pass_dense
        self._pass_dense = DENSE_CLOCK.seconds

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A result of the pass, where the processor can read it."""
        return tensor.cpu()

    def run_layer(
        self,
        module: Any,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        self.settle()
        dense, clock = DENSE_CLOCK.seconds, LayerClock(self.statistics)
        self._before_access()
        clock.add_to("decide_s")
        if self.routing is not None:
            top_k_index = self.routing.top_k_index(layer, top_k_index)
        self._settle_prefetches()
        single = top_k_index.shape[0] == 1
        named = _named(top_k_index, int(module.num_experts)) if single else ()
        if self.recorder is not None:
            self.recorder.record(layer, top_k_index.numpy())
        if self.sampler is not None and self.sampler.wants:
            self.sampler.record(layer, hidden_states[self.sampler.wants].to(torch.float32).numpy())
        work, access = self._gather(module, layer, hidden_states, top_k_index, top_k_weights, named)
        clock.add_to("combine_s")
        try:
            plan = self._scheduler.decide(access)
            clock.add_to("decide_s")
            self._unforeseen = access, hidden_states
            self._meanwhile = None if meanwhile is None else partial(self._compute_beside, meanwhile, clock)
            if self._hints_first:
                self._unforeseen = access._replace(hints=self._hints(access, hidden_states)), None
            self._carry_out(plan, work)
        except BaseException:
            # A replay knows of no failure: the brain learns from this layer all the same.
            self._foresee(hinted=False)
            self._reconcile()
            raise
        clock.add_to("move_s")
        total = work.total()
        clock.add_to("combine_s")
        # What torch computed for experts is no dense computing, what was computed beside them is.
        DENSE_CLOCK.seconds = dense + clock.beside_s
        return total

    def _compute_beside(self, meanwhile: Callable[[], None], clock: LayerClock) -> None:
        """What the layer needs beside its experts, once."""
        self._meanwhile, started = None, time.perf_counter()
        meanwhile()
        clock.beside_s = time.perf_counter() - started

    def _before_access(self) -> None:
        if self.before_access is not None:
            self.before_access()
        if self.governor is not None and (slots := self.governor.poll()) is not None:
            self.resize(slots)

    def _gather(
        self,
        module: Any,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        named: tuple[int, ...],
    ) -> tuple[LayerWork | TokenWork, LayerAccess]:
        """What is to be computed and what that needs. Each token's experts ascending: the order of summation."""
        width = top_k_index.shape[-1]
        if (
            self._short_tokens
            and len(named) == width
            and len(set(named)) == width
            and hidden_states.is_contiguous()
        ):
            weights = dict(sorted(zip(named, top_k_weights[0].tolist(), strict=True)))
            experts = tuple(weights)
            return (
                TokenWork(module, hidden_states, weights, lambda expert: self._kernel(module, expert)),
                LayerAccess(layer, experts, (1,) * width, self._phase, (), named),
            )
        choice = Choice.of(top_k_index, top_k_weights, named, int(module.num_experts))
        work = self._work(module, hidden_states, choice)
        counts = tuple(len(positions) for positions in work.rows.values())
        return work, LayerAccess(layer, tuple(work.rows), counts, self._phase, (), named)

    def resize(self, slots: int) -> None:
        """Hold at most ``slots`` of the largest experts from now on, at most as many as the pool was made for.

        Between accesses only. What the pool no longer needs goes back to the system.
        """
        self.settle()
        capacity = residents(slots, self._scheduler.working_slots, self._pool.whole(self._total_experts))
        self._note(TraceEvent.RESIZE, capacity)
        for key in self._scheduler.resize(capacity):
            self._forget(key)
        self._pool.resize(slots)

    def make_room(self) -> bool:
        """Memory for computing was refused: give some of what experts hold back. Returns whether there was any."""
        return False

    def _work(self, module: Any, hidden_states: torch.Tensor, choice: Choice) -> LayerWork:
        return LayerWork(module, hidden_states, choice, lambda expert: self._kernel(module, expert))

    def _carry_out(self, plan: FetchPlan, work: LayerWork | TokenWork) -> None:
        """The waves in one flow: what a wave evicts is never needed by this access, so it can go at once, and
        each expert that does not stay makes room for the next."""
        for key in plan.cancel:
            self.statistics.bytes_read += self._transfers.cancel(key)
        for wave in plan.waves:
            for key in wave.evict:
                self._forget(key)
        if self._prefetch_slots != plan.prefetch_slots:
            self._share_with_prefetches(plan.prefetch_slots)
        loads = [key for wave in plan.waves for key in wave.load]
        arriving = len(loads)
        leaving = {key for wave in plan.waves for key in wave.release}
        absent = deque(sorted((key for key in loads if not self._promote(key)), key=self._place_on_disk))
        # Only the first wave can be without loads: it holds what is resident.
        resident = plan.waves[0].compute if plan.hits else ()
        whole = isinstance(work, TokenWork)
        # One call for all is fastest, but while a prompt computes slots must become free, and experts arrive.
        batch = _AT_ONCE if loads and work.tokens > 1 else len(resident)
        several = len(loads) if whole else max(1, min(_AT_ONCE, self._scheduler.working_slots // 2))
        # What is computed while the rest arrives takes a call of its own.
        patient = whole and (len(resident) + len(loads)) * self._pool.slot_nbytes < _WORTH_BEGINNING
        looking_ahead, to_stream = False, len(plan.stream)
        while True:
            self._ask(absent)
            if not absent and not looking_ahead:
                looking_ahead = True
                self._foresee()
                # Readers woken for nothing would take the interpreter's lock from whoever computes.
                if plan.stream:
                    self._transfers.stream(sorted(plan.stream, key=self._place_on_disk))
            if self._meanwhile is not None:
                self._meanwhile()
            while looking_ahead and to_stream and self._pool.free > self._prefetch_slots:
                self._transfers.lend(self._pool.take())
                to_stream -= 1
            if arriving and (self._transfers.has_ready or not resident or not self._reorder or patient):
                keys = [self._arrival()]
                while len(keys) < several and (
                    self._transfers.has_ready or (patient and len(keys) < arriving and not absent)
                ):
                    keys.append(self._arrival())
                arriving -= len(keys)
                if whole and not absent and (self._reorder or not arriving):
                    keys, resident = sorted((*keys, *resident)), ()
                self._compute(work, keys)
                for key in leaving.intersection(keys):
                    self._forget(key)
            elif resident:
                self._compute(work, resident[:batch])
                resident = resident[batch:]
            else:
                break

    def _compute(self, work: LayerWork | TokenWork, keys: Iterable[ExpertKey]) -> None:
        started = time.perf_counter()
        work.compute([self._held[key] for key in keys])
        self.statistics.expert_compute_s += time.perf_counter() - started

    def _kernel(self, module: Any, expert: HeldExpert) -> NativeExperts | None:
        """The native kernel for experts of this layer that are stored like ``expert``."""
        name = expert.key.layer, expert.kind
        if name not in self._kernels:
            self._kernels[name] = native_experts(module, expert.layout)
        return self._kernels[name]

    def _hold(self, load: Load) -> None:
        """The bytes of an expert are complete in its slot."""
        key, layout, address = load.key, self._store.layout(load.key), self._pool.address(load.slot)
        self._pool.fit(load.slot, key.layer)
        self._held[key] = HeldExpert(key, layout, load.view, address, self._kind(key, layout))

    def _kind(self, key: ExpertKey, layout: ExpertLayout) -> int:
        """The same number for all experts that are stored alike."""
        if key not in self._kind_of:
            self._kind_of[key] = self._kinds.setdefault(stored_alike(layout), len(self._kinds))
        return self._kind_of[key]

    def _ask(self, absent: deque[ExpertKey]) -> None:
        """Demand as many of ``absent`` as there are free slots for."""
        if not absent:
            return
        full = not self._pool.has_room(absent[0].layer)
        self._take_returned(wait=full and len(self._slots) == len(self._held))
        while absent and self._pool.has_room(absent[0].layer):
            key = absent.popleft()
            self._slots[key] = self._pool.take(key.layer)
            self._transfers.demand(key, self._slots[key])

    def _arrival(self) -> ExpertKey:
        """The next demanded expert that is complete. Raises: what reading it has raised."""
        started = time.perf_counter()
        load = self._transfers.next_ready()
        self.statistics.stall_s += time.perf_counter() - started
        if load.failure is not None:
            self._pool.give_back(self._slots.pop(load.key))
            raise load.failure
        self.statistics.loads += 1
        self.statistics.bytes_read += load.nbytes
        self._hold(load)
        return load.key

    def _place_on_disk(self, key: ExpertKey) -> tuple[str, int]:
        first = self._store.layout(key).extents[0]
        return str(first.file), first.offset

    def _note(self, kind: TraceEvent, a: int = 0, b: int = 0) -> None:
        if self.recorder is not None:
            self.recorder.event(kind, a, b)

    def _forget(self, key: ExpertKey) -> None:
        self._tables.clear()
        self._held.pop(key, None)
        self._pool.give_back(self._slots.pop(key))

    def _reconcile(self) -> None:
        """After a plan was abandoned: make cache and slots agree again on what is really here."""
        self._transfers.abandon_demand()
        self._take_returned()
        for key in self._scheduler.residents():
            if key not in self._held:
                self._scheduler.cancel_load(key)
                self._note(TraceEvent.CANCEL_LOAD, *key)
        resident = set(self._scheduler.residents())
        for key in list(self._slots):
            if key not in self._held:
                del self._slots[key]
            elif key not in resident:
                self._forget(key)

    def close(self) -> None:
        """End the reader threads and the store, free the slots' views, detach from the model."""
        if self.hinter is not None:
            self.hinter.close()
        self._transfers.close()
        self._held.clear()


def _named(top_k_index: torch.Tensor, num_experts: int) -> tuple[int, ...]:
    """The experts of a single token as its router named them."""
    return tuple(expert for expert in top_k_index[0].tolist() if expert < num_experts)
