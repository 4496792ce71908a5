"""``ExpertRuntime``: carries out the scheduler's plans for a hooked model.

Exactness: every expert's output goes to rows of its own in a float32 buffer, and the rows of a token are
summed in ascending expert order. So what was resident, and the order in which experts arrived, never changes
a bit of the result.

Order (reordered execution: ProMoE, arXiv 2410.22134, section 4): resident experts are computed first while the
absent ones are on their way, then each as it arrives. An absent expert is asked for as soon as a slot is free,
in the order of the files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from moei_core.engine.expert_compute import ExpertWeights, expert_forward, weights_in_slot
from moei_core.engine.forced_routing import ForcedRouting
from moei_core.engine.hints import Hinter
from moei_core.engine.slots import SlotPool
from moei_core.engine.transfers import Step, TransferQueue
from moei_core.scheduler import ExpertScheduler
from moei_core.store.base import ExpertStore
from moei_core.trace.format import TraceEvent
from moei_core.trace.hidden import HiddenSampler
from moei_core.trace.writer import TraceWriter
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase


@dataclass(slots=True)
class RuntimeStatistics:
    """What carrying plans out has cost. Times in seconds of the engine's thread.

    bytes_read: by demand loads and by complete prefetches. stall_s: waiting for experts. combine_s: gathering
    rows and summing outputs. layers_s: all that the expert layers took; what is left of it is unexplained.
    """

    loads: int = 0
    prefetches: int = 0
    bytes_read: int = 0
    bytes_prefetched: int = 0
    stall_s: float = 0.0
    expert_compute_s: float = 0.0
    decide_s: float = 0.0
    combine_s: float = 0.0
    layers_s: float = 0.0

    def minus(self, earlier: RuntimeStatistics) -> RuntimeStatistics:
        """What happened since ``earlier`` was copied."""
        return RuntimeStatistics(
            *(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self))
        )


class _LayerWork:
    """One layer of one forward pass: which rows each expert has, and where its outputs go."""

    def __init__(
        self, module: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """hidden_states: [tokens, hidden]. index, weights: [tokens, top_k], index ascending in each row."""
        self.module, self.hidden_states = module, hidden_states
        self.tokens, self.top_k = index.shape
        self.rows = _rows_by_expert(index, int(module.num_experts))
        self._scale = weights.to(torch.float32).reshape(-1, 1)
        # Zeros, since a row may have fewer experts than top_k.
        self._outputs = hidden_states.new_zeros(
            (self.tokens * self.top_k, hidden_states.shape[-1]), dtype=torch.float32
        )

    def compute(self, expert: int, weights: ExpertWeights) -> None:
        """The outputs of one expert for all its tokens."""
        positions = self.rows[expert]
        if self.tokens == 1:
            # A single token needs no gathering: all its rows have the same input.
            output = expert_forward(self.module, weights, self.hidden_states)
            self._outputs[positions[0]] = output[0].to(torch.float32) * self._scale[positions[0]]
            return
        place = torch.tensor(positions)
        output = expert_forward(self.module, weights, self.hidden_states[place // self.top_k])
        self._outputs[place] = output.to(torch.float32) * self._scale[place]

    def total(self) -> torch.Tensor:
        """[tokens, hidden]: the weighted outputs of each token's experts, summed in ascending expert order."""
        columns = self._outputs.view(self.tokens, self.top_k, -1)
        total = columns[:, 0].clone()
        for column in range(1, self.top_k):
            total += columns[:, column]
        return total.to(self.hidden_states.dtype)


