"""Benefit per byte, for experts of unequal size (MoDSE, arXiv 2409.12210; GreedyDual-Size, USITS 1997)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moei_core.cache.policies.lfu import LayerLFU


class CostAware(LayerLFU):
    """Decayed frequency times the cost of loading the expert again, per byte that it occupies.

    cost = latency + bytes / bandwidth, so with equal sizes this is one global pool of decayed frequencies,
    and with unequal sizes small experts are kept a little longer: their latency buys more hits per byte.
    Sizes are unknown to the registry's constructor; the cache gives them by ``set_sizes``.
    """

    decay = 0.98

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        super().__init__(capacity, num_experts, per_layer=False)
        self._weight = np.ones((len(self.layers), 1), np.float64)

    def set_sizes(
        self, expert_nbytes: Mapping[int, int], *, latency: float = 100e-6, bandwidth: float = 1e9
    ) -> None:
        """expert_nbytes: by layer. latency in seconds and bandwidth in bytes a second of one load."""
        sizes = np.array([expert_nbytes[layer] for layer in self.layers], np.float64)
        weight = (latency + sizes / bandwidth) / sizes
        self._weight = (weight / weight.mean())[:, None]

    def refresh(self, i: int) -> None:
        self.values[i] *= self._weight[i]
        super().refresh(i)
