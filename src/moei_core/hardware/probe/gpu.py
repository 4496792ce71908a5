"""How fast a GPU gets experts and answers, measured through torch. Tested against a fake ``GpuDevice``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.profile import CopySpeed, Figure, GpuProfile

EXPERT_SIZES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)


class GpuDevice(Protocol):
    """What is measured of a GPU. Every method does its work once, to the end, and returns its seconds."""

    def copy(self, nbytes: int, pinned: bool) -> float:
        """Bring ``nbytes`` from RAM, page-locked or ordinary."""

    def read(self, nbytes: int) -> float:
        """Read ``nbytes`` of the GPU's own memory."""

    def launch(self) -> float:
        """Start the smallest kernel and wait for it."""

    def read_back(self) -> float:
        """Bring one number that the GPU has just computed to the CPU."""


class TorchGpu:
    """A CUDA device of torch. Holds its buffers only while it lives."""

    def __init__(self, index: int) -> None:
        """Raises: whatever torch raises for a device that does not work."""
        import torch

        self._torch: Any = torch
        self._device = torch.device("cuda", index)
        self._host: dict[tuple[int, bool], Any] = {}
        self._target = torch.empty(max(EXPERT_SIZES), dtype=torch.uint8, device=self._device)
        self._one = torch.zeros(1, device=self._device)
        self.launch()

    def _timed(self, work: Callable[[], object]) -> float:
        self._torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        work()
        self._torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    def copy(self, nbytes: int, pinned: bool) -> float:
        key = (nbytes, pinned)
        if key not in self._host:
            host = self._torch.zeros(nbytes, dtype=self._torch.uint8)
            self._host[key] = host.pin_memory() if pinned else host
        source, target = self._host[key], self._target[:nbytes]
        return self._timed(lambda: target.copy_(source, non_blocking=pinned))

    def read(self, nbytes: int) -> float:
        data = self._target[: nbytes // 4 * 4].view(self._torch.float32)
        return self._timed(data.sum)

    def launch(self) -> float:
        return self._timed(lambda: self._one.add_(1))

    def read_back(self) -> float:
        self._torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        self._one.item()
        return time.perf_counter() - started


def torch_gpu(facts: GpuFacts) -> GpuDevice:
    """The device of torch that is NVML's ``facts``. Raises: RuntimeError with the reason if torch cannot use it.

    Found by its UUID: NVML counts by place on the bus, CUDA the fastest first, and CUDA_VISIBLE_DEVICES counts anew.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("this installation of torch has no CUDA")
    for index in range(torch.cuda.device_count()):
        # torch leaves out the kind: GPU- or MIG-.
        if facts.uuid.partition("-")[2] == str(torch.cuda.get_device_properties(index).uuid).removeprefix(
            "GPU-"
        ):
            return TorchGpu(index)
    if facts.mig and torch.cuda.device_count() == 1:
        return TorchGpu(0)  # a process sees one slice at most, which some drivers give its board's UUID
    raise RuntimeError("torch does not see it (CUDA_VISIBLE_DEVICES?)")


def probe_gpu(
    facts: GpuFacts, open_device: Callable[[GpuFacts], GpuDevice] = torch_gpu, repeats: int = 10
) -> GpuProfile:
    """Measure the GPU of ``facts``. One that cannot be used has a note that says why."""
    try:
        device = open_device(facts)
        copies = []
        for nbytes in EXPERT_SIZES:
            if facts.free is not None and 2 * nbytes > facts.free:
                break
            pinned, pageable = (
                _bandwidth(nbytes, lambda kind=kind, size=nbytes: device.copy(size, kind), repeats)  # type: ignore[misc]
                for kind in (True, False)
            )
            copies.append(CopySpeed(nbytes, pinned, pageable))
        largest = copies[-1].nbytes if copies else EXPERT_SIZES[0]
        return GpuProfile(
            facts,
            tuple(copies),
            _bandwidth(largest, lambda: device.read(largest), repeats),
            Figure.of([device.launch() for _ in range(repeats)]),
            Figure.of([device.read_back() for _ in range(repeats)]),
        )
    except Exception as error:
        # A driver, a library or another process's memory may stop this in any way; the rest still counts.
        text = ""
        with suppress(Exception):
            text = " ".join(str(error).split())
        return GpuProfile(facts, note=text[:200] or type(error).__name__)


def _bandwidth(nbytes: int, work: Callable[[], float], repeats: int) -> Figure:
    work()  # the first one pays for set-up
    return Figure.of([nbytes / max(work(), 1e-9) for _ in range(repeats)])
