"""``TieredWork``: one layer whose experts are computed in two places, and summed in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moei_core.engine.device_compute import DeviceExpert
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
    ) -> None:
        """hidden_states: on the host. on_device: the same on the device."""
        super().__init__(module, hidden_states, index, weights, kernel)
        self._device, self._inputs = device, on_device
        self._host_experts: list[int] = []
        self._bounds: dict[int, tuple[int, int]] = {}
        positions: list[int] = []
        for expert, rows in self.rows.items():
            self._bounds[expert] = len(positions), len(positions) + len(rows)
            positions += rows
        self._positions = device.bring(torch.tensor(positions, dtype=torch.int64))
        self._device_scale = device.bring(self._scale)
        # Made on the model's own stream, like all that it is summed from.
        self._sums = on_device.new_zeros((self.tokens * self.top_k, on_device.shape[-1]), dtype=torch.float32)

    def compute(self, experts: Sequence[HeldExpert]) -> None:
        """On the host."""
        super().compute(experts)
        self._host_experts += [expert.key.expert for expert in experts]

    def compute_on_device(self, expert: DeviceExpert) -> None:
        """Queue the outputs of an expert for all its tokens."""
        if expert.ready is not None:
            self._device.compute_after(expert.ready)
            if expert.ready.done():
                expert.ready = None
        start, stop = self._bounds[expert.key.expert]

        def work() -> None:
            place = self._positions[start:stop]
            output = expert_forward(self.module, expert.weights, self._inputs[place // self.top_k])
            self._sums[place] = output.to(torch.float32) * self._device_scale[place]

        self._device.compute(work)

    def total(self) -> torch.Tensor:
        """[tokens, hidden] on the device, complete for what torch computes next."""
        device = self._device
        place = torch.tensor(
            [at for expert in self._host_experts for at in self.rows[expert]], dtype=torch.int64
        )
        rows = device.bring(self._outputs[place]) if len(place) else None
        there = device.bring(place)
        totals: list[torch.Tensor] = []

        def work() -> None:
            if rows is not None:
                self._sums[there] = rows
            columns = self._sums.view(self.tokens, self.top_k, -1)
            total = columns[:, 0].clone()
            for column in range(1, self.top_k):
                total += columns[:, column]
            totals.append(total.to(self._inputs.dtype))

        device.compute(work)
        device.finish()
        return totals[0]
