"""``MemoryStore``: the experts of another store, held in memory. The fake beside the interface, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from mmap import mmap

from moei_core.store.base import ExpertLayout, ExpertStore, Extent, join_parts
from moei_core.store.checksums import RunningChecksum
from moei_core.types import ExpertKey


class MemoryStore:
    """An ``ExpertStore`` whose reads are copies; layouts are those of the store it was filled from."""

    def __init__(self, layouts: dict[ExpertKey, ExpertLayout], contents: dict[ExpertKey, bytes]) -> None:
        """contents: each expert as it is read, a slot of ``layout.slot_nbytes``."""
        self._layouts = layouts
        self._contents = contents

    @classmethod
    def copy_of(cls, store: ExpertStore) -> MemoryStore:
        """Read every expert of ``store`` once."""
        layouts = {key: store.layout(key) for key in store.experts()}
        contents = {}
        for key, layout in layouts.items():
            with mmap(-1, layout.slot_nbytes) as slot, memoryview(slot) as view:
                for extent in layout.extents:
                    store.read_extent(key, extent, view)
                contents[key] = bytes(view)
        return cls(layouts, contents)

    def experts(self) -> Iterable[ExpertKey]:
        return self._layouts.keys()

    def layout(self, key: ExpertKey) -> ExpertLayout:
        return self._layouts[key]

    def read_extent(self, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        start, stop = extent.slot_offset, extent.slot_offset + extent.nbytes
        slot[start:stop] = self._contents[key][start:stop]

    def complete(self, key: ExpertKey, slot: memoryview, running: RunningChecksum | None = None) -> None:
        join_parts(key, self._layouts[key], slot)  # nothing to compare: memory does not rot

    def close(self) -> None:
        self._contents = {}
