"""Two tiers of residency, RAM and a device's memory, behind the one front door of the scheduler. Brain only.

The device tier is an ``ExpertCache`` with a policy of its own in front of the RAM tier's. An expert that it holds is
computed there; what it does not hold is the RAM tier's access, so each tier sees the misses of the nearer one, and an
expert that moved up ages out below. Nothing is ever written back: experts never change.

For each expert that the device does not hold, one rule decides: with many tokens it is copied and computed on the
device, with few it is computed where it lies (Fiddler, arXiv 2402.07033). Beside those computed in RAM, as many are
*promoted* - copied for the next time - as the link carries meanwhile, if the policy wants them.

What is predicted for the next layers, and in RAM, is *prefetched* into slots beside the residents': copied behind all
that is wanted now, computed on the device if its router chooses it, forgotten otherwise. A plan says what is
prefetched; when the bytes really move is the engine's matter and changes no plan and no result.

So *where* an expert is computed follows from what the device holds, and the two places round differently. With
``copy_from`` 1 everything is computed on the device, and results do not depend on any budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moei_core.cache.expert_cache import CacheStatistics, ExpertCache
from moei_core.predict.base import ExpertPredictor
from moei_core.prefetch import PrefetchController, PrefetchMode
from moei_core.scheduler import ExpertScheduler, PrefetchStatistics
from moei_core.types import DevicePlan, ExpertKey, FetchPlan, LayerAccess, Phase, layer_keys


@dataclass(frozen=True, slots=True)
class LinkCosts:
    """What it costs to bring an expert to the device, and to compute it in RAM. Bytes a second, seconds.

    link_bandwidth, link_latency: of copies to the device. ram_bandwidth: at which an expert with few tokens is
    computed in RAM. batch_tokens: tokens of an expert from which its arithmetic takes longer than reading it.
    """

    link_bandwidth: float
    link_latency: float
    ram_bandwidth: float
    batch_tokens: int = 4

    def copy_seconds(self, nbytes: int) -> float:
        return self.link_latency + nbytes / self.link_bandwidth

    def ram_seconds(self, nbytes: int, tokens: int) -> float:
        return nbytes / self.ram_bandwidth * max(1.0, tokens / self.batch_tokens)

    def copy_from(self, nbytes: int) -> int:
        """Tokens of an expert from which copying it takes no longer than computing it in RAM."""
        once = self.ram_seconds(nbytes, 1)
        copying = self.copy_seconds(nbytes)
        return 1 if copying <= once else math.ceil(copying / once * self.batch_tokens)

    def promote_share(self, nbytes: int) -> float:
        """Experts that the link carries while RAM computes one with few tokens."""
        return self.ram_seconds(nbytes, 1) / self.copy_seconds(nbytes)


class DeviceTier:
    """What the device holds, and what becomes of what it does not hold. Deterministic: no clock, no chance."""

    def __init__(
        self,
        cache: ExpertCache,
        num_experts: Mapping[int, int],
        copy_from: Mapping[int, int],
        promote_share: Mapping[int, float],
        prefetch_slots: int = 0,
    ) -> None:
        """By layer: copy_from: tokens from which an absent expert is copied and computed on the device; 1: always.
        promote_share: experts that the link carries while RAM computes one.

        prefetch_slots: device slots that residents give up, while a predictor is followed, to experts that no router
        has asked for yet.
        """
        self.cache = cache
        self.prefetch_slots = prefetch_slots
        self._capacity, self._taken = cache.capacity, 0
        self._prefetching = False
        # Prefetched experts whose layer has not run yet.
        self.ahead: dict[ExpertKey, None] = {}
        # started = useful + wasted + those still ahead: whether the bytes came in time is the engine's knowledge.
        self.prefetch_statistics = PrefetchStatistics()
        self._num_experts = num_experts
        self._copy_from, self._promote_share = copy_from, promote_share
        self._credit = 0.0

    def plan(self, access: LayerAccess, prefetching: bool = False) -> tuple[DevicePlan, LayerAccess]:
        """What the device does, and the part of ``access`` that is left to RAM.

        prefetching: whether experts may be copied ahead from this access on.
        """
        evict: list[ExpertKey] = []
        dropped: list[ExpertKey] = []
        if self._prefetching is not prefetching:
            # As in RAM: slots for prefetches are the residents' while none may come.
            self._prefetching = prefetching
            dropped += self.ahead
            self.ahead.clear()
            self.prefetch_statistics.wasted += len(dropped)
            evict += self._fit()
        layer = access.layer
        keys = layer_keys(layer, self._num_experts[layer])
        hits, misses = self.cache.touch(access, keys)
        foreseen, cancel = self._gate_spoke(layer, misses)
        counts = dict(zip(access.experts, access.token_counts, strict=True))
        least = self._copy_from[layer]
        copy = [key for key in misses if counts[key.expert] >= least]
        in_ram = [key for key in misses if counts[key.expert] < least]
        excluded: set[ExpertKey] = {*hits, *foreseen, *copy}
        release: list[ExpertKey] = []
        for key in (*foreseen, *copy):
            stays, evicted = self.cache.place(key, excluded)
            evict += evicted
            if not stays:
                release.append(key)
        plan = DevicePlan(
            tuple(hits),
            tuple(evict),
            tuple(copy),
            tuple(release),
            foreseen=tuple(foreseen),
            cancel=(*dropped, *cancel),
        )
        if in_ram:
            plan = self._promote(plan, access, in_ram, excluded)
        absent = {key.expert for key in misses}
        if len(absent) == len(access.experts):
            return plan, access
        rest = [expert for expert in access.experts if expert in absent]
        return plan, access._replace(
            experts=tuple(rest),
            token_counts=tuple(counts[expert] for expert in rest),
            order=tuple(expert for expert in access.order if expert in absent),
        )

    def resize(self, capacity: int) -> list[ExpertKey]:
        """The residents may now be ``capacity``, less those slots that prefetches take. Returns who must go, prefetched
        ones too."""
        self._capacity = capacity
        gone = self._fit()
        unwanted = list(self.ahead)[self._taken :]
        for key in unwanted:
            del self.ahead[key]
        self.prefetch_statistics.wasted += len(unwanted)
        return [*gone, *unwanted]

    def _fit(self) -> list[ExpertKey]:
        self._taken = min(self.prefetch_slots, self._capacity) if self._prefetching else 0
        return self.cache.resize(self._capacity - self._taken)

    def prefetch(self, keys: Iterable[ExpertKey]) -> tuple[ExpertKey, ...]:
        """Those of ``keys``, likeliest first, that are to be copied ahead: what is absent, while there are slots."""
        found: list[ExpertKey] = []
        for key in keys:
            if len(self.ahead) >= self._taken:
                break
            if key not in self.cache and key not in self.ahead:
                self.ahead[key] = None
                found.append(key)
        self.prefetch_statistics.started += len(found)
        return tuple(found)

    def _gate_spoke(self, layer: int, misses: list[ExpertKey]) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Settle the prefetches for ``layer``: (those chosen, which are no ``misses`` any more; the others)."""
        foreseen: list[ExpertKey] = []
        cancel: list[ExpertKey] = []
        for key in [key for key in self.ahead if key.layer == layer]:
            del self.ahead[key]
            (foreseen if key in misses else cancel).append(key)
        for key in foreseen:
            misses.remove(key)
        self.cache.statistics.hits += len(foreseen)
        self.cache.statistics.misses -= len(foreseen)
        self.prefetch_statistics.useful += len(foreseen)
        self.prefetch_statistics.wasted += len(cancel)
        return foreseen, cancel

    def _promote(
        self, plan: DevicePlan, access: LayerAccess, in_ram: list[ExpertKey], excluded: set[ExpertKey]
    ) -> DevicePlan:
        """Add experts to copy while ``in_ram`` are computed, the router's favourites first.

        The link's time that is not used now is gone: what is left over never exceeds this access. While there is room,
        one is promoted at least: filling up costs the link once.
        """
        self._credit = min(self._credit + len(in_ram) * self._promote_share[access.layer], len(in_ram))
        if len(self.cache) < self.cache.capacity:
            self._credit = max(self._credit, 1.0)
        if self._credit < 1:
            return plan
        rank = {expert: place for place, expert in enumerate(access.order)}
        evict, promote = list(plan.evict), []
        excluded.update(in_ram)
        for key in sorted(in_ram, key=lambda key: rank.get(key.expert, 0)):
            if self._credit < 1:
                break
            stays, evicted = self.cache.place(key, excluded)
            evict += evicted
            if stays:
                promote.append(key)
                self._credit -= 1
        return plan._replace(evict=tuple(evict), promote=tuple(promote))


