"""Measuring this machine, in under a minute. The only part of ``hardware`` that knows torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.machine import Machine
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.bandwidth import make_buffer, read_bandwidth
from moei_core.hardware.probe.disk import DiskEffort, DiskProbe
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
    """Seconds of all together, and what each part wants of them; they become shorter alike where that is too much.

    seconds: aimed at. A part that has begun is not broken off in the middle of a sample, so it may become a few more.
    moment: of looking at a disk once more, beside ``disk.seconds``; disks share ``disks``.
    """

    seconds: float = 45.0
    memory: float = 3.0
    kernels: float = 4.0
    disks: float = 16.0
    experts: float = 20.0
    framework: float = 6.0
    moment: float = 0.7
    disk: DiskEffort = field(default_factory=DiskEffort)
    buffer_nbytes: int = _BUFFER


_MOMENTS = 3
"""Before, between and after the other parts, a disk is looked at once more."""


def measure(
    machine: Machine,
    files: Mapping[str, Sequence[Path]] | None = None,
    framework: Callable[[Allowance], FrameworkCost | None] = lambda allowance: None,
    experts: Callable[
        [Allowance, Mapping[str, float]], tuple[ExpertSpeed, ...]
    ] = lambda allowance, disks: (),
    effort: Effort | None = None,
    progress: Progress = lambda what, done, total: None,
    open_gpu: Callable[[GpuFacts], GpuDevice] = torch_gpu,
    clock: Callable[[], float] = time.perf_counter,
) -> HardwareProfile:
    """Measure everything that can be measured. Leaves no file behind.

    files: weights of models by ``DiskFacts.number``. framework: measures what a token costs beside reading weights;
    experts: what experts cost, on one of the disks, whose bytes a second it is told by number. They are not of this
    package because they run the engine.
    """
    effort = effort or Effort()
    whole, spent = Allowance(effort.seconds, clock), processor_seconds()
    count = max(1, len(machine.disks))
    a_disk = min(effort.disk.seconds, effort.disks / count)
    moment = min(effort.moment, a_disk / 8)
    # What later parts want; each takes its share of the time that is left by then.
    wanted = effort.memory + effort.kernels + effort.experts + effort.framework
    wanted += len(machine.disks) * (a_disk + _MOMENTS * moment)
    threads = _thread_counts(machine.cpu)
    total = len(threads) + count_cells() + effort.disk.settings * len(machine.disks) + len(machine.gpus) + 2
    done = 0

    def part(seconds: float) -> Allowance:
        nonlocal wanted
        found = whole.part(seconds / wanted, seconds)
        wanted = max(wanted - seconds, 1e-9)
        return found

    def step(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    def look() -> None:
        for probe in probes:
            probe.sample(part(moment))

    notes = list(machine.notes)
    probes: list[DiskProbe] = []
    disks = []
    try:
        progress("disk", 0, total)
        for facts in machine.disks:
            writing = part(a_disk / 3)
            probes.append(DiskProbe(facts, (files or {}).get(facts.number, ()), effort.disk, writing))
        look()
        progress("memory", 0, total)
        buffer = make_buffer(min(effort.buffer_nbytes, machine.memory.usable // _BUFFER_SHARE))
        bandwidth = {}
        for number in threads:
            bandwidth[str(number)] = read_bandwidth(buffer, number, part(effort.memory / len(threads)))
            step("memory")
        kernels = probe_kernels(buffer, threads[-1], part(effort.kernels), lambda: step("products"))
        del buffer
        for probe in probes:
            probe.measure(part(a_disk * 2 / 3), lambda: step("disk"))
        gpus = []
        for gpu in machine.gpus:
            profile = probe_gpu(gpu, open_gpu)
            gpus.append(profile)
            if profile.note:
                notes.append(f"GPU {gpu.index} was not measured: {profile.note}.")
            step("GPU")
        progress("experts", done, total)
        expert_speeds = experts(part(effort.experts), {one.number: one.bandwidth for one in probes})
        step("experts")
        look()
        progress("a small model", done, total)
        cost = framework(part(effort.framework))
        look()
        step("a small model")
    finally:
        disks = [probe.finish() for probe in probes]
    for disk in disks:
        if disk.note:
            notes.append(f"The disk at {disk.facts.mount} was not measured: {disk.note}.")
    everybody, own = (now - before for now, before in zip(processor_seconds(), spent, strict=True))
    others = (everybody - own) / max(whole.spent, 1e-9)
    if others > _NOTICED:
        notes.append(f"Other programs used {others:.1f} processors meanwhile: measure again without them.")
    if machine.cpu.quota is not None and machine.cpu.quota < machine.cpu.cores:
        notes.append(f"The control group allows {machine.cpu.quota:g} processors of {machine.cpu.cores}.")
    return HardwareProfile(
        machine.fingerprint,
        datetime.now(UTC).isoformat(timespec="seconds"),
        round(whole.spent, 1),
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
