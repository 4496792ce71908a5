"""The cost model of the chain disk -> RAM -> GPU: carries out the plans of a ``TieredScheduler``.

Two compute lanes, the GPU's and the processor's, and two serial links. A layer ends when both lanes are done. As in the
engine there is one queue of copies, so a promotion that is under way delays the next copy, and an expert that is
still on its way when it is wanted is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping

from moei_core.sim.clock import Costs
from moei_core.sim.hardware import Hardware
from moei_core.sim.replay import Observer, PassAccesses
from moei_core.tiers import LinkCosts
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase


def link_costs(hardware: Hardware, ram_bandwidth: float) -> LinkCosts:
    """What the tier's rule is told about ``hardware``. ram_bandwidth: at which the processor computes experts."""
    return LinkCosts(hardware.link_bandwidth, hardware.link_latency, ram_bandwidth)


class TieredClock(Observer):
    """Advances time for each plan; for plans that never prefetch."""

    def __init__(self, hardware: Hardware, ram_bandwidth: float, expert_nbytes: Mapping[int, int]) -> None:
        self.hardware, self._nbytes = hardware, dict(expert_nbytes)
        self._link = link_costs(hardware, ram_bandwidth)
        self.costs = Costs()
        self._now = self._disk_free = self._link_free = 0.0
        self._arrives: dict[ExpertKey, float] = {}
        self._started, self._stalled = 0.0, 0.0
        self._phase, self._tokens = Phase.DECODE, 1

    def begin_pass(self, one: PassAccesses) -> None:
        self._started, self._stalled = self._now, self.costs.stall_seconds
        self._phase, self._tokens = one.phase, one.tokens

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        device = plan.device
        assert device is not None and not plan.prefetch
        nbytes = self._nbytes[access.layer]
        counts = dict(zip(access.experts, access.token_counts, strict=True))
        self._now += self.hardware.dense_seconds * max(1.0, self._tokens / self.hardware.batch_tokens)
        gate = gpu = cpu = self._now
        gpu_busy = cpu_busy = 0.0

        def on_gpu(key: ExpertKey) -> float:
            share = max(1.0, counts[key.expert] / self.hardware.batch_tokens)
            return nbytes / self.hardware.memory_bandwidth * share

        for key in device.hits:
            gpu = max(gpu, self._arrives.pop(key, 0.0)) + on_gpu(key)
            gpu_busy += on_gpu(key)
        may_load = gate
        for wave in plan.waves:
            ready = {key: self._read(nbytes, may_load) for key in wave.load}
            for key in wave.compute:
                there = ready.get(key, gate)
                if key in device.copy:
                    gpu = max(gpu, self._copy(nbytes, there)) + on_gpu(key)
                    gpu_busy += on_gpu(key)
                    continue
                if key in device.promote:
                    self._arrives[key] = self._copy(nbytes, there)
                seconds = self._link.ram_seconds(nbytes, counts[key.expert])
                cpu = max(cpu, there) + seconds
                cpu_busy += seconds
            if wave.load:
                # The working set is full until these are computed.
                may_load = max(gpu, cpu)
        self._now = max(gpu, cpu)
        self.costs.stall_seconds += self._now - gate - max(gpu_busy, cpu_busy)

    def _read(self, nbytes: int, start: float) -> float:
        """When an expert is in RAM whose read may begin at ``start``."""
        machine = self.hardware
        self._disk_free = max(self._disk_free, start) + machine.disk_latency + nbytes / machine.disk_bandwidth
        self.costs.disk_nbytes += nbytes
        self.costs.loads += 1
        return self._disk_free

    def _copy(self, nbytes: int, start: float) -> float:
        """When an expert is on the GPU that is in RAM at ``start``."""
        self._link_free = max(self._link_free, start) + self._link.copy_seconds(nbytes)
        self.costs.link_nbytes += nbytes
        return self._link_free

    def end_pass(self) -> tuple[float, float]:
        costs, seconds = self.costs, self._now - self._started
        costs.seconds += seconds
        costs.tokens += self._tokens
        if self._phase is Phase.DECODE:
            costs.decode_seconds += seconds
            costs.decode_tokens += self._tokens
        return costs.stall_seconds - self._stalled, seconds
