"""``SlotPool``: the memory that experts live in. One allocation, equal page-aligned slots."""

from __future__ import annotations

from mmap import mmap


class SlotPool:
    """``count`` slots of ``slot_nbytes`` bytes (a multiple of the page size) in one anonymous mapping.

    The kernel commits a page when it is first written, so a pool costs what it has held.
    """

    def __init__(self, count: int, slot_nbytes: int) -> None:
        self.count = count
        self.slot_nbytes = slot_nbytes
        self._memory = mmap(-1, count * slot_nbytes)
        self._view = memoryview(self._memory)
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """The number of a free slot, which is the caller's until it is given back."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def view(self, slot: int) -> memoryview:
        """The writable, page-aligned bytes of a slot."""
        start = slot * self.slot_nbytes
        return self._view[start : start + self.slot_nbytes]
