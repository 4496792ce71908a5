"""``TieredRuntime``: an ``ExpertRuntime`` with a device's memory in front of its RAM slots.

The dense part of the model runs on the device. A layer costs one wait: for what its router chose, read back together
with the hidden states. Then, all at once: what the device holds is computed there; what goes there is copied as soon
as it is in RAM, and computed behind its copy; the rest is computed in RAM, while promotions use the link.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moei_core.config import FULL_OVERLAP, Overlap
from moei_core.engine.device_compute import DeviceExpert, FewTokenExperts, few_token_experts
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.devices import Device
from moei_core.engine.layer_work import LayerWork, TokenWork
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.tiered_work import TieredWork
from moei_core.store.base import ExpertStore
from moei_core.tiers import TieredScheduler
from moei_core.trace.format import TraceEvent
from moei_core.types import DevicePlan, ExpertKey, FetchPlan


class TieredRuntime(ExpertRuntime):
    """Carries out the plans of a ``TieredScheduler``: those for RAM as ever, those for the device beside them."""

    _short_tokens = False

    def __init__(
        self,
        store: ExpertStore,
        pool: LinkedSlotPool,
        scheduler: TieredScheduler,
        device: Device,
        slots: DeviceSlots,
        prefetch_slots: int = 0,
        threads: int = 1,
        overlap: Overlap = FULL_OVERLAP,
    ) -> None:
        super().__init__(store, pool, scheduler, prefetch_slots, threads, overlap)
        self.device = device
        self._linked_pool, self._tiers, self._device_slots = pool, scheduler, slots
        self._on_device: dict[ExpertKey, DeviceExpert] = {}
        self._device_plan = DevicePlan(())
        self._few: dict[tuple[int, int], FewTokenExperts | None] = {}
        self._inputs: torch.Tensor | None = None

    def run_layer(
        self,
        module: Any,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        started = time.perf_counter()
        host = self.device.read_back(hidden_states, top_k_index, top_k_weights)
        self.statistics.device_wait_s += time.perf_counter() - started
        self._inputs = hidden_states
        return super().run_layer(module, layer, *host)

    def _work(
        self, module: Any, hidden_states: torch.Tensor, index: torch.Tensor, scale: torch.Tensor
    ) -> LayerWork:
        assert self._inputs is not None
        return TieredWork(
            module,
            hidden_states,
            index,
            scale,
            lambda expert: self._kernel(module, expert),
            self.device,
            self._inputs,
            lambda expert: self._few_tokens(module, expert),
        )

    def _few_tokens(self, module: Any, expert: DeviceExpert) -> FewTokenExperts | None:
        name = expert.key.layer, expert.kind
        if name not in self._few:
            self._few[name] = few_token_experts(module, expert.layout, self.device.kernels)
        return self._few[name]

    def _carry_out(self, plan: FetchPlan, work: LayerWork | TokenWork) -> None:
        assert plan.device is not None and isinstance(work, TieredWork)
        self._device_plan = plan.device
        for key in plan.device.evict:
            self._device_slots.give_back(self._on_device.pop(key).slot)
        started = time.perf_counter()
        self._compute_there(work, [self._on_device[key] for key in plan.device.hits])
        self.statistics.expert_compute_s += time.perf_counter() - started
        super()._carry_out(plan, work)

    def _compute(self, work: LayerWork | TokenWork, keys: Iterable[ExpertKey]) -> None:
        """Experts that are complete in RAM: each goes to the device or is computed here."""
        assert isinstance(work, TieredWork)
        plan, here = self._device_plan, []
        for key in keys:
            if key in plan.copy:
                stays = key not in plan.release
                expert = self._copy(key, stays)
                if stays:
                    self._on_device[key] = expert
                self._compute_there(work, [expert])
                continue
            if key in plan.promote:
                self._on_device[key] = self._copy(key, stays=True)
                self.statistics.promotions += 1
            here.append(key)
        if here:
            super()._compute(work, here)

    def _compute_there(self, work: TieredWork, experts: Sequence[DeviceExpert]) -> None:
        if experts:
            work.compute_on_device(experts, self._device_slots.memory)
            used = self.device.mark()
            for expert in experts:
                self._device_slots.last_use[expert.slot] = used

    def _copy(self, key: ExpertKey, stays: bool) -> DeviceExpert:
        """Queue the copy of an expert that is in RAM. Its host slot stays as it is until the copy is done."""
        held, slots = self._held[key], self._device_slots
        slot, nbytes = slots.take(stays), held.layout.slot_nbytes
        memory = slots.bytes_of(slot, nbytes)
        ready = self.device.copy_in(held.view[:nbytes], memory, slots.last_use.get(slot))
        self._linked_pool.read_until(self._slots[key], ready)
        self.statistics.copies += 1
        self.statistics.bytes_copied += nbytes
        return DeviceExpert(held, slots, slot, ready, self.device.kernels)

    def _reconcile(self) -> None:
        for key in self._tiers.device.cache.residents():
            if key not in self._on_device:
                # Planned, and never copied.
                self._scheduler.cancel_load(key)
                self._note(TraceEvent.CANCEL_LOAD, *key)
        super()._reconcile()

    def close(self) -> None:
        super().close()
        self._on_device.clear()
        self._linked_pool.close()
        self.device.close()
