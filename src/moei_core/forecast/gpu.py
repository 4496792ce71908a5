"""The forecast with a GPU: the cost model of ``sim/tiered_clock.py`` in closed form.

A layer has two lanes. The GPU computes the experts that it holds, and those that are copied to it; meanwhile the
processor computes those in RAM, and those that arrive from disk. Whether what the GPU lacks is copied is the rule of
the engine's own tier (``LinkCosts``). What the GPU itself can multiply in a second is not measured, only its memory:
many rows are reckoned at ``_OPERATIONS_PER_BYTE``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from moei_core.config import PREFILL_CHUNK
from moei_core.forecast.formats import FORMATS, StorageFormat
from moei_core.forecast.parts import ExpertTimes, Parts
from moei_core.forecast.shape import ModelShape
from moei_core.forecast.speed import Speeds
from moei_core.hardware.budget import DeviceBudget, plan_device_slots, workspace_nbytes
from moei_core.hardware.profile import GpuProfile
from moei_core.tiers import LinkCosts

GPU_MODEL_ERROR = 0.3
"""How far this closed form may be off: it was compared with the simulator, and with one GPU in few cases."""

_OPERATIONS_PER_BYTE = 100
"""Of 16-bit products in the time in which the GPU's memory reads a byte: what matrix units of 2020 and later exceed."""
_LAUNCHES = 4
"""Kernels of a layer's experts on the GPU: two products, the activation, the sum."""
_RECORDED = 0.3
"""Of a layer whose dense part is launched from Python, the host's share where a token is recorded; bringing rows that
RAM computed takes as long again. From one machine with an H200: .45 and .5 of 1.7 ms."""
_DEVICE_FORMATS = frozenset({"f32", "bf16", "f16", "q8_0", "q4_0", "mxfp4"})


@dataclass(frozen=True, slots=True)
class GpuSpeeds:
    """A measured GPU. free: bytes that can be allocated now. bandwidth: of its memory. launch, read_back: seconds.

    copies: (bytes, seconds) of page-locked copies to it, ascending.
    """

    name: str
    free: int
    bandwidth: float
    launch: float
    read_back: float
    copies: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, gpus: Iterable[GpuProfile]) -> GpuSpeeds | None:
        """The first of ``gpus`` that was measured: the one that a chat uses. None if none was."""
        for gpu in gpus:
            if gpu.bandwidth and gpu.launch and gpu.read_back and gpu.copies and gpu.facts.free is not None:
                copies = tuple(sorted((one.nbytes, one.nbytes / one.pinned.value) for one in gpu.copies))
                figures = gpu.bandwidth.value, gpu.launch.value, gpu.read_back.value
                return cls(gpu.facts.name, gpu.facts.free, *figures, copies)
        return None

    def copy(self, nbytes: int) -> float:
        """Seconds of bringing ``nbytes`` there: on straight lines through what was measured, and beyond."""
        if len(self.copies) == 1 or nbytes <= self.copies[0][0]:
            size, seconds = self.copies[0]
            return seconds * nbytes / size
        pairs = list(pairwise(self.copies))
        (x0, y0), (x1, y1) = next((pair for pair in pairs if nbytes <= pair[1][0]), pairs[-1])
        return y0 + (y1 - y0) * (nbytes - x0) / (x1 - x0)

    def experts(self, form: StorageFormat, weights: int, count: float, tokens: float) -> float:
        """Seconds of ``count`` experts there with ``tokens`` tokens each."""
        if not count:
            return 0.0
        nbytes = float(form.nbytes(weights))
        if tokens > 16 and form.bits < 16:
            # Decoded to the model's own type first: written once and read once more.
            nbytes += 2 * 2 * weights
        return _LAUNCHES * self.launch + count * self._product(nbytes, weights, tokens)

    def dense(self, weights: int, rows: int) -> float:
        """Seconds of the products of ``rows`` inputs with so many 16-bit weights."""
        return self._product(2 * weights, weights, rows)

    def _product(self, nbytes: float, weights: float, rows: float) -> float:
        return max(nbytes, 2 * weights * rows / _OPERATIONS_PER_BYTE) / self.bandwidth


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """A GPU and what a model would have of it. rate: RAM's bytes a second, by which the engine decides about copies.

    always: what the GPU lacks is copied whatever it costs.
    """

    speeds: GpuSpeeds
    budget: DeviceBudget
    rate: float
    always: bool = False

    def copies(self, nbytes: int, tokens: float) -> bool:
        """Whether an expert with so many tokens that the GPU lacks is copied there."""
        if self.always:
            return True
        start, whole = self.speeds.copy(1), self.speeds.copy(nbytes)
        costs = LinkCosts(nbytes / max(whole - start, 1e-9), start, self.rate)
        return tokens >= costs.copy_from(nbytes)


