"""Counts: least frequently used, never aged, reset per request, or decayed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moei_core.cache.policies.base import ValuePolicy
from moei_core.types import LayerAccess


class LayerLFU(ValuePolicy):
    """Evict the expert of the layer with the fewest uses so far; of equals, the one with the lowest index.

    decay: what is left of a count after each access of its layer. request_scale: after each new request.
    """

    decay = 1.0
    request_scale = 1.0

    def __init__(self, capacity: int, num_experts: Mapping[int, int], *, per_layer: bool = True) -> None:
        super().__init__(capacity, num_experts, per_layer=per_layer)
        self._counts = np.zeros(self.values.shape, np.float64)

    def on_request(self) -> None:
        if self.request_scale != 1.0:
            self._counts *= self.request_scale
            self.values[:] = self._counts
            self.refresh_all()

    def on_access(self, access: LayerAccess) -> None:
        i = self.position[access.layer]
        counts = self._counts[i]
        if self.decay != 1.0:
            counts *= self.decay
        counts[list(access.experts)] += 1
        self.values[i] = counts
        self.refresh(i)


class GlobalLFU(LayerLFU):
    """LFU over one pool for all layers."""

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        super().__init__(capacity, num_experts, per_layer=False)


class RequestLFU(LayerLFU):
    """LFU whose counts start again with every request; what came before only breaks ties."""

    request_scale = 1e-3


class DecayedLFU(LayerLFU):
    """Uses weighted by .98 to the number of passes since (LRFU, IEEE Transactions on Computers 2001)."""

    decay = 0.98