class TieredScheduler(ExpertScheduler):
    """An ``ExpertScheduler`` for RAM with a device tier in front: its plans carry a ``DevicePlan`` as well."""

    def __init__(
        self,
        cache: ExpertCache,
        working_slots: int,
        device: DeviceTier,
        predictor: ExpertPredictor | None = None,
        mode: PrefetchMode = PrefetchMode.AUTO,
        *,
        prefetch_slots: int = 0,
        num_experts: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(
            cache, working_slots, predictor, mode, prefetch_slots=prefetch_slots, num_experts=num_experts
        )
        self.device = device
        self._nearer = device.cache
        self.to_device: tuple[ExpertKey, ...] = ()
        """What the latest ``look_ahead`` wants of RAM's experts on the device."""
        self._both = len(self._candidates)
        if predictor is not None and device.prefetch_slots:
            # Two ways to follow each predictor: into both tiers, or into RAM alone. The controller keeps what pays.
            self._candidates *= 2
            self.controller = PrefetchController(mode, [one.learns for one in self._candidates])

    @property
    def device_statistics(self) -> CacheStatistics:
        """Lookups in the device's memory; ``statistics`` counts those that went on to RAM."""
        return self.device.cache.statistics

    def request_start(self) -> None:
        self.device.cache.policy.on_request()
        super().request_start()

    def request_end(self) -> None:
        self.device.cache.policy.on_request_end()
        super().request_end()

    def forward_pass(self, phase: Phase, tokens: int = 1) -> None:
        self.device.cache.policy.on_pass()
        super().forward_pass(phase, tokens)

    def access(self, access: LayerAccess) -> FetchPlan:
        plan = super().access(access)
        assert plan.device is not None
        return plan._replace(device=plan.device._replace(prefetch=self.to_device))

    def decide(self, access: LayerAccess, routed: LayerAccess | None = None) -> FetchPlan:
        front, rest = self.device.plan(access, self._into_both)
        return super().decide(rest, access)._replace(device=front)

    def look_ahead(self, access: LayerAccess) -> tuple[ExpertKey, ...]:
        self.to_device = ()
        return super().look_ahead(access)

    def pass_end(self, stall_seconds: float, seconds: float) -> None:
        # Prefetches to the device save copies and computing in RAM, and how much of a pass those take is not known.
        super().pass_end(seconds if self.device.prefetch_slots else stall_seconds, seconds)

    def resize_device(self, capacity: int) -> tuple[ExpertKey, ...]:
        """The device's residents may now be ``capacity``. Returns who must go before anything else is copied."""
        return tuple(self.device.resize(capacity))

    @property
    def _into_both(self) -> bool:
        return self._followed is not None and self._followed < self._both

    def _plan_prefetch(self, access: LayerAccess, predictor: ExpertPredictor) -> tuple[ExpertKey, ...]:
        found = super()._plan_prefetch(access, predictor)
        if self._into_both:
            self.to_device = self.device.prefetch(key for key in self._predicted if key in self._cache)
        return found

    def cancel_load(self, key: ExpertKey) -> None:
        """The planned bytes of ``key`` did not arrive: no tier holds it.

        But for a prefetch into RAM: the device may have been given the same expert before RAM gave it up.
        """
        if key not in self._in_flight:
            if key in self.device.cache:
                self.device.cache.drop(key)
            if key in self.device.ahead:
                del self.device.ahead[key]
                self.device.prefetch_statistics.wasted += 1
        super().cancel_load(key)
