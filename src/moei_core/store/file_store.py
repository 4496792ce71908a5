"""What all stores over files share: open readers, and reading an expert's extents into its slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from moei_core.errors import DamagedFileError, ExpertReadError
from moei_core.store.base import ExpertLayout, Extent, join_parts
from moei_core.store.checksums import RunningChecksum, checksum
from moei_core.store.file_reader import FileReader
from moei_core.types import ExpertKey


class FileStore(ABC):
    """An ``ExpertStore`` but for the check of what was read, which subclasses add."""

    def __init__(self, layouts: Mapping[ExpertKey, ExpertLayout], direct: bool = True) -> None:
        """layouts: where each expert is. direct: past the page cache where possible.

        Raises: DamagedFileError if a file cannot be opened.
        """
        self._layouts = dict(layouts)
        files = {extent.file for layout in self._layouts.values() for extent in layout.extents}
        self._readers: dict[Path, FileReader] = {}
        try:
            for file in sorted(files):
                self._readers[file] = FileReader(file, direct)
        except DamagedFileError:
            self._close_files()
            raise

    def experts(self) -> Iterable[ExpertKey]:
        return self._layouts.keys()

    def layout(self, key: ExpertKey) -> ExpertLayout:
        return self._layouts[key]

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return all(reader.direct for reader in self._readers.values())

    def read_extent(self, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        try:
            self._readers[extent.file].read_into(extent.offset, extent.nbytes, slot, extent.slot_offset)
        except (OSError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ExpertReadError(
                f"Reading {key} from {extent.file.name} failed.",
                f"{extent.file}: {reason}.",
                "The conversation is as it was before this turn. Check the disk, then ask again.",
            ) from error

    def complete(self, key: ExpertKey, slot: memoryview, running: RunningChecksum | None = None) -> None:
        layout = self._layouts[key]
        if running is None:
            found = checksum(slot[e.slot_offset : e.slot_offset + e.nbytes] for e in layout.extents)
        else:
            found = running.hexdigest()
        self._check(key, found)
        join_parts(key, layout, slot)

    @abstractmethod
    def _check(self, key: ExpertKey, found: str) -> None:
        """found: the checksum of what was read. Raises: ExpertReadError if it is not that of ``key``."""

    def close(self) -> None:
        self._close_files()

    def _close_files(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers = {}
