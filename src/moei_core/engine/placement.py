"""Which device a model runs on, what of it goes there, and what crossing the link costs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import torch

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies.base import CachePolicy
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.device_waits import DeviceWaits
from moei_core.engine.devices import Device
from moei_core.engine.expert_compute import HeldExpert
from moei_core.engine.layer_work import Choice
from moei_core.engine.native_compute import native_experts
from moei_core.engine.statistics import RuntimeStatistics
from moei_core.engine.threads import physical_cores
from moei_core.engine.tiered_work import TieredWork
from moei_core.errors import UsageError
from moei_core.hardware.budget import DEVICE_MARGIN, DeviceBudget
from moei_core.hardware.pressure import MemoryGovernor
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.bandwidth import make_buffer, read_bandwidth
from moei_core.hardware.system import MemoryFacts, Pressure
from moei_core.store.base import ExpertLayout
from moei_core.tiers import DeviceTier, LinkCosts
from moei_core.types import ExpertKey, ModelSpec

DEVICES = ("auto", "cpu", "cuda", "cuda:1")
"""What ``--device`` may say; any number. ``auto`` and ``cuda`` are the first GPU of torch."""

MISSES = ("auto", "copy")
"""What becomes of an expert that the device does not hold: what costs less, or always a copy."""

_COPIES = 8
_CALLS, _PAUSE_S = 9, 1e-3
_THROUGH, _MOST_SLOTS = 256 << 20, 32
"""Bytes of slots to go through, more than most caches hold, and slots at most: the system locks each by itself."""
_BUFFER = 64 << 20
_LOOKS_S = 0.1
"""Asking a driver for free memory takes longer than asking the kernel."""


def open_device(name: str, vram: int | None, misses: str) -> tuple[Device | None, str]:
    """(the device called ``name`` of ``DEVICES``, None: the processor alone; what a person should know about it).

    Raises: UsageError for what does not exist, and for settings of a device that is not there.
    """
    if name not in DEVICES and not re.fullmatch(r"cuda:\d{1,3}", name):
        raise UsageError(f"There is no device '{name}'.", hint=f"Choose from: {', '.join(DEVICES)}.")
    if misses not in MISSES:
        raise UsageError(
            f"--misses {misses}: there is no such way.", hint=f"Choose from: {', '.join(MISSES)}."
        )
    if name != "cpu" and torch.cuda.is_available():
        return _open_cuda(name, insists=name != "auto" or vram is not None or misses != "auto")
    given = {
        f"--device {name}": name.startswith("cuda"),
        "--vram": vram is not None,
        "--misses": misses != "auto",
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError(
            f"{option} needs a GPU, and {'--device cpu rules it out' if name == 'cpu' else 'torch finds none'}.",
            "" if name == "cpu" else "Either there is none, or this installation of torch is without CUDA.",
            "Leave it out to run on the processor.",
        )
    return None, ""


def _open_cuda(name: str, insists: bool) -> tuple[Device | None, str]:
    from moei_core.engine.cuda_device import CudaDevice

    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)]
    if index >= count:
        raise UsageError(
            f"There is no GPU {name}.",
            f"torch sees {', '.join(names)}.",
            "CUDA_VISIBLE_DEVICES may hide others, and numbers those that it names from 0.",
        )
    try:
        device = CudaDevice(index)
    except (RuntimeError, AssertionError) as error:
        # A driver that is too old, a GPU in exclusive use, an architecture that this torch was not built for.
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        if insists:
            raise UsageError(f"{names[index]} does not work.", f"{reason}.", "Try --device cpu.") from error
        return None, f"The GPU is not used: {reason}."
    others = [one for i, one in enumerate(names) if i != index]
    note = [device.note] if device.note else []
    if others:
        note.append(f"One GPU is used, {names[index]}; not used: {', '.join(others)} (--device chooses).")
    return device, " ".join(note)


def device_tier(
    budget: DeviceBudget, policy: CachePolicy, spec: ModelSpec, misses: str, costs: LinkCosts
) -> DeviceTier:
    """The brain's part. misses: of ``MISSES``."""
    nbytes: Mapping[int, int] = spec.expert_nbytes
    return DeviceTier(
        ExpertCache(budget.resident, policy),
        spec.num_experts,
        {layer: 1 if misses == "copy" else costs.copy_from(size) for layer, size in nbytes.items()},
        {layer: costs.promote_share(size) for layer, size in nbytes.items()},
        budget.prefetch,
    )


