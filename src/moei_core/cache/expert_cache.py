"""``ExpertCache``: which experts are resident. The only miss loop; policies only order.

A cache of N slots is a *working set* of W slots (one token's top-k of the widest layer) and N - W *resident*
slots. Misses of an access are loaded into the working set; once computed, each either becomes a resident (its
slot changes roles, no bytes move) or is released. So an access never fails because the budget is small, a
long prompt can pass through without flushing what decode needs, and the smallest cache is W slots.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

from moei_core.cache.expert_sizes import ExpertSizes, experts_in
from moei_core.cache.policies.base import CachePolicy
from moei_core.types import ExpertKey, LayerAccess


@dataclass(slots=True)
class CacheStatistics:
    """Counts of expert lookups since the start (or since ``minus``'s baseline)."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bypasses: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of lookups that found a resident expert; 0 before the first lookup."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 0.0

    def minus(self, earlier: CacheStatistics) -> CacheStatistics:
        """What happened since ``earlier`` was copied."""
        return CacheStatistics(
            self.hits - earlier.hits,
            self.misses - earlier.misses,
            self.evictions - earlier.evictions,
            self.bypasses - earlier.bypasses,
        )


@dataclass(slots=True)
class ExpertCache:
    """Residency of experts, ordered by ``policy``.

    capacity: slots that the residents may take together. sizes: of unequal experts, of which more than ``capacity``
    stay if they are small; None: one slot each. The policy is to be made for ``experts_in(capacity, sizes)``.
    """

    capacity: int
    policy: CachePolicy
    statistics: CacheStatistics = field(default_factory=CacheStatistics)
    sizes: ExpertSizes | None = None
    _resident: dict[int, dict[int, ExpertKey]] = field(default_factory=dict)
    _count: int = 0
    _used: int = 0

    def __post_init__(self) -> None:
        if self.sizes is not None:
            self.policy.set_sizes(self.sizes.nbytes)

    def __contains__(self, key: ExpertKey) -> bool:
        return key.expert in self._resident.get(key.layer, ())

    def __len__(self) -> int:
        return self._count

    def residents(self) -> list[ExpertKey]:
        """All resident experts, ascending."""
        return sorted(key for layer in self._resident.values() for key in layer.values())

    def size_of(self, layer: int) -> int:
        """What one expert of ``layer`` takes, in the unit of ``slot_size``."""
        return 1 if self.sizes is None else self.sizes.nbytes[layer]

    @property
    def slot_size(self) -> int:
        """What one slot has room for: an expert, or bytes where these are unequal."""
        return 1 if self.sizes is None else self.sizes.largest

    @property
    def room(self) -> int:
        """How many more experts (of the largest size) may become resident before one must go."""
        return max(0, self.capacity * self.slot_size - self._used) // self.slot_size

    def touch(
        self, access: LayerAccess, keys: tuple[ExpertKey, ...]
    ) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Tell the policy of an access and split its experts into (hits, misses), each ascending.

        keys: the layer's interned keys, by expert.
        """
        self.policy.on_access(access)
        resident = self._resident.get(access.layer, ())
        hits: list[ExpertKey] = []
        misses: list[ExpertKey] = []
        for expert in access.experts:
            (hits if expert in resident else misses).append(keys[expert])
        self.statistics.hits += len(hits)
        self.statistics.misses += len(misses)
        return hits, misses

    def place(
        self,
        key: ExpertKey,
        excluded: Container[ExpertKey],
        may_evict: Callable[[ExpertKey], bool] | None = None,
    ) -> tuple[bool, tuple[ExpertKey, ...]]:
        """Try to make ``key``, which is loaded, resident: (whether it stays, who was evicted for it).

        may_evict: for a prefetched ``key``, of which only a prediction is known: the policy then names its
        least valuable resident without looking at ``key``, and ``may_evict`` decides. None: the policy does.

        With unequal sizes several small experts may go for a large one; if one may not go, those already
        chosen are evicted and ``key`` still does not stay: rare, and only a lost opportunity.
        """
        policy, layer = self.policy, key.layer
        size, limit = self.size_of(layer), self.capacity * self.slot_size
        quota = policy.quota(layer)
        resident = self._resident.get(layer)
        if resident is None:
            resident = self._resident[layer] = {}
        incoming = key if may_evict is None else ExpertKey(layer, -1)
        evicted: tuple[ExpertKey, ...] = ()
        while self._used + size > limit or (quota is not None and len(resident) >= quota):
            victim = policy.victim(incoming, excluded) if self._count and quota != 0 else None
            if victim is None or (may_evict is not None and not may_evict(victim)):
                if may_evict is None:
                    self.statistics.bypasses += 1
                return False, evicted
            self.drop(victim)
            self.statistics.evictions += 1
            evicted += (victim,)
        resident[key.expert] = key
        self._count += 1
        self._used += size
        policy.insert(key)
        return True, evicted

    def drop(self, key: ExpertKey) -> None:
        """Forget a resident whose bytes are gone."""
        del self._resident[key.layer][key.expert]
        self._count -= 1
        self._used -= self.size_of(key.layer)
        self.policy.remove(key)

    def resize(self, capacity: int) -> list[ExpertKey]:
        """Change the capacity and return who must go at once, least valuable first.

        A policy with quotas keeps its proportions: it is told first.
        """
        self.capacity = capacity
        self.policy.resize(experts_in(capacity, self.sizes))
        gone: list[ExpertKey] = []
        for layer, resident in self._resident.items():
            quota = self.policy.quota(layer)
            while quota is not None and len(resident) > quota:
                if not self._shed(layer, gone):
                    break
        while self._used > capacity * self.slot_size:
            largest = max(self._resident, key=lambda layer: len(self._resident[layer]))
            if not self._shed(largest, gone):
                break
        return gone

    def _shed(self, layer: int, gone: list[ExpertKey]) -> bool:
        victim = self.policy.victim(ExpertKey(layer, -1), ())
        if victim is None:
            return False
        self.drop(victim)
        self.statistics.evictions += 1
        gone.append(victim)
        return True
