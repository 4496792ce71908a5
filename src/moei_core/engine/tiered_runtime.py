"""``TieredRuntime``: an ``ExpertRuntime`` with a device's memory in front of its RAM slots.

The dense part of the model runs on the device. A layer costs one wait: for what its router chose, read back together
with the hidden states. Then, all at once: what the device holds is computed there; what goes there is copied as soon
as it is in RAM, and computed behind its copy; the rest is computed in RAM, while promotions use the link. What is
predicted for later layers is copied behind all that, and computed on the device if it was rightly predicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch

from moei_core.adapters.dense_clock import DENSE_CLOCK
from moei_core.config import FULL_OVERLAP, Overlap
from moei_core.engine.copies_ahead import CopiesAhead
from moei_core.engine.device_compute import DeviceExpert, FewTokenExperts, are_aligned, few_token_experts
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.device_waits import DeviceWaits
from moei_core.engine.devices import Device, Event
from moei_core.engine.expert_compute import HeldExpert, stored_alike
from moei_core.engine.layer_work import Choice, LayerWork, TokenWork
from moei_core.engine.recorded_operations import RecordedLayer, Recording
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.statistics import LayerClock
from moei_core.engine.tiered_work import TieredWork
from moei_core.engine.token_experts import TokenExperts
from moei_core.hardware.pressure import MemoryGovernor
from moei_core.store.base import ExpertLayout, ExpertStore
from moei_core.tiers import TieredScheduler
from moei_core.trace.format import TraceEvent
from moei_core.types import DevicePlan, ExpertKey, FetchPlan, ModelSpec, Phase

_MANY = 32
"""Tokens that no kernel for few takes."""


class TieredRuntime(ExpertRuntime):
    """Carries out the plans of a ``TieredScheduler``: those for RAM as ever, those for the device beside them.

    device_governor, where given, is asked before every access how many slots the device's memory allows.
    """

    _short_tokens = False
    # A router that is applied early on the device must not wait there for the experts.
    _hints_first = True

    def __init__(
        self,
        store: ExpertStore,
        pool: LinkedSlotPool,
        scheduler: TieredScheduler,
        device: Device,
        slots: DeviceSlots,
        threads: int = 1,
        overlap: Overlap = FULL_OVERLAP,
        at_once: int = 1,
    ) -> None:
        """at_once: copies for later layers that may be on their way together."""
        super().__init__(store, pool, scheduler, threads, overlap)
        self.device = device
        self._linked_pool, self._tiers, self._device_slots = pool, scheduler, slots
        self._on_device: dict[ExpertKey, DeviceExpert] = {}
        self._device_plan = DevicePlan(())
        # What the device has been sent of the layer at hand before RAM's turn came.
        self._sent: set[ExpertKey] = set()
        self._few: dict[tuple[int, int, bool], FewTokenExperts | None] = {}
        self._inputs: torch.Tensor | None = None
        self._at: RecordedLayer | None = None
        self._last_copy: Event | None = None
        self._waits = DeviceWaits(self.statistics)
        self._queued: Event | None = None
        pool.statistics = self.statistics
        self._ahead = CopiesAhead(self._copy_ahead, self._held, at_once)
        self.device_governor: MemoryGovernor | None = None

    def forward_pass(self, phase: Phase, tokens: int) -> None:
        self.device.make_current()
        super().forward_pass(phase, tokens)

    def warm_up(self, modules: Mapping[int, Any], spec: ModelSpec, dtype: torch.dtype) -> None:
        """Compute an expert of each kind, with one token and with many. modules: by layer.

        Compiling kernels and starting libraries takes seconds: here, not in the middle of the first answer.
        """
        kernels = self.device.kernels
        warm: set[tuple[object, ...]] = set()
        for key in self._store.experts():
            module, layout = modules[key.layer], self._store.layout(key)
            alike = type(module), stored_alike(layout), kernels is None or are_aligned(layout, kernels)
            if alike not in warm:
                warm.add(alike)
                self._try(module, key, layout, -len(warm), spec, dtype)

    def _try(
        self,
        module: Any,
        key: ExpertKey,
        layout: ExpertLayout,
        kind: int,
        spec: ModelSpec,
        dtype: torch.dtype,
    ) -> None:
        pool, slots = self._linked_pool, self._device_slots
        host, there = pool.take(), slots.take(stays=False)
        held = HeldExpert(key, layout, pool.view(host), pool.address(host), kind)
        expert = DeviceExpert(held, slots, there, self.device.kernels)
        ready = expert.ready = self.device.copy_in(held.view[: layout.slot_nbytes], expert.memory, None)
        with torch.inference_mode():
            for tokens in (1, _MANY):
                inputs = torch.zeros((tokens, spec.hidden_size), dtype=dtype)
                self._inputs = self.device.bring(inputs)
                # As wide as a router's choice, of which only this expert exists: sums are compiled for a width.
                index = torch.full((tokens, spec.num_experts_per_tok), int(module.num_experts))
                index[:, 0] = key.expert
                choice = Choice.of(index, torch.ones(index.shape), (), int(module.num_experts))
                work = self._work(module, inputs, choice)
                assert isinstance(work, TieredWork)
                self._compute_there(work, [expert])
                self.device.read_back(work.total())
        ready.wait()
        pool.give_back(host)

    def run_layer(
        self,
        module: Any,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        clock = LayerClock(self.statistics)
        self._ahead.advance()
        states, index, weights = self._read_back(hidden_states, top_k_index, top_k_weights)
        self._before_experts(clock)
        self._inputs = hidden_states
        return super().run_layer(module, layer, states, index, weights, meanwhile)

    def _before_experts(self, clock: LayerClock) -> None:
        self._ahead.advance()
        if self.device_governor is not None and (slots := self.device_governor.poll()) is not None:
            self.resize_device(slots)
        clock.add_to("move_s")

    def record_experts(self, layer: RecordedLayer, recording: Recording) -> None:
        few = self._few_of_layer(layer.module, layer.layer)
        if few is not None and few.takes(1):
            layer.experts = TokenExperts(few, layer, self._device_slots.memory, recording)

    def _few_of_layer(self, module: Any, layer: int) -> FewTokenExperts | None:
        """What computes most experts of ``layer`` with few tokens: the first one says how they are stored."""
        key = next((key for key in self._store.experts() if key.layer == layer), None)
        if key is None or self.device.kernels is None:
            return None
        layout = self._store.layout(key)
        aligned = are_aligned(layout, self.device.kernels)
        return self._few_stored(module, (layer, self._kind(key, layout), aligned), layout)

    def run_recorded(self, layer: RecordedLayer) -> None:
        clock = LayerClock(self.statistics)
        self._ahead.advance()
        # What the piece brings to the host is there with it.
        self._read_back()
        self._before_experts(clock)
        self._inputs, self._at = layer.hidden_states, layer
        try:
            total = super().run_layer(layer.module, layer.layer, *layer.host)
        finally:
            self._at = None
        if total is not layer.output:
            layer.output.copy_(total)

    def abandon_pass(self) -> None:
        if self.device.place.type != "cpu":
            # What torch did for the dense part was launching it.
            DENSE_CLOCK.seconds = self._pass_dense
        super().abandon_pass()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._read_back(tensor)[0]

    def _read_back(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        host = self._waits.during(
            lambda before_waiting: self.device.read_back(*tensors, before_waiting=before_waiting)
        )
        self._queued = None
        return host

    def _work(self, module: Any, hidden_states: torch.Tensor, choice: Choice) -> LayerWork:
        assert self._inputs is not None
        return TieredWork(
            module,
            hidden_states,
            choice,
            lambda expert: self._kernel(module, expert),
            self.device,
            self._inputs,
            lambda expert: self._few_tokens(module, expert),
            self._waits,
            None if self._at is None else self._at.experts,
        )

    def _few_tokens(self, module: Any, expert: DeviceExpert) -> FewTokenExperts | None:
        return self._few_stored(module, (expert.key.layer, expert.kind, expert.aligned), expert.layout)

    def _few_stored(
        self, module: Any, name: tuple[int, int, bool], layout: ExpertLayout
    ) -> FewTokenExperts | None:
        """name: layer and kind; and, since where experts lie is no part of a kind, whether they are aligned."""
        if name not in self._few:
            self._few[name] = few_token_experts(module, layout, self.device.kernels)
        return self._few[name]

    def _carry_out(self, plan: FetchPlan, work: LayerWork | TokenWork) -> None:
        assert plan.device is not None and isinstance(work, TieredWork)
        there = self._device_plan = plan.device
        self._sent.clear()
        for key in there.cancel:
            if (unwanted := self._ahead.cancel(key)) is not None:
                self._device_slots.give_back(unwanted.slot)
        for key in there.evict:
            self._device_slots.give_back(self._on_device.pop(key).slot)
        experts = [self._on_device[key] for key in there.hits]
        for key in there.foreseen:
            expert, in_time = self._ahead.take(key)
            self.statistics.copies_late += not in_time
            experts.append(expert)
            self._on_device[key] = expert
        if all(key in self._held for key in there.copy) and self._ring_takes(there.copy):
            # Launching costs more than computing behind the copies instead of beside them: one launch for all.
            experts += self._copy_for_now(there.copy)
            self._sent.update(there.copy)
        self._compute_there(work, experts)
        for key in there.foreseen:
            if key in there.release:
                # Not before: it is filled again behind what is known to be computed from it.
                self._device_slots.give_back(self._on_device.pop(key).slot)
        super()._carry_out(plan, work)
        self._ahead.advance()

    def _follow(self, foreseen: tuple[ExpertKey, ...]) -> None:
        self._ahead.wish(self._tiers.to_device)
        super()._follow(foreseen)

    def _compute(self, work: LayerWork | TokenWork, keys: Iterable[ExpertKey]) -> None:
        """Experts that are complete in RAM: each goes to the device or is computed here."""
        assert isinstance(work, TieredWork)
        plan, here = self._device_plan, []
        wanted: list[ExpertKey] = []
        promoted: list[ExpertKey] = []
        for key in keys:
            if key in self._sent:
                continue
            if key in plan.copy:
                if not self._ring_takes([*wanted, key]):
                    self._compute_there(work, self._copy_for_now(wanted))
                    wanted = []
                wanted.append(key)
                continue
            if key in plan.promote:
                promoted.append(key)
            here.append(key)
        self._compute_there(work, self._copy_for_now(wanted))
        for expert in self._copy(promoted):
            self._on_device[expert.key] = expert
        self.statistics.promotions += len(promoted)
        if here:
            self._ahead.advance()
            super()._compute(work, here)

    def _ring_takes(self, keys: Sequence[ExpertKey]) -> bool:
        """Whether all ``keys`` can be copied before one is computed: what does not stay is in the ring till then."""
        return sum(key in self._device_plan.release for key in keys) <= self._device_slots.ring

    def _copy_for_now(self, keys: Sequence[ExpertKey]) -> list[DeviceExpert]:
        """Queue the copies of experts that the layer at hand wants."""
        experts = self._copy(keys, self._device_plan.release)
        self._on_device.update((one.key, one) for one in experts if one.key not in self._device_plan.release)
        return experts

    def _compute_there(self, work: TieredWork, experts: Sequence[DeviceExpert]) -> None:
        if experts:
            started = time.perf_counter()
            work.compute_on_device(experts, self._device_slots.memory)
            for ready in {id(one.ready): one.ready for one in experts if one.ready is not None}.values():
                self._waits.needs(self._queued, ready)
            used = self._queued = self.device.mark()
            for expert in experts:
                self._device_slots.last_use[expert.slot] = used
            self.statistics.expert_compute_s += time.perf_counter() - started

    def _copy(self, keys: Sequence[ExpertKey], passing: Container[ExpertKey] = ()) -> list[DeviceExpert]:
        """Queue the copies of experts that are in RAM. Their host slots stay as they are until the copies are done.

        passing: those that do not stay on the device.
        """
        if not keys:
            return []
        slots, experts, copies = self._device_slots, [], []
        started = time.perf_counter()
        for key in keys:
            held, slot = self._held[key], slots.take(key not in passing)
            expert, nbytes = DeviceExpert(held, slots, slot, self.device.kernels), held.layout.slot_nbytes
            copies.append((held.view[:nbytes], expert.memory, slots.last_use.get(slot)))
            experts.append(expert)
            self.statistics.bytes_copied += nbytes
        ready = self._last_copy = self.device.copy_together(copies)
        for key, expert in zip(keys, experts, strict=True):
            expert.ready = ready
            self._linked_pool.read_until(self._slots[key], ready)
        self.statistics.link_s += time.perf_counter() - started
        self.statistics.copies += len(keys)
        return experts

    def _copy_ahead(self, key: ExpertKey) -> DeviceExpert:
        self.statistics.copies_ahead += 1
        return self._copy([key])[0]

    def resize_device(self, slots: int) -> bool:
        """Hold at most ``slots`` experts on the device from now on. Returns whether that is fewer than before.

        Between accesses only. What is no longer needed goes back to the system, block by block.
        """
        place, before = self._device_slots, self._device_slots.usable
        wanted = place.within(slots)
        if wanted > before:
            place.grow(wanted)
            if place.usable < wanted and self.device_governor is not None:
                self.device_governor.got(place.usable)
            wanted = place.usable
        if wanted == before:
            return False
        self._note(TraceEvent.RESIZE_DEVICE, wanted)
        self._leave_device(self._tiers.resize_device(wanted))
        if wanted > before:
            return False
        if self._last_copy is not None:
            self._last_copy.wait()
        self.device.mark().wait()
        experts = [*self._on_device.values(), *self._ahead.experts()]
        moved = place.vacate(wanted, [expert.slot for expert in experts])
        for expert in experts:
            if expert.slot in moved:
                expert.move(place, moved[expert.slot])
        place.shrink(wanted)
        return True

    def _leave_device(self, keys: Iterable[ExpertKey]) -> None:
        """Give back their slots. A method, so that no variable refers to their memory when it goes back."""
        for key in keys:
            gone = self._on_device.pop(key, None) or self._ahead.cancel(key)
            if gone is not None:
                self._device_slots.give_back(gone.slot)

    def make_room(self) -> bool:
        governor, place = self.device_governor, self._device_slots
        while governor is not None and (slots := governor.give_way("a GPU allocation failed")) is not None:
            # Its step may be less than a block.
            if place.within(slots) < place.usable:
                return self.resize_device(slots)
        return False

    def _forget(self, key: ExpertKey) -> None:
        self._ahead.leaving(key)
        super()._forget(key)

    def _reconcile(self) -> None:
        there = self._tiers.device
        # Planned to go, and still there: the plan was given up before.
        gone = [self._on_device.pop(key) for key in [*self._on_device] if key not in there.cache]
        for expert in (*gone, *self._ahead.keep_only(there.ahead)):
            self._device_slots.give_back(expert.slot)
        for key in there.cache.residents():
            if key not in self._on_device:
                # Planned, and never copied.
                self._scheduler.cancel_load(key)
                self._note(TraceEvent.CANCEL_LOAD, *key)
        for key in [key for key in there.ahead if not self._ahead.known(key)]:
            self._ahead.cancel(key)
            self._scheduler.cancel_load(key)
            self._note(TraceEvent.CANCEL_LOAD, *key)
        super()._reconcile()

    def close(self) -> None:
        super().close()
        self._on_device.clear()
        self._ahead.clear()
        self._inputs = None
        self._linked_pool.close()
        self.device.close()
