"""The bound: evict what is used again last (Belady, IBM Systems Journal 1966). Needs the future."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moei_core.cache.policies.base import NEVER, ValuePolicy
from moei_core.types import LayerAccess


class LayerBelady(ValuePolicy):
    """Furthest next use within the layer; every miss is admitted, as the LRUs do it."""

    needs_future = True
    _PER_LAYER = True
    _BYPASS = False

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        super().__init__(capacity, num_experts, per_layer=self._PER_LAYER, bypass=self._BYPASS)
        # Next uses exceed what float32 tells apart, so this policy keeps its numbers in float64.
        self.values = np.full(self.values.shape, -float(NEVER))
        self._candidates = np.full(self.values.shape, np.inf)
        self._flat = self._candidates.reshape(-1)
        self._next_use: Sequence[int] = ()

    def foresee(self, next_use: Sequence[int]) -> None:
        self._next_use = next_use

    def on_access(self, access: LayerAccess) -> None:
        i = self.position[access.layer]
        self.values[i, list(access.experts)] = -np.asarray(self._next_use, np.float64)
        self.refresh(i)


class LayerBeladyBypass(LayerBelady):
    """As ``LayerBelady``, but a miss that is needed later than the victim is not admitted."""

    _BYPASS = True


class GlobalBelady(LayerBelady):
    """Furthest next use in one pool for all layers; every miss is admitted."""

    _PER_LAYER = False


class GlobalBeladyBypass(GlobalBelady):
    """As ``GlobalBelady``, but a miss that is needed later than the victim is not admitted."""

    _BYPASS = True
