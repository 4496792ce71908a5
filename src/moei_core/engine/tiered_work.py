"""``TieredWork``: one layer whose experts are computed in two places, and summed in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from moei_core.engine.device_compute import DeviceExpert, FewTokenExperts
from moei_core.engine.device_waits import DeviceWaits
from moei_core.engine.devices import Device
from moei_core.engine.expert_compute import HeldExpert, expert_forward
from moei_core.engine.layer_work import LayerWork
from moei_core.engine.native_compute import NativeExperts


class TieredWork(LayerWork):
    """A ``LayerWork`` of the host, with the same rows on a device.

    Every expert has rows of its own in the device's buffer, wherever it was computed, and rows are summed there in
    ascending expert order.
    """

    def __init__(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        kernel: Callable[[HeldExpert], NativeExperts | None],
        device: Device,
        on_device: torch.Tensor,
        few: Callable[[DeviceExpert], FewTokenExperts | None],
        waits: DeviceWaits,
    ) -> None:
        """hidden_states: on the host. on_device: the same on the device. few: what computes an expert with few tokens
        there, if anything does. waits: sees the waiting for the device."""
        super().__init__(module, hidden_states, index, weights, kernel)
        self._device, self._inputs, self._few, self._waits = device, on_device, few, waits
        self._exact_inputs: torch.Tensor | None = None
        self._host_experts: list[int] = []
        self._bounds: dict[int, tuple[int, int]] = {}
        end = 0
        for expert, rows in self.rows.items():
            self._bounds[expert] = end, end + len(rows)
            end += len(rows)
        place = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *self.rows.values()]))
        self._positions, self._device_scale = _bring_together(device, place, self._scale)
        # Made on the model's own stream, like all that it is summed from.
        self._sums = on_device.new_zeros((self.tokens * self.top_k, on_device.shape[-1]), dtype=torch.float32)

    def compute(self, experts: Sequence[HeldExpert]) -> None:
        """On the host."""
        super().compute(experts)
        self._host_experts += [expert.key.expert for expert in experts]

    def compute_on_device(self, experts: Sequence[DeviceExpert], memory: torch.Tensor) -> None:
        """Queue the outputs of experts, each for all its tokens. memory: all device slots."""
        batches: dict[int, tuple[FewTokenExperts, list[DeviceExpert]]] = {}
        for expert in experts:
            if expert.ready is not None:
                self._device.compute_after(expert.ready)
                if expert.ready.done():
                    expert.ready = None
            few = self._few(expert)
            if few is not None and few.takes(len(self.rows[expert.key.expert])):
                batches.setdefault(id(few), (few, []))[1].append(expert)
            else:
                self._device.compute(partial(self._with_many_tokens, expert))
        for few, batch in batches.values():
            pairs = [(expert.start, at) for expert in batch for at in self.rows[expert.key.expert]]
            self._device.compute(
                partial(self._with_few_tokens, few, memory, self._device.bring(torch.tensor(pairs).t()))
            )

    def _with_many_tokens(self, expert: DeviceExpert) -> None:
        start, stop = self._bounds[expert.key.expert]
        place = self._positions[start:stop]
        output = expert_forward(self.module, expert.weights, self._inputs[place // self.top_k])
        self._sums[place] = output.to(torch.float32) * self._device_scale[place]

    def _with_few_tokens(self, few: FewTokenExperts, memory: torch.Tensor, pairs: torch.Tensor) -> None:
        """pairs: int64 [2, pairs], where each expert's slot begins, and the position of its row."""
        if self._exact_inputs is None:
            self._exact_inputs = self._inputs.to(torch.float32).contiguous()
        starts, place = pairs[0], pairs[1]
        output = few(memory, starts.contiguous(), self._exact_inputs, place // self.top_k)
        self._sums[place] = output * self._device_scale[place]

    def total(self) -> torch.Tensor:
        """[tokens, hidden] on the device, complete for what torch computes next."""
        device = self._device
        place = torch.tensor(
            [at for expert in self._host_experts for at in self.rows[expert]], dtype=torch.int64
        )
        there, rows = _bring_together(device, place, self._outputs[place]) if len(place) else (None, None)
        totals: list[torch.Tensor] = []

        def work() -> None:
            if there is not None and rows is not None:
                self._sums[there] = rows
            columns = self._sums.view(self.tokens, self.top_k, -1)
            total = columns[:, 0].clone()
            for column in range(1, self.top_k):
                total += columns[:, column]
            totals.append(total.to(self._inputs.dtype))

        device.compute(work)
        self._waits.during(device.finish)
        return totals[0]


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
