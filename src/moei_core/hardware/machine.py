"""``Machine``: the facts of this machine, read in milliseconds and without measuring anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moei_core.hardware.disks import DiskFacts, existing_parent, read_disk
from moei_core.hardware.gpus import GpuFacts, load_nvml, read_gpus
from moei_core.hardware.profile import fingerprint
from moei_core.hardware.system import CpuFacts, MemoryFacts, read_cpu, read_memory


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts of this machine before anything is measured."""

    memory: MemoryFacts
    cpu: CpuFacts
    disks: tuple[DiskFacts, ...]
    gpus: tuple[GpuFacts, ...]
    notes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.memory, self.cpu, self.disks, self.gpus)


def read_machine(folders: Sequence[Path], nvml: Any = None) -> Machine:
    """The facts, in milliseconds. folders: that hold models or could; one disk is counted once."""
    disks: dict[str, DiskFacts] = {}
    for folder in folders:
        facts = read_disk(existing_parent(folder))
        disks.setdefault(facts.number or facts.mount, facts)
    gpus, notes = read_gpus(load_nvml() if nvml is None else nvml, os.getpid())
    return Machine(read_memory(), read_cpu(), tuple(disks.values()), tuple(gpus), tuple(notes))
