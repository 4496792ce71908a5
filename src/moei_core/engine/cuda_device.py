"""A CUDA GPU as a ``Device``: two streams, events, and host memory page-locked where it lies."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from moei_core.engine.devices import Event

_RETAINED = 64 << 20
"""Bytes that the driver and torch's allocator may round up; what they hold beyond tensors is not ours to give."""


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class CudaDevice:
    """One GPU of torch. Never synchronises the whole device: the host waits for single events."""

    def __init__(self, index: int = 0) -> None:
        """Raises: what torch raises for a GPU that does not work."""
        self.place = torch.device("cuda", index)
        torch.cuda.set_device(self.place)
        self._copies = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        self.kernels = _kernels()
        self._cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    @property
    def _computes(self) -> torch.cuda.Stream:
        """The stream of the model: experts are computed between its layers."""
        return torch.cuda.current_stream(self.place)

    def free_nbytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.place)
        held = torch.cuda.memory_reserved(self.place) - torch.cuda.memory_allocated(self.place)
        return max(0, free + held - _RETAINED)

    def allocate(self, nbytes: int) -> torch.Tensor:
        # CUDA aligns to 512 bytes and more; slots begin at pages relative to this.
        return torch.empty(nbytes, dtype=torch.uint8, device=self.place)

    def register(self, address: int, nbytes: int) -> bool:
        # Our own mapping is locked in place: torch's pinned allocator would round its size up to a power of two.
        if int(self._cudart.cudaHostRegister(address, nbytes, 0)) == 0:
            return True
        with suppress(RuntimeError):
            # CUDA remembers the refusal and would blame the next kernel for it: this one takes the blame.
            torch.zeros(1, device=self.place)
        return False

    def unregister(self, address: int) -> None:
        self._cudart.cudaHostUnregister(address)

    def copy_in(self, source: memoryview, target: torch.Tensor, after: Event | None) -> Event:
        if after is not None:
            assert isinstance(after, _CudaEvent)
            self._copies.wait_event(after.event)
        with torch.cuda.stream(self._copies):
            target.copy_(torch.frombuffer(source, dtype=torch.uint8), non_blocking=True)
        return _CudaEvent(self._copies)

    def compute(self, work: Callable[[], None]) -> None:
        work()

    def compute_after(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self._computes.wait_event(event.event)

    def mark(self) -> Event:
        return _CudaEvent(self._computes)

    def read_back(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        found = [
            torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True)
            for one in tensors
        ]
        self.mark().wait()
        return found

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.place, non_blocking=True)

    def finish(self) -> None:
        """Nothing to do: the model computes on the same stream."""

    def close(self) -> None:
        self._copies.synchronize()


def _kernels() -> Any:
    """The fused kernels, or None where triton is missing: then torch decodes and multiplies."""
    try:
        return importlib.import_module("moei_core.quant.triton_kernels")
    except ImportError:
        return None
