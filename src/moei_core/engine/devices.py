"""What computes beside the processor, with memory of its own: the interface, and a stand-in without a GPU.

A device has two queues, as CUDA has streams: one copies, one computes, each in order, neither waiting for the other
unless it is told to. Whoever uses a device says what must wait for what with events; the host itself waits only in
``Event.wait`` and ``read_back``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from moei_core.engine.recorded_operations import OperationRecording, Recording


class Event(Protocol):
    """A place in a queue."""

    def done(self) -> bool:
        """Whether everything before it has been done."""

    def wait(self) -> None:
        """Make the host wait until it is done."""


def at_once() -> None:
    """Nothing to do before waiting."""


class Device(Protocol):
    """Memory, a copying queue and a computing queue. One engine thread calls it.

    place: where torch makes tensors of its memory. kernels: the module ``moei_core.quant.triton_kernels`` if it runs
    there, else None. before_waiting: called when all is queued and only waiting is left.
    """

    place: torch.device
    kernels: Any

    def make_current(self) -> None:
        """What the calling thread computes from now on may be computed here. Before each forward pass."""

    def free_nbytes(self) -> int:
        """Bytes of its memory that can still be allocated, by the system's account: others may take some."""

    def held_nbytes(self) -> int:
        """Bytes of its memory that this process has allocated."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` of its memory, uint8. Raises: torch.OutOfMemoryError."""

    def release(self, nbytes: int) -> None:
        """``nbytes`` of ``allocate`` are not referred to any more: others may have them."""

    def register(self, address: int, nbytes: int) -> bool:
        """Page-lock host memory, so that copies from it need no processor. False: copies work, but slower."""

    def unregister(self, address: int) -> None:
        """Undo ``register``: the pages may then be given back."""

    def copy_in(self, source: memoryview, target: torch.Tensor, after: Event | None) -> Event:
        """Queue a copy of host bytes that begins when ``after`` is done.

        Until the event is done ``source`` must not change, and ``target`` must not be read.
        """

    def copy_together(self, copies: Sequence[tuple[memoryview, torch.Tensor, Event | None]]) -> Event:
        """``copy_in`` of several, in order; the event is that of the last. At least one."""

    def compute(self, work: Callable[[], None]) -> None:
        """Queue ``work``, torch operations on tensors of the device. What it raises may surface in ``finish``."""

    def compute_after(self, event: Event) -> None:
        """What is computed from now on waits for ``event``."""

    def mark(self) -> Event:
        """An event behind everything that is queued to be computed so far."""

    def read_back(
        self, *tensors: torch.Tensor, before_waiting: Callable[[], None] = at_once
    ) -> list[torch.Tensor]:
        """Bring tensors that the device has computed to the host, all in one wait, if it takes one."""

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small host tensor on the device, for what is computed from now on."""

    def finish(self, before_waiting: Callable[[], None] = at_once) -> None:
        """Results of ``compute`` may be used by torch operations from here on. Raises: what ``compute`` raised."""

    def record(self) -> Recording:
        """What can record computing, to be done again in no time."""

    def close(self) -> None:
        """End the queues, once they are empty."""


class _HostEvent:
    """An event of ``CpuDevice``."""

    def __init__(self) -> None:
        self._flag = threading.Event()

    def done(self) -> bool:
        return self._flag.is_set()

    def wait(self) -> None:
        self._flag.wait()

    def set(self) -> None:
        self._flag.set()


class _Queue(threading.Thread):
    """Does pieces of work in order. The first error stays until ``take_failure``; what follows is still done."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._failure: Exception | None = None
        self.start()

    def put(self, work: Callable[[], None] | None) -> None:
        self._work.put(work)

    def mark(self) -> _HostEvent:
        event = _HostEvent()
        self._work.put(event.set)
        return event

    def take_failure(self) -> Exception | None:
        failure, self._failure = self._failure, None
        return failure

    def run(self) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (work := self._work.get()) is not None:
                try:
                    work()
                except Exception as failure:
                    self._failure = self._failure or failure


class CpuDevice:
    """A device made of host memory and two threads, for machines without a GPU.

    It is as asynchronous as CUDA is: a copy reads its source late, and what is computed runs behind the engine's
    back. ``copy_delay``, ``compute_delay`` give seconds to wait before each piece of work, so that a missing order
    shows as wrong results.
    """

    place = torch.device("cpu")

    def __init__(
        self,
        memory_nbytes: int = 1 << 30,
        copy_delay: Callable[[], float] = lambda: 0.0,
        compute_delay: Callable[[], float] = lambda: 0.0,
        kernels: Any = None,
    ) -> None:
        self.kernels = kernels
        self._total = self._left = memory_nbytes
        self.taken_by_others = 0
        self._copy_delay, self._compute_delay = copy_delay, compute_delay
        self._copies, self._computes = _Queue("moei-device-copy"), _Queue("moei-device-compute")
        self.registered: dict[int, int] = {}

    def make_current(self) -> None:
        """There is one."""

    def free_nbytes(self) -> int:
        return max(0, self._left - self.taken_by_others)

    def held_nbytes(self) -> int:
        return self._total - self._left

    def release(self, nbytes: int) -> None:
        self._left += nbytes

    def allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.free_nbytes():
            raise torch.OutOfMemoryError(f"{nbytes} bytes of {self.free_nbytes()} that are free")
        self._left -= nbytes
        page = 4096
        memory = torch.full((nbytes + page,), 0xFF, dtype=torch.uint8)
        start = -memory.data_ptr() % page
        return memory[start : start + nbytes]

    def register(self, address: int, nbytes: int) -> bool:
        assert address not in self.registered
        self.registered[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def copy_in(self, source: memoryview, target: torch.Tensor, after: Event | None) -> Event:
        def work() -> None:
            if after is not None:
                after.wait()
            time.sleep(self._copy_delay())
            target.copy_(torch.frombuffer(source, dtype=torch.uint8))

        self._copies.put(work)
        return self._copies.mark()

    def copy_together(self, copies: Sequence[tuple[memoryview, torch.Tensor, Event | None]]) -> Event:
        return [self.copy_in(*copy) for copy in copies][-1]

    def compute(self, work: Callable[[], None]) -> None:
        def late() -> None:
            time.sleep(self._compute_delay())
            work()

        self._computes.put(late)

    def compute_after(self, event: Event) -> None:
        self._computes.put(event.wait)

    def mark(self) -> Event:
        return self._computes.mark()

    def read_back(
        self, *tensors: torch.Tensor, before_waiting: Callable[[], None] = at_once
    ) -> list[torch.Tensor]:
        return list(tensors)

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def finish(self, before_waiting: Callable[[], None] = at_once) -> None:
        end = self._computes.mark()
        before_waiting()
        end.wait()
        for queue in (self._computes, self._copies):
            if (failure := queue.take_failure()) is not None:
                raise failure

    def record(self) -> Recording:
        return OperationRecording()

    def close(self) -> None:
        for queue in (self._copies, self._computes):
            queue.put(None)
            queue.join()