class ExpertRuntime:
    """An ``ExpertsRuntime`` over a store, a slot pool and a scheduler.

    before_access is called at the start of every access; it may raise to abandon the forward pass.
    recorder notes what the routers chose. routing, where given, chooses in their place. hinter tells the brain
    what later layers are likely to choose. sampler keeps layer inputs for training predictors.
    """

    def __init__(
        self, store: ExpertStore, pool: SlotPool, scheduler: ExpertScheduler, prefetch_slots: int = 0
    ) -> None:
        """prefetch_slots: of the pool's slots, those that prefetches arrive in."""
        self._store = store
        self._pool = pool
        self._scheduler = scheduler
        self._slots: dict[ExpertKey, int] = {}
        self._weights: dict[ExpertKey, ExpertWeights] = {}
        self._transfers = TransferQueue(store, pool.view)
        for _ in range(prefetch_slots):
            self._transfers.add_spare(pool.take())
        self._phase = Phase.PREFILL
        self._pass_started = 0.0
        self._pass_stall = 0.0
        self.before_access: Callable[[], None] | None = None
        self.recorder: TraceWriter | None = None
        self.routing: ForcedRouting | None = None
        self.hinter: Hinter | None = None
        self.sampler: HiddenSampler | None = None
        self.statistics = RuntimeStatistics()

    def snapshot(self) -> RuntimeStatistics:
        """A copy of the statistics so far."""
        return replace(self.statistics)

    def forward_pass(self, phase: Phase, tokens: int) -> None:
        """A forward pass of the model over ``tokens`` tokens starts."""
        self._phase = phase
        self._pass_started, self._pass_stall = time.perf_counter(), self.statistics.stall_s
        if self.recorder is not None:
            self.recorder.begin_pass(phase, tokens)
        if self.sampler is not None:
            self.sampler.begin_pass(tokens)
        if self.routing is not None:
            self.routing.forward_pass(tokens)
        self._scheduler.forward_pass(phase)

    def end_pass(self) -> None:
        """The forward pass is complete; a pass that was abandoned ends without."""
        stall = self.statistics.stall_s - self._pass_stall
        took = time.perf_counter() - self._pass_started
        self._scheduler.pass_end(stall, took)
        self._note(TraceEvent.STALL, round(stall * 1e9), round(took * 1e9))

    def run_layer(
        self,
        module: Any,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        if self.before_access is not None:
            self.before_access()
        spent, started = self.statistics, time.perf_counter()
        if self.routing is not None:
            top_k_index = self.routing.top_k_index(layer, top_k_index)
        self._settle_prefetches()
        single = top_k_index.shape[0] == 1
        named = _named(top_k_index, int(module.num_experts)) if single else ()
        hints = self.hinter.hints(layer, hidden_states, named) if self.hinter is not None and single else ()
        if self.recorder is not None:
            self.recorder.record(layer, top_k_index.numpy(), hints)
        if self.sampler is not None and self.sampler.wants:
            self.sampler.record(layer, hidden_states[self.sampler.wants].to(torch.float32).numpy())
        # Each token's experts ascending: column order is then the order of summation.
        index, order = torch.sort(top_k_index, dim=-1)
        work = _LayerWork(module, hidden_states, index, torch.gather(top_k_weights, -1, order))
        access = LayerAccess(
            layer,
            tuple(work.rows),
            tuple(len(positions) for positions in work.rows.values()),
            self._phase,
            hints,
            named,
        )
        gathered = time.perf_counter()
        plan = self._scheduler.access(access)
        decided = time.perf_counter()
        try:
            self._carry_out(plan, work)
        except BaseException:
            self._reconcile()
            raise
        computed = time.perf_counter()
        total = work.total()
        ended = time.perf_counter()
        spent.combine_s += (gathered - started) + (ended - computed)
        spent.decide_s += decided - gathered
        spent.layers_s += ended - started
        return total

    def _carry_out(self, plan: FetchPlan, work: _LayerWork) -> None:
        """The waves in one flow: what a wave evicts is never needed by this access, so it can go at once, and
        each expert that does not stay makes room for the next."""
        for key in plan.cancel:
            self._transfers.cancel(key)
        for wave in plan.waves:
            for key in wave.evict:
                self._forget(key)
        loads = [key for wave in plan.waves for key in wave.load]
        leaving = {key for wave in plan.waves for key in wave.release}
        absent = deque(sorted((key for key in loads if not self._promote(key)), key=self._place_on_disk))
        self._ask(absent, plan.prefetch)
        # Only the first wave can be without loads: it holds what is resident.
        for key in plan.waves[0].compute if plan.hits else ():
            self._compute(work, key)
        for _ in loads:
            key = self._arrival()
            self._compute(work, key)
            if key in leaving:
                self._forget(key)
            if absent:
                self._ask(absent, plan.prefetch)

    def _compute(self, work: _LayerWork, key: ExpertKey) -> None:
        started = time.perf_counter()
        work.compute(key.expert, self._weights[key])
        self.statistics.expert_compute_s += time.perf_counter() - started

    def _promote(self, key: ExpertKey) -> bool:
        """Whether ``key`` was being prefetched; then it is demanded now, and the queue gets another spare."""
        slot = self._transfers.promote(key)
        if slot is None:
            return False
        self._slots[key] = slot
        self._transfers.add_spare(self._pool.take())
        return True

    def _ask(self, absent: deque[ExpertKey], wishes: tuple[ExpertKey, ...]) -> None:
        """Demand as many of ``absent`` as there are free slots for; when that is all, prefetching may begin."""
        while absent and self._pool.free:
            key = absent.popleft()
            self._slots[key] = self._pool.take()
            self._transfers.demand(key, self._slots[key])
        if not absent:
            self._transfers.prefetch(wishes)

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
        self._weights[load.key] = weights_in_slot(self._store.layout(load.key), load.view)
        return load.key

    def _settle_prefetches(self) -> None:
        """Tell the scheduler what became of prefetches, in order. Raises: what reading one of them has raised."""
        for slot in self._transfers.take_returned():
            self._pool.give_back(slot)
        failure: Exception | None = None
        for step, load in self._transfers.take_events():
            key = load.key
            if step is Step.STARTED:
                self._scheduler.start_load(key)
                self._note(TraceEvent.START_LOAD, *key)
            elif step is Step.FAILED:
                self._scheduler.cancel_load(key)
                self._note(TraceEvent.CANCEL_LOAD, *key)
                failure = load.failure
            else:
                stays, evicted = self._scheduler.finish_load(key)
                self._note(TraceEvent.FINISH_LOAD, *key)
                self.statistics.prefetches += 1
                self.statistics.bytes_read += load.nbytes
                self.statistics.bytes_prefetched += load.nbytes
                for victim in evicted:
                    self._forget(victim)
                if stays:
                    self._slots[key] = load.slot
                    self._weights[key] = weights_in_slot(self._store.layout(key), load.view)
                    self._transfers.add_spare(self._pool.take())
                else:
                    self._transfers.add_spare(load.slot)
        if failure is not None:
            raise failure

    def _place_on_disk(self, key: ExpertKey) -> tuple[str, int]:
        first = self._store.layout(key).extents[0]
        return str(first.file), first.offset

    def _note(self, kind: TraceEvent, a: int = 0, b: int = 0) -> None:
        if self.recorder is not None:
            self.recorder.event(kind, a, b)

    def _forget(self, key: ExpertKey) -> None:
        self._weights.pop(key, None)
        self._pool.give_back(self._slots.pop(key))

    def _reconcile(self) -> None:
        """After a plan was abandoned: make cache and slots agree again on what is really here."""
        self._transfers.abandon_demand()
        for slot in self._transfers.take_returned():
            self._pool.give_back(slot)
        for key in self._scheduler.residents():
            if key not in self._weights:
                self._scheduler.cancel_load(key)
                self._note(TraceEvent.CANCEL_LOAD, *key)
        resident = set(self._scheduler.residents())
        for key in list(self._slots):
            if key not in self._weights:
                del self._slots[key]
            elif key not in resident:
                self._forget(key)

    def close(self) -> None:
        """End the reader threads and the store, free the slots' views, detach from the model."""
        if self.hinter is not None:
            self.hinter.close()
        self._transfers.close()
        self._weights.clear()


def _named(top_k_index: torch.Tensor, num_experts: int) -> tuple[int, ...]:
    """The experts of a single token as its router named them."""
    return tuple(expert for expert in top_k_index[0].tolist() if expert < num_experts)


def _rows_by_expert(index: torch.Tensor, num_experts: int) -> dict[int, list[int]]:
    """Flat positions [token * top_k + column] of each chosen expert, experts and positions ascending."""
    rows: dict[int, list[int]] = {}
    for position, expert in enumerate(index.reshape(-1).tolist()):
        if expert < num_experts:
            rows.setdefault(expert, []).append(position)
    return dict(sorted(rows.items()))
