"""Machines laid out as files, an NVML that answers what a test wants, and a GPU whose speeds are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moei_core.hardware.disks import DiskFacts
from moei_core.hardware.profile import (
    DiskProfile,
    ExpertSpeed,
    Figure,
    FrameworkCost,
    HardwareProfile,
    KernelSpeed,
    LayerCost,
    ReadSpeed,
)
from moei_core.hardware.system import CpuFacts, MemoryFacts

GIB = 1 << 30
MEMINFO = """MemTotal:       16384000 kB
MemFree:         2048000 kB
MemAvailable:    8192000 kB
Cached:          1024000 kB
SwapTotal:       4096000 kB
SwapFree:        4000000 kB
"""


def lay_out(root: Path, files: Mapping[str, str]) -> Path:
    """Write ``files`` (path below the root to text) and return the root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


class NVMLError(Exception):
    """What the bindings raise."""


class NVMLError_LibraryNotFound(NVMLError):
    """No driver on this machine. The name is the bindings'."""


class FakeNvml:
    """boards: one dict a GPU; a missing key is a question that the driver refuses."""

    def __init__(self, boards: list[dict[str, Any]], start: Exception | None = None) -> None:
        self._boards, self._start = boards, start
        self.open = 0

    def nvmlInit(self) -> None:
        if self._start is not None:
            raise self._start
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self._boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if self._boards[index].get("lost"):
            raise NVMLError("GPU is lost")
        return self._boards[index]

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> list[int]:
        return [1, 1] if "slices" in handle else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], number: int) -> Any:
        return _answer(dict(enumerate(handle["slices"])), number)

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:
        total, free = _answer(handle, "memory")
        return SimpleNamespace(total=total, free=free)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> list[Any]:
        return [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in _answer(handle, "processes")]

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> Any:
        return _answer(handle, "capability")

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> Any:
        return _answer(handle, "name")

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> Any:
        return _answer(handle, "uuid")

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: dict[str, Any]) -> Any:
        return _answer(handle, "pcie")[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: dict[str, Any]) -> Any:
        return _answer(handle, "pcie")[1]


def _answer(known: Mapping[Any, Any], question: Any) -> Any:
    if question not in known:
        raise NVMLError("Not Supported")
    return known[question]


class FakeGpu:
    """Copies at 12 GB/s pinned and 6 ordinary, reads at 300 GB/s, launches in 8 us, answers in 20 us."""

    def copy(self, nbytes: int, pinned: bool) -> float:
        return nbytes / (12e9 if pinned else 6e9)

    def read(self, nbytes: int) -> float:
        return nbytes / 300e9

    def launch(self) -> float:
        return 8e-6

    def read_back(self) -> float:
        return 20e-6


def exactly(value: float) -> Figure:
    """A figure without spread."""
    return Figure(value, value, value)


def made_profile(
    *,
    memory_bandwidth: float = 20e9,
    disk_bandwidth: float = 1e9,
    available: int = 20 * GIB,
    kernel_share: float = 0.6,
    rows_free: float = 16.0,
    layer: float = 1e-3,
    experts: tuple[ExpertSpeed, ...] = (),
) -> HardwareProfile:
    """A machine of round numbers. rows_free: inputs that a product serves in the time of reading its matrix."""
    facts = DiskFacts("/", "/", "ext4", "/dev/sda", "8:0", False, False, "", 500 * GIB, 200 * GIB)
    reads = tuple(
        ReadSpeed(nbytes, depth, exactly(disk_bandwidth), exactly(nbytes / disk_bandwidth))
        for nbytes in (1 << 20, 16 << 20)
        for depth in (1, 4)
    )
    kernels = tuple(
        KernelSpeed(
            "bf16",
            "torch",
            nbytes,
            rows,
            2,
            exactly(nbytes / (memory_bandwidth * kernel_share) * max(1.0, rows / rows_free)),
        )
        for nbytes in (3 << 20, 112 << 20)
        for rows in (1, 16, 256)
    )
    return HardwareProfile(
        "fingerprint",
        "2026-01-01T00:00:00+00:00",
        40.0,
        MemoryFacts(24 * GIB, available, 0, 0, None),
        CpuFacts("a processor", 2, None, ("avx2",)),
        {"1": exactly(memory_bandwidth / 2), "2": exactly(memory_bandwidth)},
        (DiskProfile(facts, True, "a file", reads, reads[1::2], exactly(disk_bandwidth)),),
        (),
        kernels,
        experts,
        FrameworkCost(
            (LayerCost(0, layer, 2 * layer),), 1e-3, 5e-5, layer, 1e-4, 2e-8, 0.0, 400 << 20, "a test"
        ),
    )
