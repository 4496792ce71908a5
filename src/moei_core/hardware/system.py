"""What the kernel says about memory and processors: facts, read from ``/proc`` and ``/sys``. Sizes in bytes.

Every reader takes the root of the file tree, so a test can lay out a container, an old kernel or an empty
machine as files. What cannot be read is None or 0, never an error: the next number still can be.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path("/")
_MEMINFO = {"MemTotal", "MemAvailable", "MemFree", "Cached", "SwapTotal", "SwapFree"}
_NO_LIMIT = 1 << 60
"""Control groups of version 1 write "no limit" as a huge number of whole pages."""


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest memory limit among this process's control groups.

    used excludes file pages that the kernel would give back first (``inactive_file``).
    """

    version: int
    path: str
    limit: int
    used: int

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Memory of the machine, and of the control group if that is limited."""

    total: int
    available: int
    swap_total: int
    swap_free: int
    cgroup: CgroupMemory | None

    @property
    def usable(self) -> int:
        """What can still be taken without swapping."""
        return self.available if self.cgroup is None else min(self.available, self.cgroup.free)

    @property
    def reason(self) -> str:
        """Where ``usable`` comes from."""
        if self.cgroup is not None and self.cgroup.free < self.available:
            return f"what the control group's limit (v{self.cgroup.version}) leaves"
        return "what the system can give without swapping"


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """cores: that this process may use. quota: processors' worth of time that its control group allows."""

    model: str
    cores: int
    quota: float | None
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pressure:
    """Signs that memory is short.

    stall: share of the last 10 seconds in which some task waited for memory (PSI), None where the kernel does
    not count it. major_faults: of this process, so far.
    """

    stall: float | None
    major_faults: int


def read_memory(root: Path = ROOT) -> MemoryFacts:
    """The memory facts now. Where there is no ``/proc/meminfo``, psutil's."""
    fields = _fields(root / "proc/meminfo", _MEMINFO)
    if not fields and root == ROOT:
        import psutil

        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        return MemoryFacts(memory.total, memory.available, swap.total, swap.free, None)
    total = fields.get("MemTotal", 0)
    # Kernels before 3.14 have no MemAvailable; free and file pages are near it.
    guess = fields.get("MemFree", 0) + fields.get("Cached", 0)
    return MemoryFacts(
        total,
        fields.get("MemAvailable", guess),
        fields.get("SwapTotal", 0),
        fields.get("SwapFree", 0),
        _cgroup_memory(root),
    )


def _fields(path: Path, names: Container[str]) -> dict[str, int]:
    """``Name:  123 kB`` lines of these names, in bytes."""
    found = {}
    for line in _lines(path):
        name, _, value = line.partition(":")
        if name in names:
            with suppress(ValueError, IndexError):
                found[name] = int(value.split()[0]) << (10 if value.rstrip().endswith("kB") else 0)
    return found


def _lines(path: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return _text(path).splitlines()
    return []


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(_text(path))
    return None


def _text(path: Path) -> str:
    """A small file, by few calls: each of them lets go of the interpreter's lock, and others are waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        pieces = []
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
    finally:
        os.close(descriptor)
    return b"".join(pieces).decode()


def _groups(root: Path, controller: str) -> tuple[tuple[int, Path], ...]:
    """(version, folder) of this process's control groups for ``controller``, from the innermost outwards."""
    return _folders(root, controller, tuple(_lines(root / "proc/self/cgroup")))


@lru_cache(maxsize=8)
def _folders(root: Path, controller: str, groups: tuple[str, ...]) -> tuple[tuple[int, Path], ...]:
    """groups: lines of ``/proc/self/cgroup``. As long as they stay the same, so do their folders."""
    return tuple(_find_folders(root, controller, groups))


def _find_folders(root: Path, controller: str, groups: Iterable[str]) -> Iterator[tuple[int, Path]]:
    base = root / "sys/fs/cgroup"
    for line in groups:
        with suppress(ValueError):
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            version = 1 if controllers else 2
            tops = [base / controllers, base / controller] if version == 1 else [base, base / "unified"]
            for top in tops:
                # Inside a container the path may be the host's: then the top itself is the group.
                inner = top / path.lstrip("/")
                while inner != top:
                    if inner.is_dir():
                        yield version, inner
                    inner = inner.parent
                if top.is_dir():
                    yield version, top


def _cgroup_memory(root: Path) -> CgroupMemory | None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    found: list[CgroupMemory] = []
    for version, folder in _groups(root, "memory"):
        limit_name, used_name, reclaimable_name = names[version]
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is None or used is None or limit >= _NO_LIMIT:
            continue
        reclaimable = 0
        for line in _lines(folder / "memory.stat"):
            name, _, value = line.partition(" ")
            if name == reclaimable_name and value.strip().isdigit():
                reclaimable = int(value)
        path = "/" + str(folder.relative_to(root))
        found.append(CgroupMemory(version, path, limit, max(0, used - reclaimable)))
    return min(found, key=lambda group: group.free, default=None)


_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
)


def read_cpu(root: Path = ROOT) -> CpuFacts:
    """The processor facts now."""
    model, flags, count = "", "", 0
    for line in _lines(root / "proc/cpuinfo"):
        name, _, value = line.partition(":")
        name = name.strip()
        count += name == "processor"
        if name in ("model name", "Model") and not model:
            model = value.strip()
        elif name in ("flags", "Features") and not flags:
            flags = value
    present = set(flags.split())
    if root == ROOT:
        import platform

        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        model = model or platform.processor() or platform.machine()
    features = tuple(name for name in _FEATURES if name in present)
    return CpuFacts(model, max(1, count), _cpu_quota(root), features)


def _cpu_quota(root: Path) -> float | None:
    quotas: list[float] = []
    for version, folder in _groups(root, "cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()[:2]
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if quota.strip() not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def read_pressure(root: Path = ROOT) -> Pressure:
    """PSI of the control group if it has one, else of the machine; major faults of this process."""
    places = [folder / "memory.pressure" for version, folder in _groups(root, "memory") if version == 2]
    stall = None
    for path in (*places, root / "proc/pressure/memory"):
        for line in _lines(path):
            if line.startswith("some "):
                with suppress(ValueError, IndexError):
                    stall = float(line.split("avg10=")[1].split()[0]) / 100
        if stall is not None:
            break
    faults = 0
    for line in _lines(root / "proc/self/stat"):
        # The command's name, in parentheses, may hold blanks; fields are counted behind it.
        with suppress(ValueError, IndexError):
            faults = int(line.rpartition(")")[2].split()[9])
    return Pressure(stall, faults)
