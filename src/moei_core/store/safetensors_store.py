"""``SafetensorsStore``: experts read in place from the model's own safetensors files, however sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moei_core.errors import DamagedFileError, ExpertReadError
from moei_core.store.base import ExpertLayout, Extent, StoredTensor, lay_out
from moei_core.store.checksums import ChecksumLedger
from moei_core.store.file_reader import FileReader
from moei_core.types import ExpertKey


class SafetensorsStore:
    """An ``ExpertStore`` over files that are never copied or converted."""

    def __init__(
        self,
        experts: Mapping[ExpertKey, Sequence[StoredTensor]],
        direct: bool = True,
        checksums: bool = True,
    ) -> None:
        """experts: the stored tensors of each expert. direct: past the page cache where possible.

        Raises: DamagedFileError if a file cannot be opened.
        """
        self._layouts = {key: lay_out(experts[key]) for key in sorted(experts)}
        files = {extent.file for layout in self._layouts.values() for extent in layout.extents}
        self._readers: dict[Path, FileReader] = {}
        try:
            for file in sorted(files):
                self._readers[file] = FileReader(file, direct)
        except DamagedFileError:
            self.close()
            raise
        self._ledger = (
            ChecksumLedger({file.resolve(): reader.identity() for file, reader in self._readers.items()})
            if checksums
            else None
        )

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

    def verify(self, key: ExpertKey, slot: memoryview) -> None:
        if self._ledger is None:
            return
        layout = self._layouts[key]
        pieces = (slot[p.slot_offset : p.slot_offset + p.tensor.nbytes] for p in layout.parts)
        if not self._ledger.check(key, pieces):
            names = ", ".join(sorted({extent.file.name for extent in layout.extents}))
            raise ExpertReadError(
                f"The bytes of {key} are not those read before.",
                f"Its checksum differs though {names} seems unchanged: a failing disk or damaged file.",
                "Nothing was computed with them. Check the disk, then pull the model again.",
            )

    def save_checksums(self) -> None:
        """Keep what first reads have taught for the next run."""
        if self._ledger is not None:
            self._ledger.save()

    def close(self) -> None:
        if getattr(self, "_ledger", None) is not None:
            self.save_checksums()
        for reader in self._readers.values():
            reader.close()
        self._readers = {}
