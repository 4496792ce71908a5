"""The memory that experts live in: one reservation of addresses, in page-aligned slots.

``SlotPool`` is for experts of one size. ``SizedSlotPool`` holds more of the small ones in the same memory, where a
model's layers differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from moei_core.cache.expert_sizes import ExpertSizes
from moei_core.store.base import ExpertStore
from moei_core.store.slot_memory import COLD, DONTNEED, NOHUGEPAGE, advise, best_pages, slot_memory

_WORTH_IT = 50
"""One part in so many of all slots that small experts leave empty, from which on a pool is ``SizedSlotPool``."""


def unequal_sizes(store: ExpertStore, num_experts: Mapping[int, int]) -> ExpertSizes | None:
    """What experts take by layer, or None where slots for the largest suit all. num_experts: by layer."""
    memory, stored = dict.fromkeys(num_experts, 0), dict.fromkeys(num_experts, 0)
    for key in store.experts():
        layout = store.layout(key)
        memory[key.layer] = max(memory[key.layer], layout.slot_nbytes)
        stored[key.layer] = max(stored[key.layer], layout.nbytes)
    # Where files begin their tensors makes a difference of pages, which is one for the tiniest experts only.
    alike = len(set(stored.values())) == 1
    sizes = ExpertSizes(memory, dict(num_experts))
    return None if alike or (sizes.total - sizes.whole) * _WORTH_IT < sizes.total else sizes


class SlotPool:
    """``count`` slots of ``slot_nbytes`` bytes (a multiple of the page size) in one anonymous mapping.

    The kernel commits a page when it is first written, so a pool costs what it has held since the last ``resize``. Huge
    pages are asked for where they are at hand: a disk reads into them faster, for half of the processor's time.
    """

    def __init__(self, count: int, slot_nbytes: int, *, sparse: bool = False) -> None:
        """sparse: not all of it will be filled at once."""
        self.count = count
        self.slot_nbytes = slot_nbytes
        self._memory = slot_memory(count * slot_nbytes, sparse)
        self._view = memoryview(self._memory)
        self._address = np.frombuffer(self._view, np.uint8).ctypes.data
        self._free = list(range(count - 1, -1, -1))
        self._retired: list[int] = []
        self._limit = count

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        return len(self._free)

    def has_room(self, layer: int) -> bool:
        """Whether a slot can be taken for an expert of ``layer``."""
        return self.free > 0

    def take(self, layer: int | None = None) -> int:
        """The number of a free slot, which is the caller's until it is given back. layer: whose expert it is for;
        None: for any."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        if self.count - len(self._retired) > self._limit:
            # More were in use when the pool was made smaller.
            self._retire(slot)
        else:
            self._free.append(slot)

    def fit(self, slot: int, layer: int) -> None:
        """In ``slot`` is a complete expert of ``layer``, and nothing more is written there."""

    def whole(self, experts: int) -> int:
        """Slots whose memory holds all ``experts`` of the model."""
        return experts

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
        self._limit = slots
        idle = self._free + self._retired
        usable = max(0, slots - (self.count - len(idle)))
        self._free, self._retired = idle[:usable], idle[usable:]
        # While something is retired nobody else may fill up the huge pages that it has left.
        advise(self._memory, NOHUGEPAGE if self._retired else best_pages())
        for first, count in _runs(idle):
            self._leave_memory(first, count)

    def _retire(self, slot: int) -> None:
        self._retired.append(slot)
        advise(self._memory, NOHUGEPAGE)
        self._leave_memory(slot, 1)

    def _leave_memory(self, first: int, count: int) -> None:
        where = first * self.slot_nbytes, count * self.slot_nbytes
        # Splits the huge pages at both ends: they would be given back as a whole or not at all.
        advise(self._memory, COLD, *where)
        advise(self._memory, DONTNEED, *where)


class SizedSlotPool(SlotPool):
    """Slots for experts of unequal size in the memory of ``count`` of the largest, and never in more.

    There are as many slots as the smallest experts would need, each with addresses for the largest. A slot that is for
    any expert counts as one of the largest until ``fit`` says what it holds. Pages that its expert does not reach may
    still be there from an earlier one; they go back to the system as soon as another slot could not be filled
    otherwise.
    """

    def __init__(self, count: int, sizes: ExpertSizes) -> None:
        places = min(count * sizes.largest // sizes.smallest, count + sizes.total)
        super().__init__(places, sizes.largest, sparse=True)
        # A huge page would reach into the next slot, and come back whole where only its end had gone.
        advise(self._memory, NOHUGEPAGE)
        self._sizes, self._most = sizes, count * sizes.largest
        # Bytes that each slot in use may fill; and bytes from its beginning that each slot may have pages for.
        self._held: dict[int, int] = {}
        self._touched: dict[int, int] = {}
        self._used = 0
        # All pages: of each slot what it has, or may fill.
        self._total = 0
        # Slots in use that have more pages than they may fill.
        self._loose: set[int] = set()

    @property
    def free(self) -> int:
        """How many of the largest experts there is memory for."""
        return max(0, self._most - self._used) // self.slot_nbytes

    @property
    def committed(self) -> int:
        """Bytes that may have pages, at most ``count`` slots' worth."""
        return self._total

    def has_room(self, layer: int) -> bool:
        return self._used + self._sizes.nbytes[layer] <= self._most

    def take(self, layer: int | None = None) -> int:
        slot = super().take()
        self._hold(slot, self.slot_nbytes if layer is None else self._sizes.nbytes[layer])
        self._trim(self._most)
        return slot

    def give_back(self, slot: int) -> None:
        # What failed or was cancelled may have filled all that it could.
        self._touched[slot] = max(self._touched.get(slot, 0), self._held[slot])
        self._used -= self._held.pop(slot)
        self._loose.discard(slot)
        self._free.append(slot)
        # More was in use, it may be, when the pool was made smaller.
        self._trim(self._most)

    def fit(self, slot: int, layer: int) -> None:
        # A slot that is for any may have been filled by others, which were cancelled.
        self._touched[slot] = max(self._touched.get(slot, 0), self._held[slot])
        self._hold(slot, self._sizes.nbytes[layer])

    def whole(self, experts: int) -> int:
        return self._sizes.whole

    def resize(self, slots: int) -> None:
        self._most = slots * self.slot_nbytes
        self._trim(0)

    def _hold(self, slot: int, nbytes: int) -> None:
        before, touched = self._held.get(slot, 0), self._touched.get(slot, 0)
        self._held[slot] = nbytes
        self._used += nbytes - before
        self._total += max(touched, nbytes) - max(touched, before)
        if touched > nbytes:
            self._loose.add(slot)

    def _trim(self, most: int) -> None:
        """Give pages that nobody needs back until there are ``most`` bytes, or no more of them."""
        while self._total > most and self._loose:
            slot = self._loose.pop()
            self._leave(slot, self._held[slot])
        # Those that will be taken last first.
        for slot in self._free:
            if self._total <= most:
                return
            self._leave(slot, 0)

    def _leave(self, slot: int, nbytes: int) -> None:
        """Let ``slot`` have only its first ``nbytes``."""
        beyond = self._touched.get(slot, 0) - nbytes
        if beyond > 0:
            advise(self._memory, DONTNEED, slot * self.slot_nbytes + nbytes, beyond)
            self._touched[slot] = nbytes
            self._total -= beyond


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
