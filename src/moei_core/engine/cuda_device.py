"""A CUDA GPU as a ``Device``: two streams, events, and host memory page-locked where it lies."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from moei_core.engine.devices import Event, at_once
from moei_core.engine.recorded_operations import Recording

_RETAINED = 64 << 20
"""Bytes that the driver and torch's allocator may round up; what they hold beyond tensors is not ours to give."""


_HOST_NBYTES, _HOST_LEAST, _HOST_ALIGNED = 1 << 20, 256 << 10, 64
"""Page-locked bytes that are taken at once for what recordings bring to and from the host; that a piece may take."""


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class _GraphRecording:
    """A ``Recording`` of CUDA graphs that share one pool of memory.

    torch's own context for capturing waits for the whole device and empties its caches, once a piece.
    """

    def __init__(self, computes: torch.cuda.Stream, stream: torch.cuda.Stream) -> None:
        """computes: the model's own stream. stream: on which it is recorded."""
        self._computes, self._stream = computes, stream
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host = torch.empty(0, dtype=torch.uint8)

    def begin(self) -> None:
        if self._host.numel() < _HOST_LEAST:
            # Not while something is recorded: taking page-locked memory is nothing that can be done again.
            self._host = torch.empty(_HOST_NBYTES, dtype=torch.uint8, pin_memory=True)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.set_stream(self._stream)
        # Other threads may go on: this one alone launches what is recorded.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        graph, self._graph = self._graph, None
        assert graph is not None
        try:
            graph.capture_end()
        except RuntimeError:
            # torch would believe for ever that something is being recorded.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            raise
        finally:
            torch.cuda.set_stream(self._computes)
        return graph.replay

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._take(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def from_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        host = self._take(shape, dtype)
        host.zero_()
        return host, torch.empty(shape, dtype=dtype, device=self._stream.device).copy_(
            host, non_blocking=True
        )

    def call(self, work: Callable[[], None]) -> None:
        work()

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory that no other tensor has."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._host.numel():
            raise RuntimeError(f"{nbytes} bytes of a token would have to be brought to the host")
        taken, self._host = self._host[:nbytes], self._host[nbytes + -nbytes % _HOST_ALIGNED :]
        return taken.view(dtype).view(shape)

    def abandon(self) -> None:
        if self._graph is not None:
            # The error that ended the recording is the one to tell.
            with suppress(RuntimeError):
                self.end()


class CudaDevice:
    """One GPU of torch. Never synchronises the whole device: the host waits for single events.

    note: what a person should know about it, if anything.
    """

    def __init__(self, index: int = 0) -> None:
        """index: among those that torch sees. Raises: what torch raises for a GPU that does not work."""
        self.place = torch.device("cuda", index)
        self.make_current()
        # A product that is split over its columns is put together in float32: float16 could overflow there, and
        # bfloat16 would round once more than transformers' own products on a processor.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # The model's own stream: experts are computed between its layers. Asking torch for it takes 20 microseconds.
        self._computes = torch.cuda.default_stream(self.place)
        self._copies = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        # One for all recordings: products keep a workspace for every stream that they ever ran on.
        self._records = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        self._cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self.kernels, self.note = _kernels(self.place)

    def make_current(self) -> None:
        # Triton launches on the thread's device, whatever its arguments are on; so do events and page-locking.
        torch.cuda.set_device(self.place)

    def free_nbytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.place)
        held = torch.cuda.memory_reserved(self.place) - torch.cuda.memory_allocated(self.place)
        return max(0, free + held - _RETAINED)

    def held_nbytes(self) -> int:
        return torch.cuda.memory_allocated(self.place)

    def allocate(self, nbytes: int) -> torch.Tensor:
        # CUDA aligns to 512 bytes and more, and slots have whole pages: an expert's parts lie alike in every slot.
        return torch.empty(nbytes, dtype=torch.uint8, device=self.place)

    def release(self, nbytes: int) -> None:
        """Waits for the device, as the driver does whenever it takes memory back."""
        torch.cuda.empty_cache()

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
        return self.copy_together([(source, target, after)])

    def copy_together(self, copies: Sequence[tuple[memoryview, torch.Tensor, Event | None]]) -> Event:
        # What torch.cuda.stream() does takes longer than all the rest.
        torch.cuda.set_stream(self._copies)
        try:
            for source, target, after in copies:
                if after is not None:
                    assert isinstance(after, _CudaEvent)
                    self._copies.wait_event(after.event)
                target.copy_(torch.frombuffer(source, dtype=torch.uint8), non_blocking=True)
        finally:
            torch.cuda.set_stream(self._computes)
        return _CudaEvent(self._copies)

    def compute(self, work: Callable[[], None]) -> None:
        work()

    def compute_after(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self._computes.wait_event(event.event)

    def mark(self) -> Event:
        return _CudaEvent(self._computes)

    def read_back(
        self, *tensors: torch.Tensor, before_waiting: Callable[[], None] = at_once
    ) -> list[torch.Tensor]:
        found = [
            torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True)
            for one in tensors
        ]
        end = self.mark()
        before_waiting()
        end.wait()
        return found

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        # From page-locked memory: the driver may wait for the whole stream before it copies from any other. torch
        # keeps these few bytes until the copy is done.
        if not tensor.numel():
            return tensor.to(self.place)
        return tensor.contiguous().pin_memory().to(self.place, non_blocking=True)

    def finish(self, before_waiting: Callable[[], None] = at_once) -> None:
        """Nothing to do: the model computes on the same stream."""

    def record(self) -> Recording:
        return _GraphRecording(self._computes, self._records)

    def close(self) -> None:
        self._copies.synchronize()
        self._computes.synchronize()


def _kernels(place: torch.device) -> tuple[Any, str]:
    """(the fused kernels, or None where they do not run: then torch decodes and multiplies; why they do not).

    They are tried: triton compiles when a kernel is first used, which needs a C compiler, and a GPU that it knows.
    """
    try:
        kernels = importlib.import_module("moei_core.quant.triton_kernels")
        raw = torch.zeros(16 * 18, dtype=torch.uint8, device=place)
        found = kernels.decode("Q4_0", "plain", (16, 32), raw, torch.ones((16, 32), device=place))
        works = not bool(found.any())
    except ImportError:
        return None, ""
    except Exception as error:
        # What stops a compiler has any type and many lines.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return None, f"Fused GPU kernels do not run here, so torch decodes experts: {lines[-1][:200]}"
    return (
        (kernels, "")
        if works
        else (None, "Fused GPU kernels give wrong values here, so torch decodes experts.")
    )
