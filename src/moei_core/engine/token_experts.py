"""The experts of a layer for one token, all in device memory: recorded, with a table of where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moei_core.engine.device_compute import DeviceExpert, FewTokenExperts
from moei_core.engine.recorded_operations import RecordedLayer, Recording


class TokenExperts:
    """What ``FewTokenExperts`` and the sum after it launch for one token, as a piece of a recording.

    It gives the bits that launching gives: the kernels and their order are the same. few: the experts that it is for.
    queue: queues it. output: [1, hidden_size], where the sum is then.
    """

    def __init__(
        self, few: FewTokenExperts, layer: RecordedLayer, memory: torch.Tensor, recording: Recording
    ) -> None:
        """Records a piece. memory: of ``DeviceSlots``."""
        self.few, self.output = few, layer.output
        top_k = layer.host[1].shape[-1]
        recording.begin()
        host, pairs = recording.from_host((few.kernels.PAIR_STARTS + few.pieces + 1, top_k), torch.int64)
        self._table: NDArray[np.int64] = host.numpy()
        inputs, output = layer.hidden_states, layer.output

        def work() -> None:
            rows = inputs.new_empty((top_k, inputs.shape[-1]), dtype=torch.float32)
            few(memory, pairs, inputs.to(torch.float32).contiguous(), rows)
            few.kernels.sum_rows(rows, top_k, output)

        recording.call(work)
        self.queue = recording.end()

    def takes(self, few: FewTokenExperts, experts: Sequence[DeviceExpert]) -> bool:
        """Whether these are all the experts of a token, and of the kind that was recorded."""
        return few is self.few and len(experts) == self._table.shape[1]

    def place(
        self, experts: Sequence[DeviceExpert], rows: Mapping[int, NDArray[Any]], weights: NDArray[np.float32]
    ) -> None:
        """Write down where the experts lie, before ``queue`` is called."""
        row = [int(rows[expert.key.expert][0]) for expert in experts]
        self._table[1:3] = row, weights.view(np.int32)[row]
        self._table[3:] = np.array([expert.starts for expert in experts]).T
