"""Slots on both sides of the link: host slots that a copy may still be reading, and the slots of a device."""

from __future__ import annotations

from collections import deque

import torch

from moei_core.engine.devices import Device, Event
from moei_core.engine.slots import SlotPool


class LinkedSlotPool(SlotPool):
    """A ``SlotPool`` whose slots are copied to a device: page-locked from their first use on.

    A slot that is given back while a copy reads it is free only when the copy is done.
    """

    def __init__(self, count: int, slot_nbytes: int, device: Device) -> None:
        super().__init__(count, slot_nbytes)
        self._device = device
        self._read_by: dict[int, Event] = {}
        self._leaving: deque[int] = deque()
        # By slot; False: the system refused to lock it, and its copies are slower.
        self._locked: dict[int, bool] = {}

    @property
    def free(self) -> int:
        """How many slots nobody holds. Waits for a copy to end if only that keeps it from being none."""
        while self._leaving and (not self._free or self._read_by[self._leaving[0]].done()):
            slot = self._leaving.popleft()
            self._read_by.pop(slot).wait()
            self._free.append(slot)
        return len(self._free)

    def take(self) -> int:
        assert self.free
        slot = super().take()
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
        """Unlock all. No copy may be under way."""
        self._settle()
        for slot in list(self._locked):
            self._unlock(slot)

    def _settle(self) -> None:
        while self._leaving:
            slot = self._leaving.popleft()
            self._read_by.pop(slot).wait()
            self._free.append(slot)

    def _unlock(self, slot: int) -> None:
        if self._locked.pop(slot):
            self._device.unregister(self.address(slot))


class DeviceSlots:
    """The memory of a device that experts are computed from: slots for residents, and a ring for what passes.

    Whoever fills a slot again waits, on the device, until what was computed from it is done: ``last_use``.
    """

    def __init__(self, device: Device, residents: int, ring: int, slot_nbytes: int) -> None:
        self.slot_nbytes = slot_nbytes
        self.memory = device.allocate((residents + ring) * slot_nbytes)
        self._free = list(range(residents - 1, -1, -1))
        self._ring = deque(range(residents, residents + ring))
        self.last_use: dict[int, Event] = {}

    def take(self, stays: bool) -> int:
        """A slot for a resident; else the next one of the ring, which may be filled again later in the access."""
        if stays:
            return self._free.pop()
        self._ring.rotate(-1)
        return self._ring[-1]

    def give_back(self, slot: int) -> None:
        """A resident has gone."""
        self._free.append(slot)

    def bytes_of(self, slot: int, nbytes: int) -> torch.Tensor:
        """The first ``nbytes`` of a slot, uint8."""
        start = slot * self.slot_nbytes
        return self.memory[start : start + nbytes]
