"""``SlotPool``: the memory that experts live in. One allocation, equal page-aligned slots."""

from __future__ import annotations

import mmap as mmap_module
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from moei_core.types import ExpertKey

_MADV_DONTNEED: int | None = getattr(mmap_module, "MADV_DONTNEED", None)


class SlotPool:
    """``count`` slots of ``slot_nbytes`` bytes (a multiple of the page size) in one anonymous mapping.

    The kernel commits a page when it is first written, so a pool costs what it has held since the last ``trim``.
    """

    def __init__(self, count: int, slot_nbytes: int) -> None:
        self.count = count
        self.slot_nbytes = slot_nbytes
        # Private, so that pages can be given back: what is shared stays until the mapping goes.
        self._memory = mmap(-1, count * slot_nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._free = list(range(count - 1, -1, -1))
        self._slot_of: dict[ExpertKey, int] = {}

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def experts(self) -> list[ExpertKey]:
        """The experts that have a slot."""
        return list(self._slot_of)

    def take(self, key: ExpertKey) -> None:
        """Give ``key`` a free slot. A plan never asks for more than there are."""
        self._slot_of[key] = self._free.pop()

    def give_back(self, key: ExpertKey) -> None:
        """Free ``key``'s slot."""
        self._free.append(self._slot_of.pop(key))

    def view(self, key: ExpertKey) -> memoryview:
        """The writable, page-aligned bytes of ``key``'s slot."""
        start = self._slot_of[key] * self.slot_nbytes
        return self._view[start : start + self.slot_nbytes]

    def trim(self) -> None:
        """Give the memory of all free slots back to the system; they cost nothing until they are used again."""
        if _MADV_DONTNEED is not None:
            for slot in self._free:
                self._memory.madvise(_MADV_DONTNEED, slot * self.slot_nbytes, self.slot_nbytes)
