"""What a cache policy is: it orders experts, and nothing else. The miss loop is ``ExpertCache``'s."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moei_core.types import ExpertKey, LayerAccess, layer_keys

NEVER = 1 << 60
"""The next use of an expert that is not used again."""


class CachePolicy(Protocol):
    """Says who stays. One instance serves one cache; ``insert``/``remove`` mirror the cache's residency.

    needs_future: whether ``foresee`` must be called before each access (Belady); such a one only simulates.
    """

    needs_future: bool

    def set_sizes(self, expert_nbytes: Mapping[int, int]) -> None:
        """What one expert of each layer takes, once, where they are unequal."""

    def on_request(self) -> None:
        """A request (one turn of a chat) starts."""

    def on_request_end(self) -> None:
        """The request has ended."""

    def on_pass(self) -> None:
        """A forward pass starts."""

    def foresee(self, next_use: Sequence[int]) -> None:
        """The next uses of the experts of the access that follows, in its order (only if needs_future)."""

    def on_access(self, access: LayerAccess) -> None:
        """The router of one layer has spoken. Called before the misses of this access are placed."""

    def quota(self, layer: int) -> int | None:
        """Residents that ``layer`` may have; None: one pool for all layers."""

    def insert(self, key: ExpertKey) -> None:
        """``key`` has become resident."""

    def remove(self, key: ExpertKey) -> None:
        """``key`` is no longer resident (evicted, or its load was cancelled)."""

    def resize(self, capacity: int) -> None:
        """The cache may from now on hold ``capacity`` residents."""

    def victim(self, incoming: ExpertKey, excluded: Container[ExpertKey]) -> ExpertKey | None:
        """The resident to give up for ``incoming``, never one of ``excluded``; None: bypass ``incoming``.

        Asked only when there is no free room: in ``incoming``'s layer if that has reached its quota, else in
        the pool. An ``incoming.expert`` of -1 asks for the least valuable one without a newcomer (the cache
        is shrinking), so it cannot be bypassed.
        """


class PolicyDefaults:
    """Does nothing for the events that a policy does not care about."""

    needs_future = False

    def set_sizes(self, expert_nbytes: Mapping[int, int]) -> None:
        return

    def on_request(self) -> None:
        return

    def on_request_end(self) -> None:
        return

    def on_pass(self) -> None:
        return

    def foresee(self, next_use: Sequence[int]) -> None:
        """The next uses of the experts of the access that follows, in its order (only if needs_future)."""

    def on_access(self, access: LayerAccess) -> None:
        raise NotImplementedError


def even_quotas(capacity: int, num_experts: Mapping[int, int]) -> dict[int, int]:
    """Shares of ``capacity`` as equal as whole slots allow; what is left over goes to the earliest layers."""
    quotas = dict.fromkeys(num_experts, 0)
    left = min(capacity, sum(num_experts.values()))
    while left:
        open_layers = [layer for layer, count in num_experts.items() if quotas[layer] < count]
        share = max(1, left // len(open_layers))
        for layer in open_layers:
            given = min(share, num_experts[layer] - quotas[layer], left)
            quotas[layer] += given
            left -= given
    return quotas


class ValuePolicy(PolicyDefaults):
    """Base of the policies that give every expert a number and evict the resident with the smallest.

    A subclass updates ``values[i]`` (i: position of the layer among the MoE layers) in ``on_access`` and then
    calls ``refresh(i)``. per_layer: quotas, even at first; otherwise one pool. bypass: a newcomer worth no
    more than the victim is not admitted.
    """

    def __init__(
        self, capacity: int, num_experts: Mapping[int, int], *, per_layer: bool, bypass: bool = False
    ) -> None:
        self.num_experts = dict(num_experts)
        self.layers = tuple(num_experts)
        self.position = {layer: i for i, layer in enumerate(self.layers)}
        self.keys = [layer_keys(layer, count) for layer, count in num_experts.items()]
        self.width = max(num_experts.values())
        self.bypass = bypass
        self.quotas = even_quotas(capacity, num_experts) if per_layer else None
        shape = (len(self.layers), self.width)
        self.values: NDArray[np.float32] = np.zeros(shape, np.float32)
        # Added to the values: 0 for residents, infinite elsewhere. So an argmin over the sums finds the victim.
        self._absence = np.full(shape, np.inf, np.float32)
        self._candidates = np.full(shape, np.inf, np.float32)
        self._flat = self._candidates.reshape(-1)

    def refresh(self, i: int) -> None:
        """``values[i]`` has changed."""
        np.add(self.values[i], self._absence[i], self._candidates[i])

    def refresh_all(self) -> None:
        """All ``values`` have changed."""
        np.add(self.values, self._absence, self._candidates)

    def quota(self, layer: int) -> int | None:
        return None if self.quotas is None else self.quotas[layer]

    def resize(self, capacity: int) -> None:
        if self.quotas is not None:
            self.quotas = even_quotas(capacity, self.num_experts)

    def insert(self, key: ExpertKey) -> None:
        i = self.position[key.layer]
        self._absence[i, key.expert] = 0
        self._candidates[i, key.expert] = self.values[i, key.expert]

    def remove(self, key: ExpertKey) -> None:
        i = self.position[key.layer]
        self._absence[i, key.expert] = np.inf
        self._candidates[i, key.expert] = np.inf

    def victim(self, incoming: ExpertKey, excluded: Container[ExpertKey]) -> ExpertKey | None:
        i = self.position[incoming.layer]
        pool = self._flat if self.quotas is None else self._candidates[i]
        spared: list[tuple[int, np.float32]] = []
        found: ExpertKey | None = None
        while True:
            at = int(pool.argmin())
            value = pool[at]
            if value == np.inf:
                break
            key = self.keys[at // self.width][at % self.width] if self.quotas is None else self.keys[i][at]
            if key not in excluded:
                if not self.bypass or incoming.expert < 0 or value < self.values[i, incoming.expert]:
                    found = key
                break
            spared.append((at, value))
            pool[at] = np.inf
        for at, value in spared:
            pool[at] = value
        return found
