"""Measuring this machine, in under a minute. The only part of ``hardware`` that knows torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.machine import Machine
from moei_core.hardware.probe.bandwidth import make_buffer, read_bandwidth
from moei_core.hardware.probe.disk import DiskEffort, probe_disk
from moei_core.hardware.probe.gpu import GpuDevice, probe_gpu, torch_gpu
from moei_core.hardware.probe.kernels import count_cells, probe_kernels
from moei_core.hardware.profile import ExpertSpeed, FrameworkCost, HardwareProfile
from moei_core.hardware.system import CpuFacts

Progress = Callable[[str, int, int], None]
"""Called with (what is being measured, steps done, steps in all)."""

_BUFFER = 1 << 30
_NOTICED = 0.25
"""Processors of other programs from which the figures are doubtful."""
_BUFFER_SHARE = 8
"""The probe takes at most an eighth of the memory that is free."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Seconds for each part. disks share theirs."""

    memory: float = 3.0
    kernels: float = 4.0
    disks: float = 18.0
    disk: DiskEffort = field(default_factory=DiskEffort)
    buffer_nbytes: int = _BUFFER


def measure(
    machine: Machine,
    files: Mapping[str, Sequence[Path]] | None = None,
    framework: Callable[[], FrameworkCost | None] = lambda: None,
    experts: Callable[[], tuple[ExpertSpeed, ...]] = lambda: (),
    effort: Effort | None = None,
    progress: Progress = lambda what, done, total: None,
    open_gpu: Callable[[GpuFacts], GpuDevice] = torch_gpu,
) -> HardwareProfile:
    """Measure everything that can be measured. Leaves no file behind.

    files: weights of models by ``DiskFacts.number``. framework: measures what a token costs beside reading
    weights; experts: what experts cost. They are not of this package because they run the engine.
    """
    effort = effort or Effort()
    started, spent = time.perf_counter(), processor_seconds()
    threads = _thread_counts(machine.cpu)
    settings = effort.disk.settings
    total = len(threads) + count_cells() + settings * len(machine.disks) + len(machine.gpus) + 2
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress("memory", 0, total)
    notes = list(machine.notes)
    buffer = make_buffer(min(effort.buffer_nbytes, machine.memory.usable // _BUFFER_SHARE))
    bandwidth = {}
    for count in threads:
        bandwidth[str(count)] = read_bandwidth(buffer, count, effort.memory / len(threads))
        step("memory")
    kernels = probe_kernels(buffer, threads[-1], effort.kernels, lambda: step("products"))
    del buffer
    disks = []
    for facts in machine.disks:
        share = replace(effort.disk, seconds=min(effort.disk.seconds, effort.disks / len(machine.disks)))
        disk = probe_disk(facts, (files or {}).get(facts.number, ()), share, lambda: step("disk"))
        disks.append(disk)
        if disk.note:
            notes.append(f"The disk at {facts.mount} was not measured: {disk.note}.")
    gpus = []
    for gpu in machine.gpus:
        profile = probe_gpu(gpu, open_gpu)
        gpus.append(profile)
        if profile.note:
            notes.append(f"GPU {gpu.index} was not measured: {profile.note}.")
        step("GPU")
    progress("experts", done, total)
    expert_speeds = experts()
    step("experts")
    progress("a small model", done, total)
    cost = framework()
    step("a small model")
    everybody, own = (now - before for now, before in zip(processor_seconds(), spent, strict=True))
    others = (everybody - own) / (time.perf_counter() - started)
    if others > _NOTICED:
        notes.append(f"Other programs used {others:.1f} processors meanwhile: measure again without them.")
    if machine.cpu.quota is not None and machine.cpu.quota < machine.cpu.cores:
        notes.append(f"The control group allows {machine.cpu.quota:g} processors of {machine.cpu.cores}.")
    return HardwareProfile(
        machine.fingerprint,
        datetime.now(UTC).isoformat(timespec="seconds"),
        round(time.perf_counter() - started, 1),
        machine.memory,
        machine.cpu,
        bandwidth,
        tuple(disks),
        tuple(gpus),
        tuple(kernels),
        expert_speeds,
        cost,
        tuple(notes),
    )


def processor_seconds() -> tuple[float, float]:
    """Processor time so far, of all programs of the machine and of this one."""
    everybody, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = everybody.idle + getattr(everybody, "iowait", 0.0)
    # A guest's time is part of the user's already.
    guests = getattr(everybody, "guest", 0.0) + getattr(everybody, "guest_nice", 0.0)
    return sum(everybody) - idle - guests, own.user + own.system


def _thread_counts(cpu: CpuFacts) -> list[int]:
    """1, 2, 4, ... and all cores, the last one being what the engine computes with."""
    counts = [1]
    while counts[-1] * 2 < cpu.cores:
        counts.append(counts[-1] * 2)
    return counts if cpu.cores == 1 else [*counts, cpu.cores]
