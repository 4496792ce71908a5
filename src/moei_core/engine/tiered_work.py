"""``TieredWork``: one layer whose experts are computed in two places, and summed in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from moei_core.engine.device_compute import DeviceExpert, FewTokenExperts
from moei_core.engine.device_waits import DeviceWaits
from moei_core.engine.devices import Device, Event
from moei_core.engine.expert_compute import HeldExpert, expert_forward
from moei_core.engine.layer_work import Choice, LayerWork, sum_rows
from moei_core.engine.native_compute import NativeExperts
from moei_core.engine.token_experts import TokenExperts


class TieredWork(LayerWork):
    """A ``LayerWork`` of the host, with the same rows on a device.

    Every expert has rows of its own in the device's buffer, wherever it was computed, and rows are summed there in
    ascending expert order.
    """

    def __init__(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        choice: Choice,
        kernel: Callable[[HeldExpert], NativeExperts | None],
        device: Device,
        on_device: torch.Tensor,
        few: Callable[[DeviceExpert], FewTokenExperts | None],
        waits: DeviceWaits,
        recorded: TokenExperts | None = None,
    ) -> None:
        """hidden_states: on the host. on_device: the same on the device. few: what computes an expert with few tokens
        there, if anything does. waits: sees the waiting for the device. recorded: what computes all experts of a token
        there at once, if that was recorded."""
        super().__init__(module, hidden_states, choice, kernel)
        self._device, self._inputs, self._few, self._waits = device, on_device, few, waits
        self._exact_inputs: torch.Tensor | None = None
        self._host_experts: list[int] = []
        self._recorded, self._complete = recorded, False
        self._brought: tuple[dict[int, slice], torch.Tensor, torch.Tensor] | None = None

    @cached_property
    def _sums(self) -> torch.Tensor:
        """The rows, float32 [tokens * top_k, hidden]."""
        # On the model's own stream, like all that it is summed from. A token may have fewer experts than top_k.
        inputs, count = self._inputs, self.tokens * self.top_k
        make = inputs.new_empty if sum(map(len, self.rows.values())) == count else inputs.new_zeros
        return make((count, inputs.shape[-1]), dtype=torch.float32)

    def compute(self, experts: Sequence[HeldExpert]) -> None:
        """On the host."""
        super().compute(experts)
        self._host_experts += [expert.key.expert for expert in experts]

    def compute_on_device(self, experts: Sequence[DeviceExpert], memory: torch.Tensor) -> None:
        """Queue the outputs of experts, each for all its tokens. memory: all device slots."""
        batches: dict[int, tuple[FewTokenExperts, list[DeviceExpert]]] = {}
        waited: Event | None = None
        for expert in experts:
            if expert.ready is not None and expert.ready is not waited:
                waited = expert.ready
                if waited.done():
                    expert.ready = None
                else:
                    self._device.compute_after(waited)
            few = self._few(expert)
            if few is not None and few.takes(len(self.rows[expert.key.expert])):
                batches.setdefault(id(few), (few, []))[1].append(expert)
            else:
                rows, places, scale = self._bring_rows()
                here = rows[expert.key.expert]
                self._device.compute(partial(self._with_many_tokens, expert, places[here], scale[here]))
        weights = self._scale.numpy().reshape(-1)
        for few, batch in batches.values():
            if self._recorded is not None and self._recorded.takes(few, batch):
                self._recorded.place(batch, self.rows, weights)
                self._device.compute(self._recorded.queue)
                self._complete = True
                return
            pairs = self._device.bring(few.pairs(batch, self.rows, weights, self.top_k))
            self._device.compute(partial(self._with_few_tokens, few, memory, pairs))

    def _bring_rows(self) -> tuple[dict[int, slice], torch.Tensor, torch.Tensor]:
        """(where each expert's rows are in the others, all rows, their weights), on the device."""
        if self._brought is None:
            end, slices = 0, {}
            for expert, rows in self.rows.items():
                slices[expert] = slice(end, end + len(rows))
                end += len(rows)
            places = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *self.rows.values()]))
            self._brought = slices, *_bring_together(self._device, places, self._scale[places])
        return self._brought

    def _with_many_tokens(self, expert: DeviceExpert, place: torch.Tensor, scale: torch.Tensor) -> None:
        output = expert_forward(self.module, expert.weights, self._inputs[place // self.top_k])
        self._sums[place] = output.to(torch.float32) * scale

    def _with_few_tokens(self, few: FewTokenExperts, memory: torch.Tensor, pairs: torch.Tensor) -> None:
        if self._exact_inputs is None:
            self._exact_inputs = self._inputs.to(torch.float32).contiguous()
        few(memory, pairs, self._exact_inputs, self._sums)

    def total(self) -> torch.Tensor:
        """[tokens, hidden] on the device, complete for what torch computes next."""
        device = self._device
        if self._complete and self._recorded is not None:
            self._waits.during(device.finish)
            return self._recorded.output
        place = torch.tensor(
            [at for expert in self._host_experts for at in self.rows[expert]], dtype=torch.int64
        )
        there, rows = _bring_together(device, place, self._outputs[place]) if len(place) else (None, None)
        totals: list[torch.Tensor] = []

        def work() -> None:
            if there is not None and rows is not None:
                self._sums[there] = rows
            totals.append(self._summed())

        device.compute(work)
        self._waits.during(device.finish)
        return totals[0]

    def _summed(self) -> torch.Tensor:
        kernels = self._device.kernels
        if kernels is not None:
            total: torch.Tensor = kernels.sum_rows(self._sums, self.top_k, torch.empty_like(self._inputs))
            return total
        return sum_rows(self._sums, self.top_k).to(self._inputs.dtype)


def _bring_together(
    device: Device, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two host tensors on the device, by one copy: each costs as much as a few launches. first: of the wider type."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)]
    there = device.bring(torch.cat(parts))
    begin = len(parts[0])
    return there[:begin].view(first.dtype).view(first.shape), there[begin:].view(second.dtype).view(
        second.shape
    )
