"""What other systems would do with the same accesses: closed rules, no brain, the same links, RAM and compute.

Each is a cost model of its own; tests check them against closed forms (streaming time = bytes / bandwidth).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from moei_core.sim.clock import Costs, RamTier
from moei_core.sim.hardware import Hardware
from moei_core.types import ExpertKey, LayerAccess, layer_keys


class Baseline(ABC):
    """Advances its own clock for each access; ``hits`` and ``misses`` count experts."""

    part_nbytes: int | None = None
    """Bytes of what is moved and kept as one; None: an expert."""

    def __init__(
        self, hardware: Hardware, num_experts: Mapping[int, int], nbytes: int, capacity: int
    ) -> None:
        """nbytes: of one expert. capacity: slots that the fast memory has for experts."""
        self.hardware, self.num_experts, self.nbytes, self.capacity = hardware, num_experts, nbytes, capacity
        self.layers = tuple(num_experts)
        self.position = {layer: i for i, layer in enumerate(self.layers)}
        self.costs = Costs()
        self.hits = self.misses = 0
        self.now = self.link_free = self.disk_free = 0.0
        self.ram = RamTier(hardware.ram_nbytes // (self.part_nbytes or nbytes) if hardware.has_gpu else 0)

    def move(self, parts: Sequence[Hashable], start: float, transfers: int) -> float:
        """Bring ``parts`` in by so many transfers; returns when the last byte is there. With a GPU they come from disk
        to VRAM as in ``clock.Links``: past RAM, and only over the link if RAM has them."""
        machine, costs, size = self.hardware, self.costs, self.part_nbytes or self.nbytes
        in_ram = sum(map(self.ram.read, parts)) if machine.has_gpu else 0
        arrived, absent = start, len(parts) - in_ram
        if absent:
            latencies = min(transfers, absent) * machine.disk_latency
            self.disk_free = max(self.disk_free, start) + latencies + absent * size / machine.disk_bandwidth
            arrived = self.disk_free
            costs.disk_nbytes += absent * size
        if machine.has_gpu:
            done = max(self.link_free, start) + transfers * machine.link_latency
            done += len(parts) * size / machine.link_bandwidth
            if absent:
                done = max(done, arrived + min(size, machine.chunk_nbytes) / machine.link_bandwidth)
            self.link_free = arrived = done
            costs.link_nbytes += len(parts) * size
        costs.loads += len(parts)
        costs.ram_hits += in_ram
        return arrived

    def wait(self, until: float) -> None:
        self.costs.stall_seconds += max(0.0, until - self.now)
        self.now = max(self.now, until)

    @abstractmethod
    def access(self, access: LayerAccess) -> None:
        """One layer of one pass."""

    def compute(self, access: LayerAccess) -> None:
        machine = self.hardware
        read = self.nbytes / machine.memory_bandwidth
        seconds = machine.dense_seconds + sum(
            read * max(1.0, count / machine.batch_tokens) for count in access.token_counts
        )
        self.costs.compute_seconds += seconds
        self.now += seconds

    def count(self, hits: int, misses: int) -> None:
        self.hits += hits
        self.misses += misses
        self.costs.demand_nbytes += misses * self.nbytes

    def end_pass(self, tokens: int) -> None:
        self.costs.tokens += tokens
        self.costs.decode_tokens += tokens
        self.costs.seconds = self.costs.decode_seconds = self.now


class ZeroInfinity(Baseline):
    """ZeRO-Infinity style (arXiv 2104.07857, section 6.2): streams all experts of the next layer meanwhile.

    Nothing is kept. The transfer of a layer begins when that of the layer before has ended and there are
    buffers for two layers, so a pass takes max(bytes / bandwidth, compute) once the pipeline is full.
    """

    def __init__(
        self, hardware: Hardware, num_experts: Mapping[int, int], nbytes: int, capacity: int
    ) -> None:
        super().__init__(hardware, num_experts, nbytes, capacity)
        self._arrives = self._stream(self.layers[0], 0.0)

    def _stream(self, layer: int, start: float) -> float:
        return self.move(layer_keys(layer, self.num_experts[layer]), start, 1)

    def access(self, access: LayerAccess) -> None:
        self.count(0, len(access.experts))
        self.wait(self._arrives)
        # This layer's experts are in one buffer; the other is free for the next layer from now on.
        following = self.layers[(self.position[access.layer] + 1) % len(self.layers)]
        self._arrives = self._stream(following, self.now)
        self.compute(access)


class UnifiedMemory(Baseline):
    """CUDA unified memory: 64 KiB faults whose prefetch doubles, least recently used 2 MiB blocks evicted.

    After a fault the driver's tree prefetch fills the smallest aligned half-full subtree, so reading a block
    from start to end costs faults of 64, 64, 128, ... KiB: six for 2 MiB. Each fault stalls the reader.
    """

    FAULT_NBYTES = 64 << 10
    BLOCK_NBYTES = part_nbytes = 2 << 20
    FAULT_SECONDS = 30e-6

    def __init__(
        self, hardware: Hardware, num_experts: Mapping[int, int], nbytes: int, capacity: int
    ) -> None:
        super().__init__(hardware, num_experts, nbytes, capacity)
        self._blocks: dict[int, None] = {}
        self._limit = max(1, capacity * nbytes // self.BLOCK_NBYTES)
        starts, at = {}, 0
        for layer, count in num_experts.items():
            starts[layer] = at
            at += count * nbytes
        self._starts = starts

    @classmethod
    def faults_of_block(cls) -> int:
        """How many faults a sequential read of one absent block takes."""
        present, faults = 0, 0
        while present < cls.BLOCK_NBYTES:
            present = max(2 * present, cls.FAULT_NBYTES)
            faults += 1
        return faults

    def access(self, access: LayerAccess) -> None:
        hits = 0
        for expert in access.experts:
            start = self._starts[access.layer] + expert * self.nbytes
            absent: list[int] = []
            for block in range(
                start // self.BLOCK_NBYTES, (start + self.nbytes - 1) // self.BLOCK_NBYTES + 1
            ):
                if block in self._blocks:
                    del self._blocks[block]
                else:
                    absent.append(block)
                    if len(self._blocks) >= self._limit:
                        del self._blocks[next(iter(self._blocks))]
                self._blocks[block] = None
            hits += not absent
            if absent:
                faults = len(absent) * self.faults_of_block() * self.FAULT_SECONDS
                self.wait(self.move(absent, self.now, 0) + faults)
        self.count(hits, len(access.experts) - hits)
        self.compute(access)


class BrainStorm(Baseline):
    """BrainStorm style (OSDI 2023): the globally most likely experts of the next layer, each time.

    Each layer has an even share of the slots. While a layer computes, the next one's share is refilled with
    its most frequent experts so far; what is missing then is loaded on demand and not kept.
    """

    def __init__(
        self, hardware: Hardware, num_experts: Mapping[int, int], nbytes: int, capacity: int
    ) -> None:
        super().__init__(hardware, num_experts, nbytes, capacity)
        self._counts = {layer: np.zeros(count, np.int64) for layer, count in num_experts.items()}
        self._share = max(1, capacity // len(self.layers))
        self._held: dict[int, set[int]] = {layer: set() for layer in self.layers}

    def access(self, access: LayerAccess) -> None:
        layer, held = access.layer, self._held[access.layer]
        counts = self._counts[layer]
        counts[list(access.experts)] += 1
        missing = [expert for expert in access.experts if expert not in held]
        self.count(len(access.experts) - len(missing), len(missing))
        if missing:
            self.wait(self._bring(layer, missing))
        following = self.layers[(self.position[layer] + 1) % len(self.layers)]
        likely = np.argsort(-self._counts[following], kind="stable")[: self._share].tolist()
        fresh = [expert for expert in likely if expert not in self._held[following]]
        if fresh:
            self.costs.prefetch_nbytes += len(fresh) * self.nbytes
            self._bring(following, fresh)
            self._held[following] = set(likely)
        self.compute(access)

    def _bring(self, layer: int, experts: Sequence[int]) -> float:
        return self.move([ExpertKey(layer, expert) for expert in experts], self.now, len(experts))


BASELINES: dict[str, type[Baseline]] = {
    "zero-infinity": ZeroInfinity,
    "unified-memory": UnifiedMemory,
    "brainstorm": BrainStorm,
}
"""Name to constructor(hardware, num_experts by layer, bytes of an expert, slots)."""
