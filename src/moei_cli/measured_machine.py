"""The measured machine for the commands that need it: measuring, storing, finding it again."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moei_core.errors import UsageError
from moei_core.forecast.gpu import GpuSpeeds
from moei_core.hardware.disks import DiskFacts, read_disk
from moei_core.hardware.gpus import visible_gpus
from moei_core.hardware.profile import HardwareProfile, load_profile, save_profile

if TYPE_CHECKING:
    from moei_core.hardware.machine import Machine
    from moei_core.hardware.probe.allowance import Allowance
    from moei_core.hardware.profile import ExpertSpeed, FrameworkCost


def model_folders() -> list[Path]:
    """Where models are or could be: the Hugging Face cache, our packed stores, synthetic models."""
    from moei_core.hub.layout import default_cache_dir
    from moei_core.paths import cache_dir, data_dir

    return [default_cache_dir(), data_dir(), cache_dir()]


def weights_by_disk() -> dict[str, list[Path]]:
    """The weight files of the models on this machine, by the number of their disk."""
    from moei_core.errors import MoeiError
    from moei_core.hub.layout import weight_files
    from moei_core.hub.library import list_models

    found: dict[str, list[Path]] = defaultdict(list)
    for model in list_models():
        try:
            names = weight_files(model.folder)
        except (MoeiError, OSError):
            continue
        for name in names:
            path = (model.folder / name).resolve()
            found[read_disk(path.parent).number].append(path)
    return dict(found)


def stored_profile(folders: Sequence[Path] = ()) -> HardwareProfile | None:
    """The stored profile if it is of this machine as it is now, in milliseconds and without torch."""
    from moei_core.hardware.machine import read_machine

    profile = load_profile()
    if profile is None:
        return None
    known = [Path(disk.facts.folder) for disk in profile.disks]
    # A profile with more disks than are asked for still counts, one with fewer does not.
    asked = {read_disk(folder).number for folder in folders}
    if not asked <= {disk.facts.number for disk in profile.disks}:
        return None
    machine = read_machine(known)
    if machine.fingerprint != profile.fingerprint:
        return None
    # Speeds last; what memory there is, and how much a control group allows, does not.
    now = {facts.uuid: facts for facts in machine.gpus}
    gpus = tuple(replace(gpu, facts=now.get(gpu.facts.uuid, gpu.facts)) for gpu in profile.gpus)
    return replace(profile, memory=machine.memory, gpus=gpus)


def gpu_for(profile: HardwareProfile, name: str | None, vram: int | None) -> GpuSpeeds | None:
    """The figures of the GPU that ``--device`` means by ``name``; None if there is none, or it could not be measured.

    Raises: UsageError if one was asked for, by name or by ``vram``, that a forecast knows nothing of.
    """
    name, found = name or "auto", None
    if name != "cpu":
        number = int(name.partition(":")[2] or 0)
        seen = visible_gpus([gpu.facts for gpu in profile.gpus], os.environ.get("CUDA_VISIBLE_DEVICES"))
        chosen = seen[number : number + 1]
        found = GpuSpeeds.of(gpu for gpu in profile.gpus if gpu.facts in chosen)
    asked = f"--device {name}" if name.startswith("cuda") else "--vram" if vram is not None else ""
    if found is None and asked:
        raise UsageError(
            f"{asked} needs a GPU that was measured.",
            "None was when this machine was measured, or --device cpu rules it out.",
            "moei profile-hardware --again looks for it; leave the option out to plan without.",
        )
    return found


def measure_now(folders: Sequence[Path]) -> tuple[HardwareProfile, str]:
    """(a fresh profile, why it could not be stored or an empty string), with a progress bar."""
    from moei_cli import render
    from moei_core.hardware.machine import read_machine

    machine = read_machine(folders)
    with render.steps("Measuring this machine") as progress:
        profile = _measure(machine, progress)
    return profile, save_profile(profile)


def _measure(machine: Machine, progress: Callable[[str, int, int], None]) -> HardwareProfile:
    from moei_core.engine.expert_probe import ProbeEffort, measure_experts
    from moei_core.hardware.probe import measure

    notes: list[str] = []

    def experts(allowance: Allowance, bandwidths: Mapping[str, float]) -> tuple[ExpertSpeed, ...]:
        places = _expert_places(machine, bandwidths)
        for disk in places:
            room = min(machine.memory.usable // 8, disk.free // 10, ProbeEffort().nbytes)
            if found := measure_experts(Path(disk.folder), ProbeEffort(nbytes=room), allowance):
                if len(machine.disks) > 1:
                    notes.append(
                        f"Experts were measured on the disk at {disk.mount}, the fastest with room for them."
                    )
                return found
        notes.append("No disk has room to measure experts on: they are reckoned from products.")
        return ()

    profile = measure(machine, weights_by_disk(), _framework, experts, progress=progress)
    effort = ProbeEffort()
    wanted = len(effort.geometries) * len(effort.formats) * (1 + len(effort.tokens))
    if 0 < len(profile.experts) < wanted:
        missing = (
            f"{wanted - len(profile.experts)} of {wanted} settings of experts were left out: too little time."
        )
        notes.append(missing)
    return replace(profile, notes=(*profile.notes, *notes))


def _expert_places(machine: Machine, bandwidths: Mapping[str, float]) -> list[DiskFacts]:
    """The disks where experts could be written and read, the fastest that has room for all first.

    bandwidths: bytes a second by the disk's number. Of equal ones the first: where models are.
    """
    from moei_core.engine.expert_probe import ProbeEffort

    def rank(disk: DiskFacts) -> tuple[bool, float]:
        return disk.free // 10 < ProbeEffort().nbytes, -bandwidths.get(disk.number, 0.0)

    usable = (disk for disk in machine.disks if not disk.in_memory and not disk.read_only)
    return sorted((disk for disk in usable if os.access(disk.folder, os.W_OK)), key=rank)


def _framework(allowance: Allowance) -> FrameworkCost | None:
    """Measured on the bundled model; None where this installation has none."""
    from moei_core.engine.calibrate import measure_framework
    from moei_core.hub.resolve import bundled_folder

    folder = bundled_folder()
    return measure_framework(folder, allowance=allowance) if folder.is_dir() else None
