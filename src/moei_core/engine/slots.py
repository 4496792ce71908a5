"""``SlotPool``: the memory that experts live in. One allocation, equal page-aligned slots."""

from __future__ import annotations

from mmap import mmap

from moei_core.types import ExpertKey


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
