"""``SlotPool``: the memory that experts live in. One allocation, equal page-aligned slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from moei_core.store.slot_memory import COLD, DONTNEED, NOHUGEPAGE, advise, best_pages, slot_memory


class SlotPool:
    """``count`` slots of ``slot_nbytes`` bytes (a multiple of the page size) in one anonymous mapping.

    The kernel commits a page when it is first written, so a pool costs what it has held since the last ``resize``. Huge
    pages are asked for where they are at hand: a disk reads into them faster, for half of the processor's time.
    """

    def __init__(self, count: int, slot_nbytes: int) -> None:
        self.count = count
        self.slot_nbytes = slot_nbytes
        self._memory = slot_memory(count * slot_nbytes)
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
        # While something is retired nobody else may fill up the huge pages that it has left.
        advise(self._memory, NOHUGEPAGE if self._retired else best_pages())
        for first, count in _runs(idle):
            where = first * self.slot_nbytes, count * self.slot_nbytes
            # Splits the huge pages at both ends: they would be given back as a whole or not at all.
            advise(self._memory, COLD, *where)
            advise(self._memory, DONTNEED, *where)


def _runs(slots: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Slots that lie side by side: the first and how many, ascending."""
    first = count = 0
    for slot in sorted(slots):
        if count and slot == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = slot, 1
    if count:
        yield first, count
