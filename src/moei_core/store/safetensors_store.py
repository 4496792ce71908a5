"""``SafetensorsStore``: experts read in place from the model's own safetensors files, however sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moei_core.errors import ExpertReadError
from moei_core.store.base import StoredTensor, lay_out
from moei_core.store.checksums import ChecksumLedger
from moei_core.store.file_store import FileStore
from moei_core.types import ExpertKey


class SafetensorsStore(FileStore):
    """An ``ExpertStore`` over files that are never copied or converted."""

    def __init__(
        self,
        experts: Mapping[ExpertKey, Sequence[StoredTensor]],
        direct: bool = True,
    ) -> None:
        """experts: the stored tensors of each expert. direct: past the page cache where possible.

        Raises: DamagedFileError if a file cannot be opened.
        """
        super().__init__({key: lay_out(experts[key]) for key in sorted(experts)}, direct)
        self._ledger = ChecksumLedger(
            {file.resolve(): reader.identity() for file, reader in self._readers.items()}
        )

    def _check(self, key: ExpertKey, found: str) -> None:
        if not self._ledger.check(key, found):
            names = ", ".join(sorted({extent.file.name for extent in self._layouts[key].extents}))
            raise ExpertReadError(
                f"The bytes of {key} are not those read before.",
                f"Its checksum differs though {names} seems unchanged: a failing disk or damaged file.",
                "Nothing was computed with them. Check the disk, then remove the model and pull it again.",
            )

    def close(self) -> None:
        # What first reads have taught, for the next run.
        self._ledger.save()
        super().close()
