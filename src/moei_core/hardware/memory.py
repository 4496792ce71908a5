"""Memory of this process and of the machine, as the kernel counts it. All values in bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from moei_core.hardware.system import read_memory


def _status_field(name: str) -> int | None:
    """A ``/proc/self/status`` field in bytes; None where there is no such file or field."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None


def resident_memory() -> int:
    """What this process holds in RAM now, shared libraries included."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most that this process has held in RAM so far."""
    peak = _status_field("VmHWM")
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def available_memory() -> int:
    """What can still be taken without swapping, on the machine and in this process's memory cgroup."""
    return read_memory().usable
