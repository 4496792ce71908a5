"""Memory of this process and of the machine, as the kernel counts it. All values in bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


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
    available = int(psutil.virtual_memory().available)
    limit, used = (
        _cgroup("memory.max", "memory.limit_in_bytes"),
        _cgroup("memory.current", "memory.usage_in_bytes"),
    )
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _cgroup(v2: str, v1: str) -> int | None:
    """A number of this process's memory cgroup; None where there is none or no limit."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                return int(Path(f"/sys/fs/cgroup{path}", v2).read_text())
            if "memory" in controllers.split(","):
                return int(Path(f"/sys/fs/cgroup/memory{path}", v1).read_text())
    return None