def device_governor(device: Device, budget: DeviceBudget, slots: DeviceSlots) -> MemoryGovernor:
    """What gives device slots back when other programs take the device's memory, and takes them again.

    The dense model, its context and its workspace are allocated as they are needed: what of them is still to come is
    not free.
    """
    beside_slots = sum(line.nbytes for line in budget.lines[:3])

    def memory() -> MemoryFacts:
        to_come = max(0, beside_slots - (device.held_nbytes() - slots.nbytes))
        return MemoryFacts(0, max(0, device.free_nbytes() - to_come), 0, 0, None)

    return MemoryGovernor(
        slots.slots,
        min(slots.slots, budget.prefetch + slots.block_slots),
        slots.slot_nbytes,
        memory,
        lambda: Pressure(None, 0),
        reserve=DEVICE_MARGIN // 2,
        interval=_LOOKS_S,
        block=slots.block_slots,
    )


def measure_costs(
    device: Device,
    slots: DeviceSlots,
    pool: LinkedSlotPool,
    module: Any,
    layout: ExpertLayout,
    spec: ModelSpec,
) -> LinkCosts:
    """What the link can do, and the processor with experts in RAM; on this model's slots, in a fraction of a second.

    Both with half a token's experts at once: waiting for the link, like waking threads and bringing what they computed
    to the device, is paid once a layer. Launching what computes copies is not counted: that is recorded
    (``TokenExperts``). module, layout: of one expert of the model.
    """
    together = max(2, spec.num_experts_per_tok // 2)
    slot = pool.take()
    source, nbytes = pool.view(slot)[: layout.slot_nbytes], layout.slot_nbytes
    target = slots.bytes_of(slots.take(stays=False), nbytes)
    device.copy_in(source, target, None).wait()  # the first one pays for set-up

    def seconds(count: int) -> float:
        taken = []
        for _ in range(_COPIES):
            started = time.perf_counter()
            device.copy_together([(source, target, None)] * count).wait()
            taken.append(time.perf_counter() - started)
        return sorted(taken)[_COPIES // 2]

    once, several = seconds(1), seconds(together)
    pool.give_back(slot)
    each = several / together
    further = min(each, max(each / 2, (several - once) / (together - 1)))
    return LinkCosts(nbytes / further, each - further, _ram_bandwidth(device, pool, module, layout, spec))


def _ram_bandwidth(
    device: Device, pool: LinkedSlotPool, module: Any, layout: ExpertLayout, spec: ModelSpec
) -> float:
    """Bytes a second of experts with one token each, computed in RAM and brought to the device, half a token's at once.

    Between two layers the threads have gone to sleep: waking them is most of what small experts take.
    """
    kernel, together = native_experts(module, layout), max(1, spec.num_experts_per_tok // 2)
    count = min(pool.free, max(together, min(_MOST_SLOTS, _THROUGH // layout.slot_nbytes)))
    if kernel is None or not kernel.takes(1) or count < together:
        return read_bandwidth(make_buffer(_BUFFER), physical_cores(), Allowance(0.1)).value
    slots = [pool.take() for _ in range(count)]
    experts = [
        HeldExpert(ExpertKey(0, at % int(module.num_experts)), layout, pool.view(slot), pool.address(slot), 0)
        for at, slot in enumerate(slots)
    ]
    inputs = torch.zeros((1, spec.hidden_size))
    there, waits = device.bring(inputs), DeviceWaits(RuntimeStatistics())
    taken = []
    with torch.inference_mode():
        for call in range(_CALLS + 1):
            begin = call * together % (count - together + 1)
            chosen = experts[begin : begin + together]
            named = tuple(expert.key.expert for expert in chosen)
            index = torch.tensor([named])
            time.sleep(_PAUSE_S)
            started = time.perf_counter()
            choice = Choice.of(index, torch.ones(index.shape), named, int(module.num_experts))
            work = TieredWork(module, inputs, choice, lambda _: kernel, device, there, lambda _: None, waits)
            work.compute(chosen)
            device.read_back(work.total())
            taken.append(time.perf_counter() - started)
    for slot in slots:
        pool.give_back(slot)
    return together * layout.nbytes / sorted(taken[1:])[_CALLS // 2]
