"""Layers of single tokens that are computed at once, because every expert of the model is resident.

Nothing is to be decided then, so the brain is told after the forward pass: its data and the Python around it are
brought into the processor's caches once a token, not once a layer.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moei_core.engine.expert_compute import HeldExpert
from moei_core.engine.forced_routing import ForcedRouting
from moei_core.engine.hints import Hinter
from moei_core.engine.native_compute import NativeExperts
from moei_core.engine.statistics import RuntimeStatistics
from moei_core.engine.transfers import TransferQueue
from moei_core.quant.native_layer import ExpertTable
from moei_core.scheduler import ExpertScheduler
from moei_core.trace.hidden import HiddenSampler
from moei_core.trace.writer import TraceWriter
from moei_core.types import ExpertKey, LayerAccess, Phase


class ResidentLayers:
    """The part of an ``ExpertRuntime`` that lets layers be computed without asking for their experts."""

    _short_tokens = True
    """Whether one token alone takes the short ways: this one, or ``TokenWork``."""
    _scheduler: ExpertScheduler
    _transfers: TransferQueue
    _held: dict[ExpertKey, HeldExpert]
    _total_experts: int
    _tables: dict[int, ExpertTable | None]
    _computed: list[tuple[int, list[int]]]
    _phase: Phase
    statistics: RuntimeStatistics
    recorder: TraceWriter | None
    routing: ForcedRouting | None
    hinter: Hinter | None
    sampler: HiddenSampler | None

    def resident_experts(self, module: Any, layer: int) -> ExpertTable | None:
        """All experts of ``layer``, if every expert of the model is resident and nobody must see what they are given.

        What may change the budget, or end the forward pass, does so here.
        """
        if not self._all_here() or not self._short_tokens:
            return None
        if self.routing is not None or self.sampler is not None:
            return None
        if self.hinter is not None and self._wants_hints:
            return None
        self._before_access()
        if not self._all_here():
            return None
        if layer not in self._tables:
            self._tables[layer] = self._table(module, layer)
        return self._tables[layer]

    def computed(self, layer: int, experts: list[int], nanoseconds: int) -> None:
        """A token has been through ``experts`` of ``layer``, in the router's order; the brain hears of it later."""
        self.statistics.expert_compute_s += nanoseconds / 1e9
        self._computed.append((layer, experts))

    def settle(self) -> None:
        """Tell the brain of the layers that were computed without asking it, in order.

        Nothing can come of it but what it learns: with everything resident there is nothing to load or evict.
        """
        if not self._computed:
            return
        started = time.perf_counter()
        self._settle_prefetches()
        for layer, chosen in self._computed:
            if self.recorder is not None:
                self.recorder.record(layer, np.array([chosen]))
            ones = (1,) * len(chosen)
            access = LayerAccess(layer, tuple(sorted(chosen)), ones, self._phase, (), tuple(chosen))
            plan = self._scheduler.access(access)
            assert not plan.misses
            for key in plan.cancel:
                self.statistics.bytes_read += self._transfers.cancel(key)
        self._computed.clear()
        self.statistics.decide_s += time.perf_counter() - started

    def _all_here(self) -> bool:
        return len(self._held) == self._total_experts

    def _table(self, module: Any, layer: int) -> ExpertTable | None:
        """None if no single kernel computes all experts of the layer."""
        keys = [ExpertKey(layer, expert) for expert in range(int(module.num_experts))]
        if getattr(module, "has_post_expert_norm", False) or not all(key in self._held for key in keys):
            return None
        experts = [self._held[key] for key in keys]
        kernel = self._kernel(module, experts[0])
        if kernel is None or any(expert.kind != experts[0].kind for expert in experts):
            return None
        return ExpertTable(kernel.ffn, [kernel.parts(expert) for expert in experts])

    @property
    def _wants_hints(self) -> bool:
        raise NotImplementedError

    def _before_access(self) -> None:
        raise NotImplementedError

    def _settle_prefetches(self) -> None:
        raise NotImplementedError

    def _kernel(self, module: Any, expert: HeldExpert) -> NativeExperts | None:
        raise NotImplementedError
