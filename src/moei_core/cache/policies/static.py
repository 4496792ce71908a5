"""A list of experts that is fixed after a while, and the empty one."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from moei_core.cache.policies.base import PolicyDefaults, ValuePolicy
from moei_core.types import ExpertKey, LayerAccess


class Static(ValuePolicy):
    """The most frequent experts of the first ``LEARNING`` passes stay, nothing else is admitted once they are in.

    What is popular does not transfer between tasks, so this is a baseline, not a product.
    """

    LEARNING = 512

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        super().__init__(capacity, num_experts, per_layer=True, bypass=True)
        self._passes = 0

    def on_pass(self) -> None:
        self._passes += 1

    def on_access(self, access: LayerAccess) -> None:
        if self._passes <= self.LEARNING:
            i = self.position[access.layer]
            self.values[i, list(access.experts)] += np.float32(1)
            self.refresh(i)


class OnDemand(PolicyDefaults):
    """Nothing is kept: every expert is copied when it is needed (the blocking baseline)."""

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        return

    def on_access(self, access: LayerAccess) -> None:
        return

    def quota(self, layer: int) -> int | None:
        return 0

    def resize(self, capacity: int) -> None:
        return

    def insert(self, key: ExpertKey) -> None:
        return

    def remove(self, key: ExpertKey) -> None:
        return

    def victim(self, incoming: ExpertKey, excluded: Container[ExpertKey]) -> ExpertKey | None:
        return None
