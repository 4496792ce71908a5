"""``SlotPool``: the memory that experts live in. One allocation, equal page-aligned slots."""

from __future__ import annotations

import contextlib
import mmap as mmap_module
import sys
from collections.abc import Iterable, Iterator
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np

_MADV_DONTNEED: int | None = getattr(mmap_module, "MADV_DONTNEED", None)
_MADV_HUGEPAGE: int | None = getattr(mmap_module, "MADV_HUGEPAGE", None)
_MADV_NOHUGEPAGE: int | None = getattr(mmap_module, "MADV_NOHUGEPAGE", None)
_MADV_COLD: int | None = 20 if sys.platform == "linux" else None
"""Of Linux 5.4; Python has no name for it."""


class SlotPool:
    """``count`` slots of ``slot_nbytes`` bytes (a multiple of the page size) in one anonymous mapping.

    The kernel commits a page when it is first written, so a pool costs what it has held since the last ``resize``. Huge
    pages are asked for: a disk reads into them faster, for half of the processor's time.
    """

    def __init__(self, count: int, slot_nbytes: int) -> None:
        self.count = count
        self.slot_nbytes = slot_nbytes
        # Private, so that pages can be given back: what is shared stays until the mapping goes.
        self._memory = mmap(-1, count * slot_nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._advise(_MADV_HUGEPAGE)
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
        self._advise(_MADV_NOHUGEPAGE if self._retired else _MADV_HUGEPAGE)
        for first, count in _runs(idle):
            where = first * self.slot_nbytes, count * self.slot_nbytes
            # Splits the huge pages at both ends: they would be given back as a whole or not at all.
            self._advise(_MADV_COLD, *where)
            self._advise(_MADV_DONTNEED, *where)

    def _advise(self, advice: int | None, *where: int) -> None:
        """Tell the kernel something of ``where``: offset and bytes, or all. What it does not know is no error."""
        if advice is not None:
            with contextlib.suppress(OSError):
                self._memory.madvise(advice, *where)


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