def plan_gpu(
    shape: ModelShape,
    form: StorageFormat,
    speeds: Speeds,
    gpu: GpuSpeeds,
    context: int,
    vram: int | None = None,
) -> GpuPlan:
    """What the GPU would hold. Raises: DoesNotFitError if that is not even the dense part."""
    slot = shape.expert_nbytes(form)
    decoded = 3 * 4 * shape.expert_weights * 2 // 3 if form.bits < 16 else 0
    budget = plan_device_slots(
        shape.total_experts,
        slot,
        FORMATS["f32" if shape.dense_format.name == "f32" else "bf16"].nbytes(shape.dense_weights),
        shape.kv_nbytes_per_token * context,
        workspace_nbytes(shape.config, shape.top_k, context, 2, slot, shape.eager_attention) + decoded,
        gpu.free,
        vram,
        top_k=shape.top_k,
    )
    together = max(2, shape.top_k // 2)
    in_ram = ExpertTimes.of(shape, form, speeds, 1).computing(together, 0) + _brought(speeds)
    return GpuPlan(gpu, budget, together * slot / in_ram if in_ram else speeds.memory_bandwidth)


def _brought(speeds: Speeds) -> float:
    """Seconds that a layer takes longer if RAM computes some of its experts: their rows go to the GPU and are added."""
    return _RECORDED * speeds.framework.layer(0, native=False)


def can_compute(form: StorageFormat) -> bool:
    """Whether the engine has a GPU product for experts in ``form``."""
    return form.name in _DEVICE_FORMATS


def decode_on_gpu(
    shape: ModelShape,
    form: StorageFormat,
    speeds: Speeds,
    plan: GpuPlan,
    hits: tuple[float, float],
    position: int,
    bound: str,
) -> Parts:
    """Seconds of one token. hits: of lookups, in the GPU's memory, and there or in RAM. bound: of the disk's range."""
    gpu, cost, nbytes = plan.speeds, speeds.framework, shape.expert_nbytes(form)
    times = ExpertTimes.of(shape, form, speeds, 1)
    copies = plan.copies(nbytes, 1)
    disk = experts = beside = handling = 0.0
    for chance, here, in_ram, missing in _places(shape.top_k, *hits):
        reading = getattr(speeds.read(nbytes, missing), bound)
        if copies:
            computing = 0.0
            brought = gpu.copy(nbytes)
            # A copy of what is read last begins when it is there.
            arrived = max((in_ram + missing) * brought, reading + brought if missing else 0.0)
            # What the GPU holds is computed meanwhile, and what comes as it comes, but for the last.
            lane = max(gpu.experts(form, shape.expert_weights, here, 1), arrived)
            lane += gpu.experts(form, shape.expert_weights, min(1, in_ram + missing), 1)
            waiting = max(0.0, min(reading, lane - (in_ram + missing) * brought)) if missing else 0.0
        else:
            computing = times.computing(in_ram, missing)
            waiting = times.wait(in_ram, missing, reading)
            lane = gpu.experts(form, shape.expert_weights, here, 1)
            if in_ram or missing:
                computing += _brought(speeds)
        disk += chance * waiting
        experts += chance * computing
        beside += chance * max(0.0, lane - computing - waiting)
        handling += chance * missing * times.handling
    layers = shape.moe_layers
    dense = gpu.dense(shape.active_weights, 1) + position * shape.kv_nbytes_per_token / gpu.bandwidth
    framework = _RECORDED * shape.layers * cost.layer(0, native=False)
    framework += cost.token + cost.sampling * shape.vocab_size
    on_gpu = layers * (beside + gpu.read_back) + dense
    return Parts(layers * disk, layers * experts, 0.0, framework + layers * handling, on_gpu)


def prefill_on_gpu(
    shape: ModelShape,
    form: StorageFormat,
    speeds: Speeds,
    plan: GpuPlan,
    touched: float,
    absent: tuple[float, float],
    rows: int,
    before: int,
    bound: str,
) -> Parts:
    """Seconds of one pass over ``rows`` tokens of a prompt behind ``before`` others.

    touched: experts of a layer that it uses. absent: shares of them that the GPU lacks, and that RAM lacks as well.
    """
    gpu, cost, nbytes = plan.speeds, speeds.framework, shape.expert_nbytes(form)
    tokens = rows * shape.top_k / touched
    reading = getattr(speeds.read(nbytes, touched * absent[1]), bound)
    here, elsewhere = touched * (1 - absent[0]), touched * absent[0]
    if plan.copies(nbytes, tokens):
        computing = 0.0
        lane = max(elsewhere * gpu.copy(nbytes), gpu.experts(form, shape.expert_weights, touched, tokens))
    else:
        times = ExpertTimes.of(shape, form, speeds, tokens)
        missing = touched * absent[1]
        computing = times.computing(elsewhere - missing, missing)
        lane = gpu.experts(form, shape.expert_weights, here, tokens)
    # A layer takes as long as the longest of reading, the GPU's lane and the processor's.
    waiting = max(0.0, reading - max(lane, computing))
    beside = max(0.0, lane - computing)
    dense = gpu.dense(shape.active_weights - shape.head_weights, rows) + gpu.dense(shape.head_weights, 1)
    keys = (before + rows) * shape.kv_nbytes_per_token / gpu.bandwidth
    layers = shape.moe_layers
    return Parts(
        layers * waiting,
        layers * computing,
        0.0,
        shape.layers * cost.prefill_layer * max(1.0, rows / PREFILL_CHUNK) + cost.token,
        layers * (beside + gpu.read_back) + dense + keys,
    )


def _places(lookups: int, in_gpu: float, resident: float) -> Iterator[tuple[float, int, int, int]]:
    """(chance, experts in the GPU's memory, in RAM, on disk) of one layer's lookups."""
    shares = in_gpu, max(0.0, resident - in_gpu), max(0.0, 1 - max(resident, in_gpu))
    for here in range(lookups + 1):
        for in_ram in range(lookups - here + 1):
            missing = lookups - here - in_ram
            ways = math.comb(lookups, here) * math.comb(lookups - here, in_ram)
            chance = ways * shares[0] ** here * shares[1] ** in_ram * shares[2] ** missing
            if chance:
                yield chance, here, in_ram, missing
