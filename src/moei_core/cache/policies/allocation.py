"""LRU within each layer, with quotas from measured miss curves (AdapMoE, arXiv 2408.10284)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moei_core.cache.policies.base import even_quotas
from moei_core.cache.policies.lru import LayerLRU
from moei_core.types import ExpertKey, LayerAccess


def allocate(misses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """Slots for each layer that minimise the sum of ``misses[layer][slots]``; exact, by dynamic programming.

    misses: by layer, expected misses with 0, 1, ... slots. A layer never gets more slots than its list has.
    Runs in layers x capacity x longest list, vectorised over the capacity.
    """
    best = np.zeros(capacity + 1)
    choices: list[NDArray[np.intp]] = []
    for curve in misses:
        options = np.full((len(curve), capacity + 1), np.inf)
        for slots, missed in enumerate(curve[: capacity + 1]):
            options[slots, slots:] = best[: capacity + 1 - slots] + missed
        choice = options.argmin(axis=0)
        choices.append(choice)
        best = options[choice, np.arange(capacity + 1)]
    quotas: list[int] = []
    left = capacity
    for choice in reversed(choices):
        quotas.append(int(choice[left]))
        left -= quotas[-1]
    return quotas[::-1]


class AllocatedLRU(LayerLRU):
    """Per-layer LRU that moves quotas to the layers where they save most.

    The miss curve of a layer follows from the stack distances of its accesses (Mattson, IBM Systems Journal
    1970): an LRU of n slots hits exactly those with a distance below n. Curves are measured from the past;
    quotas are computed anew after ``FIRST`` passes and whenever the number of passes has doubled.
    """

    FIRST = 256

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        super().__init__(capacity, num_experts)
        self._capacity = capacity
        self._passes, self._next = 0, self.FIRST
        self._clock = 0
        self._last = {layer: np.zeros(count, np.int64) for layer, count in num_experts.items()}
        self._distances = {layer: np.zeros(count + 1, np.int64) for layer, count in num_experts.items()}

    def on_pass(self) -> None:
        self._passes += 1
        if self._passes >= self._next:
            self._next *= 2
            self._reallocate()

    def on_access(self, access: LayerAccess) -> None:
        super().on_access(access)
        last, experts = self._last[access.layer], list(access.experts)
        # Experts used since: those with a later last use. The first use ever has infinite distance.
        used = last[experts]
        distance = (last[None, :] > used[:, None]).sum(axis=1)
        distance[used == 0] = len(last)
        np.add.at(self._distances[access.layer], distance, 1)
        self._clock += 1
        last[experts] = self._clock

    def resize(self, capacity: int) -> None:
        self._capacity = capacity
        if self._passes < self.FIRST:
            self._quota = even_quotas(capacity, self._num_experts)
        else:
            self._reallocate()

    def victim(self, incoming: ExpertKey, excluded: object) -> ExpertKey | None:
        layer = incoming.layer
        # After quotas have moved, room is still held by layers above their new quota: take it from there.
        if incoming.expert >= 0 and self._residents(layer) < self._quota[layer]:
            layer = max(self._recency, key=lambda other: self._residents(other) - self._quota[other])
        return super().victim(ExpertKey(layer, incoming.expert), excluded)  # type: ignore[arg-type]

    def _residents(self, layer: int) -> int:
        return sum(self._recency[layer].values())

    def _reallocate(self) -> None:
        curves = []
        for distances in self._distances.values():
            hits = np.concatenate([[0], np.cumsum(distances[:-1])])
            curves.append((distances.sum() - hits).tolist())
        capacity = min(self._capacity, sum(self._num_experts.values()))
        quotas = allocate(curves, capacity)
        # What saves no miss of the past may still save one to come, of an expert that has not been used yet.
        spare = even_quotas(
            capacity - sum(quotas),
            {
                layer: count - quota
                for (layer, count), quota in zip(self._num_experts.items(), quotas, strict=True)
            },
        )
        self._quota = {layer: quota + spare[layer] for layer, quota in zip(spare, quotas, strict=True)}
