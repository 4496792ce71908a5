"""``SlotPool``: the memory that experts live in. One allocation, equal page-aligned slots."""

from __future__ import annotations

import mmap as mmap_module
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np

_MADV_DONTNEED: int | None = getattr(mmap_module, "MADV_DONTNEED", None)


class SlotPool:
    """``count`` slots of ``slot_nbytes`` bytes (a multiple of the page size) in one anonymous mapping.

    The kernel commits a page when it is first written, so a pool costs what it has held since the last ``resize``.
    """

    def __init__(self, count: int, slot_nbytes: int) -> None:
        self.count = count
        self.slot_nbytes = slot_nbytes
        # Private, so that pages can be given back: what is shared stays until the mapping goes.
        self._memory = mmap(-1, count * slot_nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._address = np.frombuffer(self._view, np.uint8).ctypes.data
        self._free = list(range(count - 1, -1, -1))
        self._retired: list[int] = []

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """The number of a free slot, which is the caller's until it is given back."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def address(self, slot: int) -> int:
        """Where a slot begins in memory."""
        return self._address + slot * self.slot_nbytes

    def view(self, slot: int) -> memoryview:
        """The writable, page-aligned bytes of a slot."""
        start = slot * self.slot_nbytes
        return self._view[start : start + self.slot_nbytes]

    def resize(self, slots: int) -> None:
        """Let at most ``slots`` be used, those in use counted; the memory of all that are free goes back.

        The others cannot be taken until the pool is resized again.
        """
        idle = self._free + self._retired
        usable = max(0, slots - (self.count - len(idle)))
        self._free, self._retired = idle[:usable], idle[usable:]
        if _MADV_DONTNEED is not None:
            for slot in idle:
                self._memory.madvise(_MADV_DONTNEED, slot * self.slot_nbytes, self.slot_nbytes)
