"""``ExpertRuntime``: carries out the scheduler's plans for a hooked model.

Exactness: every expert's output goes to rows of its own in a float32 buffer, and the rows of a token are
summed in ascending expert order. So what was resident, and the order in which experts arrived, never changes
a bit of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moei_core.engine.expert_compute import ExpertWeights, expert_forward, weights_in_slot
from moei_core.engine.forced_routing import ForcedRouting
from moei_core.engine.hints import Hinter
from moei_core.engine.slots import SlotPool
from moei_core.scheduler import ExpertScheduler
from moei_core.store.base import ExpertStore
from moei_core.trace.hidden import HiddenSampler
from moei_core.trace.writer import TraceWriter
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase

READERS = 4
"""Experts read at the same time; a disk reaches its bandwidth at a few megabytes in flight."""


@dataclass(slots=True)
class RuntimeStatistics:
    """What carrying plans out has cost. Times in seconds."""

    loads: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    expert_compute_s: float = 0.0

    def minus(self, earlier: RuntimeStatistics) -> RuntimeStatistics:
        """What happened since ``earlier`` was copied."""
        return RuntimeStatistics(
            self.loads - earlier.loads,
            self.bytes_read - earlier.bytes_read,
            self.stall_s - earlier.stall_s,
            self.expert_compute_s - earlier.expert_compute_s,
        )


class ExpertRuntime:
    """An ``ExpertsRuntime`` over a store, a slot pool and a scheduler.

    before_access is called at the start of every access; it may raise to abandon the forward pass.
    recorder notes what the routers chose. routing, where given, chooses in their place. hinter tells the brain
    what later layers are likely to choose. sampler keeps layer inputs for training predictors.
    """

    def __init__(self, store: ExpertStore, pool: SlotPool, scheduler: ExpertScheduler) -> None:
        self._store = store
        self._pool = pool
        self._scheduler = scheduler
        self._weights: dict[ExpertKey, ExpertWeights] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="moei-reader")
        self._phase = Phase.PREFILL
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
        if self.recorder is not None:
            self.recorder.begin_pass(phase, tokens)
        if self.sampler is not None:
            self.sampler.begin_pass(tokens)
        if self.routing is not None:
            self.routing.forward_pass(tokens)
        self._scheduler.forward_pass(phase)

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
        if self.routing is not None:
            top_k_index = self.routing.top_k_index(layer, top_k_index)
        tokens, top_k = top_k_index.shape
        named = _named(top_k_index, int(module.num_experts)) if tokens == 1 else ()
        hints = (
            self.hinter.hints(layer, hidden_states, named) if self.hinter is not None and tokens == 1 else ()
        )
        if self.recorder is not None:
            self.recorder.record(layer, top_k_index.numpy(), hints)
        if self.sampler is not None and self.sampler.wants:
            self.sampler.record(layer, hidden_states[self.sampler.wants].to(torch.float32).numpy())
        # Each token's experts ascending: column order is then the order of summation.
        index, order = torch.sort(top_k_index, dim=-1)
        scale = torch.gather(top_k_weights, -1, order).to(torch.float32)
        rows = _rows_by_expert(index, int(module.num_experts))
        access = LayerAccess(
            layer,
            tuple(rows),
            tuple(len(positions) for positions in rows.values()),
            self._phase,
            hints,
            named,
        )
        plan = self._scheduler.access(access)
        # Zeros, since a row may have fewer experts than top_k.
        outputs = hidden_states.new_zeros((tokens * top_k, hidden_states.shape[-1]), dtype=torch.float32)
        flat_scale = scale.reshape(-1, 1)
        try:
            self._carry_out(plan, module, rows, hidden_states, top_k, flat_scale, outputs)
        except BaseException:
            self._reconcile()
            raise
        columns = outputs.view(tokens, top_k, -1)
        total = columns[:, 0].clone()
        for column in range(1, top_k):
            total += columns[:, column]
        return total.to(hidden_states.dtype)

    def _carry_out(
        self,
        plan: FetchPlan,
        module: nn.Module,
        rows: dict[int, list[int]],
        hidden_states: torch.Tensor,
        top_k: int,
        scale: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        for wave in plan.waves:
            for key in wave.evict:
                self._forget(key)
            self._load(wave.load)
            started = time.perf_counter()
            for key in wave.compute:
                positions = rows[key.expert]
                # A single token needs no gathering: all its rows have the same input.
                if hidden_states.shape[0] == 1:
                    output = expert_forward(module, self._weights[key], hidden_states)
                    outputs[positions[0]] = output[0].to(torch.float32) * scale[positions[0]]
                    continue
                place = torch.tensor(positions)
                output = expert_forward(module, self._weights[key], hidden_states[place // top_k])
                outputs[place] = output.to(torch.float32) * scale[place]
            self.statistics.expert_compute_s += time.perf_counter() - started
            for key in wave.release:
                self._forget(key)

    def _load(self, keys: tuple[ExpertKey, ...]) -> None:
        """Bring ``keys`` into slots, all of them before returning. Raises what the store raises."""
        if not keys:
            return
        started = time.perf_counter()
        for key in keys:
            self._pool.take(key)
        reads: list[Future[int]] = [
            self._readers.submit(self._store.read_into, key, self._pool.view(key)) for key in keys
        ]
        failure: BaseException | None = None
        for read in reads:
            # All must have ended before a slot can be used again, whatever the first of them said.
            try:
                self.statistics.bytes_read += read.result()
            except BaseException as error:
                failure = failure or error
        self.statistics.stall_s += time.perf_counter() - started
        if failure is not None:
            # An interrupt may have cut a wait short: its read must still end.
            for read in reads:
                read.exception()
            raise failure
        self.statistics.loads += len(keys)
        for key in keys:
            self._weights[key] = weights_in_slot(self._store.layout(key), self._pool.view(key))

    def _forget(self, key: ExpertKey) -> None:
        self._weights.pop(key, None)
        self._pool.give_back(key)

    def _reconcile(self) -> None:
        """After a plan was abandoned: make cache and slots agree again on what is really here."""
        for key in self._scheduler.residents():
            if key not in self._weights:
                self._scheduler.cancel_load(key)
        resident = set(self._scheduler.residents())
        for key in self._pool.experts():
            if key not in resident:
                self._forget(key)

    def close(self) -> None:
        """Wait for reads under way, end the reader threads and free the slots' views."""
        if self.hinter is not None:
            self.hinter.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._weights.clear()
        self._store.close()


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
