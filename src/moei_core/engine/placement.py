"""Which device a model runs on, what of it goes there, and what crossing the link costs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies.base import CachePolicy
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.devices import Device
from moei_core.errors import UsageError
from moei_core.hardware.budget import DeviceBudget
from moei_core.hardware.probe.bandwidth import make_buffer, read_bandwidth
from moei_core.hardware.profile import load_profile
from moei_core.tiers import DeviceTier, LinkCosts
from moei_core.types import ModelSpec

DEVICES = ("auto", "cpu", "cuda")
MISSES = ("auto", "copy")
"""What becomes of an expert that the device does not hold: what costs less, or always a copy."""

_COPIES = 8
_BUFFER = 64 << 20


def open_device(name: str, vram: int | None, misses: str) -> Device | None:
    """The device called ``name`` of ``DEVICES``; None: the processor alone.

    Raises: UsageError for what does not exist, and for settings of a device that is not there.
    """
    if name not in DEVICES:
        raise UsageError(f"There is no device '{name}'.", hint=f"Choose from: {', '.join(DEVICES)}.")
    if misses not in MISSES:
        raise UsageError(
            f"--misses {misses}: there is no such way.", hint=f"Choose from: {', '.join(MISSES)}."
        )
    if name != "cpu" and torch.cuda.is_available():
        from moei_core.engine.cuda_device import CudaDevice

        return CudaDevice()
    given = {"--device cuda": name == "cuda", "--vram": vram is not None, "--misses": misses != "auto"}
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError(
            f"{option} needs a GPU, and {'--device cpu rules it out' if name == 'cpu' else 'torch finds none'}.",
            "" if name == "cpu" else "Either there is none, or this installation of torch is without CUDA.",
            "Leave it out to run on the processor.",
        )
    return None


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
    )


def measure_costs(device: Device, slots: DeviceSlots, pool: LinkedSlotPool, threads: int) -> LinkCosts:
    """What the link and the processor can do, measured on this model's slots in a fraction of a second."""
    slot = pool.take()
    view, nbytes = pool.view(slot), pool.slot_nbytes
    target = slots.bytes_of(slots.take(stays=False), nbytes)
    device.copy_in(view, target, None).wait()  # the first one pays for set-up

    def seconds(size: int) -> float:
        taken = []
        for _ in range(_COPIES):
            started = time.perf_counter()
            device.copy_in(view[:size], target[:size], None).wait()
            taken.append(time.perf_counter() - started)
        return sorted(taken)[_COPIES // 2]

    latency, whole = seconds(1), seconds(nbytes)
    pool.give_back(slot)
    profile = load_profile()
    figure = None if profile is None else profile.memory_bandwidth.get(str(threads))
    figure = figure or read_bandwidth(make_buffer(_BUFFER), threads, 0.1)
    return LinkCosts(nbytes / max(whole - latency, 1e-9), latency, figure.value)
