"""Two tiers of residency, RAM and a device's memory, behind the one front door of the scheduler. Brain only.

The device tier is an ``ExpertCache`` with a policy of its own in front of the RAM tier's. An expert that it holds is
computed there; what it does not hold is the RAM tier's access, so each tier sees the misses of the nearer one, and an
expert that moved up ages out below. Nothing is ever written back: experts never change.

For each expert that the device does not hold, one rule decides: with many tokens it is copied and computed on the
device, with few it is computed where it lies (Fiddler, arXiv 2402.07033). Beside those computed in RAM, as many are
*promoted* - copied for the next time - as the link carries meanwhile, if the policy wants them.

So *where* an expert is computed follows from what the device holds, and the two places round differently. With
``copy_from`` 1 everything is computed on the device, and results do not depend on any budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moei_core.cache.expert_cache import CacheStatistics, ExpertCache
from moei_core.predict.base import ExpertPredictor
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
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
    ) -> None:
        """All by layer. copy_from: tokens from which an absent expert is copied and computed on the device; 1: always.

        promote_share: experts that the link carries while RAM computes one.
        """
        self.cache = cache
        self._num_experts = num_experts
        self._copy_from, self._promote_share = copy_from, promote_share
        self._credit = 0.0

    def plan(self, access: LayerAccess) -> tuple[DevicePlan, LayerAccess]:
        """What the device does, and the part of ``access`` that is left to RAM."""
        layer = access.layer
        keys = layer_keys(layer, self._num_experts[layer])
        hits, misses = self.cache.touch(access, keys)
        counts = dict(zip(access.experts, access.token_counts, strict=True))
        least = self._copy_from[layer]
        copy = [key for key in misses if counts[key.expert] >= least]
        in_ram = [key for key in misses if counts[key.expert] < least]
        excluded: set[ExpertKey] = {*hits, *copy}
        evict: list[ExpertKey] = []
        release: list[ExpertKey] = []
        for key in copy:
            stays, evicted = self.cache.place(key, excluded)
            evict += evicted
            if not stays:
                release.append(key)
        plan = DevicePlan(tuple(hits), tuple(evict), tuple(copy), tuple(release))
        if in_ram:
            plan = self._promote(plan, access, in_ram, excluded)
        absent = {key.expert for key in misses}
        if not hits:
            return plan, access
        rest = [expert for expert in access.experts if expert in absent]
        return plan, replace(
            access,
            experts=tuple(rest),
            token_counts=tuple(counts[expert] for expert in rest),
            order=tuple(expert for expert in access.order if expert in absent),
        )

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
        return replace(plan, evict=tuple(evict), promote=tuple(promote))


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
        num_experts: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(cache, working_slots, predictor, mode, num_experts=num_experts)
        self.device = device
        self._nearer = device.cache

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

    def access(self, access: LayerAccess, routed: LayerAccess | None = None) -> FetchPlan:
        front, rest = self.device.plan(access)
        return replace(super().access(rest, access), device=front)

    def cancel_load(self, key: ExpertKey) -> None:
        """The planned bytes of ``key`` did not arrive: no tier holds it."""
        if key in self.device.cache:
            self.device.cache.drop(key)
        super().cancel_load(key)
