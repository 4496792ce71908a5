"""Least recently used, with one quota per layer or one global pool."""

from __future__ import annotations

from collections.abc import Container, Mapping

from moei_core.cache.policies.base import PolicyDefaults, even_quotas
from moei_core.types import ExpertKey, LayerAccess, layer_keys


class LayerLRU(PolicyDefaults):
    """LRU within each layer: every layer owns a fixed share of the residents.

    One global LRU hits nothing while it holds fewer experts than one token needs (each token floods it);
    quotas per layer do not have that cliff. The experts of one access count as used in the order in which the
    router named them (ascending where that is not known), whether they were resident or not: with few slots
    that order decides, and it must not favour misses.
    """

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        """capacity: resident slots in all. num_experts: routed experts by layer; a layer never gets more."""
        self._num_experts = num_experts
        self._quota = even_quotas(capacity, num_experts)
        # A dict keeps insertion order: first is least recently used. False: used, but not resident.
        self._recency: dict[int, dict[int, bool]] = {layer: {} for layer in num_experts}
        self._keys = {layer: layer_keys(layer, count) for layer, count in num_experts.items()}

    def on_access(self, access: LayerAccess) -> None:
        recency = self._recency[access.layer]
        for expert in access.order or access.experts:
            recency[expert] = recency.pop(expert, False)

    def quota(self, layer: int) -> int | None:
        return self._quota[layer]

    def resize(self, capacity: int) -> None:
        self._quota = even_quotas(capacity, self._num_experts)

    def insert(self, key: ExpertKey) -> None:
        self._recency[key.layer][key.expert] = True

    def remove(self, key: ExpertKey) -> None:
        del self._recency[key.layer][key.expert]

    def victim(self, incoming: ExpertKey, excluded: Container[ExpertKey]) -> ExpertKey | None:
        keys = self._keys[incoming.layer]
        for expert, resident in self._recency[incoming.layer].items():
            if resident and keys[expert] not in excluded:
                return keys[expert]
        return None


class GlobalLRU(PolicyDefaults):
    """One LRU over the experts of all layers: the default of most earlier systems, and their cliff."""

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        """As ``LayerLRU``; the cache itself keeps to ``capacity``."""
        self._recency: dict[ExpertKey, bool] = {}
        self._keys = {layer: layer_keys(layer, count) for layer, count in num_experts.items()}

    def on_access(self, access: LayerAccess) -> None:
        keys, recency = self._keys[access.layer], self._recency
        for expert in access.order or access.experts:
            key = keys[expert]
            recency[key] = recency.pop(key, False)

    def quota(self, layer: int) -> int | None:
        return None

    def resize(self, capacity: int) -> None:
        return

    def insert(self, key: ExpertKey) -> None:
        self._recency[key] = True

    def remove(self, key: ExpertKey) -> None:
        del self._recency[key]

    def victim(self, incoming: ExpertKey, excluded: Container[ExpertKey]) -> ExpertKey | None:
        return next(
            (key for key, resident in self._recency.items() if resident and key not in excluded), None
        )
