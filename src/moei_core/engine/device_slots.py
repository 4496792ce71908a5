"""Slots on both sides of the link: host slots that a copy may still be reading, and the slots of a device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from functools import partial

import torch

from moei_core.engine.devices import Device, Event
from moei_core.engine.slots import SlotPool
from moei_core.engine.statistics import RuntimeStatistics


class LinkedSlotPool(SlotPool):
    """A ``SlotPool`` whose slots are copied to a device: page-locked from their first use on.

    A slot that is given back while a copy reads it is free only when the copy is done. statistics: counts the waiting
    for that.
    """

    def __init__(self, count: int, slot_nbytes: int, device: Device) -> None:
        super().__init__(count, slot_nbytes)
        self._device = device
        self.statistics = RuntimeStatistics()
        self._read_by: dict[int, Event] = {}
        self._leaving: deque[int] = deque()
        # By slot; False: the system refused to lock it, and its copies are slower.
        self._locked: dict[int, bool] = {}

    @property
    def free(self) -> int:
        """How many slots nobody holds. Waits for a copy to end if only that keeps it from being none."""
        while self._leaving and (not self._free or self._read_by[self._leaving[0]].done()):
            slot = self._leaving.popleft()
            started = time.perf_counter()
            self._read_by.pop(slot).wait()
            self.statistics.link_s += time.perf_counter() - started
            super().give_back(slot)
        return len(self._free)

    def take(self, layer: int | None = None) -> int:
        assert self.free
        slot = super().take(layer)
        if slot not in self._locked:
            self._locked[slot] = self._device.register(self.address(slot), self.slot_nbytes)
        return slot

    def give_back(self, slot: int) -> None:
        event = self._read_by.get(slot)
        if event is None or event.done():
            self._read_by.pop(slot, None)
            super().give_back(slot)
        else:
            self._leaving.append(slot)

    def read_until(self, slot: int, event: Event) -> None:
        """A copy reads ``slot`` until ``event`` is done."""
        self._read_by[slot] = event

    def resize(self, slots: int) -> None:
        self._settle()
        # A locked page that went back to the system would stay with the GPU, and ours would be another one.
        for slot in [slot for slot in (*self._free, *self._retired) if slot in self._locked]:
            self._unlock(slot)
        super().resize(slots)

    def close(self) -> None:
        """Wait for copies that are under way, and unlock all."""
        self._settle()
        for event in self._read_by.values():
            event.wait()
        self._read_by.clear()
        for slot in list(self._locked):
            self._unlock(slot)

    def _settle(self) -> None:
        while self._leaving:
            slot = self._leaving.popleft()
            self._read_by.pop(slot).wait()
            super().give_back(slot)

    def _retire(self, slot: int) -> None:
        if slot in self._locked:
            self._unlock(slot)
        super()._retire(slot)

    def _unlock(self, slot: int) -> None:
        if self._locked.pop(slot):
            self._device.unregister(self.address(slot))


BLOCK_NBYTES = 256 << 20
"""At least so much device memory is taken and given back at a time: allocations are rounded up, each by 2 MiB."""

_BLOCKS = 32


class DeviceSlots:
    """The memory of a device that experts are computed from: slots for those that stay, and a ring for what passes.

    Slots lie in blocks, so that memory can be given back; offsets (``start``) count from ``memory``, the ring, and may
    lead to another block. Whoever fills a slot again waits, on the device, until what was computed from it is done:
    ``last_use``.
    """

    def __init__(self, device: Device, slots: int, ring: int, slot_nbytes: int) -> None:
        self.slots, self.slot_nbytes = slots, slot_nbytes
        self._device, self._first = device, ring
        self.memory = device.allocate(ring * slot_nbytes)
        self.block_slots = max(-(-slots // _BLOCKS), -(-BLOCK_NBYTES // slot_nbytes), 1)
        self._blocks: list[torch.Tensor] = []
        self._free: list[int] = []
        self._ring = deque(range(ring))
        self.last_use: dict[int, Event] = {}
        self.grow(slots)

    @property
    def ring(self) -> int:
        """Slots for what passes."""
        return self._first

    @property
    def nbytes(self) -> int:
        """What all slots take now."""
        return (self._first + self.usable) * self.slot_nbytes

    @property
    def usable(self) -> int:
        """Slots for those that stay that there are now."""
        return self._end(len(self._blocks))

    def within(self, slots: int) -> int:
        """The most slots of whole blocks that are no more than ``slots``; one block at least."""
        blocks = max(1, min(slots, self.slots) // self.block_slots)
        return self._end(blocks if slots < self.slots else -(-self.slots // self.block_slots))

    def take(self, stays: bool) -> int:
        """A slot for one that stays; else the next one of the ring, which may be filled again later in the access."""
        if stays:
            return self._free.pop()
        self._ring.rotate(-1)
        return self._ring[-1]

    def give_back(self, slot: int) -> None:
        """What stayed has gone."""
        self._free.append(slot)

    def start(self, slot: int) -> int:
        """Where a slot begins, in bytes from the beginning of ``memory``; below 0 in a block that lies before."""
        if slot < self._first:
            return slot * self.slot_nbytes
        block, place = divmod(slot - self._first, self.block_slots)
        return self._blocks[block].data_ptr() - self.memory.data_ptr() + place * self.slot_nbytes

    def bytes_of(self, slot: int, nbytes: int) -> torch.Tensor:
        """The first ``nbytes`` of a slot, uint8."""
        memory, place = self.memory, slot
        if slot >= self._first:
            block, place = divmod(slot - self._first, self.block_slots)
            memory = self._blocks[block]
        return memory[place * self.slot_nbytes : place * self.slot_nbytes + nbytes]

    def grow(self, slots: int) -> None:
        """Have ``slots`` (of ``within``, or all), or as many as can be allocated; at least those there are."""
        while (begin := self.usable) < slots:
            end = self._end(len(self._blocks) + 1)
            try:
                block = self._device.allocate((end - begin) * self.slot_nbytes)
            except torch.OutOfMemoryError:
                if begin:
                    return
                raise
            self._blocks.append(block)
            self._free[:0] = range(self._first + end - 1, self._first + begin - 1, -1)

    def vacate(self, slots: int, used: Iterable[int]) -> dict[int, int]:
        """Leave what is beyond ``slots`` (of ``within``), before ``shrink``. used: slots in use, ``slots`` at most.

        Nothing may be under way on the device. Returns where to the used slots of blocks that go have moved.
        """
        begin = self._first + slots
        self._free = [slot for slot in self._free if slot < begin]
        moved: dict[int, int] = {}
        for slot in [slot for slot in used if slot >= begin]:
            moved[slot] = self._free.pop()
            self._device.compute(partial(self._copy, slot, moved[slot]))
        self._device.mark().wait()
        self.last_use = {slot: event for slot, event in self.last_use.items() if slot < begin}
        return moved

    def shrink(self, slots: int) -> None:
        """Give back what has been vacated. Nobody may refer to its bytes: what is referred to is not given back."""
        nbytes = (self.usable - slots) * self.slot_nbytes
        while self.usable > slots:
            self._blocks.pop()
        self._device.release(nbytes)

    def _copy(self, source: int, target: int) -> None:
        self.bytes_of(target, self.slot_nbytes).copy_(self.bytes_of(source, self.slot_nbytes))

    def _end(self, blocks: int) -> int:
        return min(blocks * self.block_slots, self.slots)
