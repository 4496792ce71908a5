"""``PackedStore``: experts of a packed store, each page-aligned and checked against the manifest at every read."""

from __future__ import annotations

from pathlib import Path

from moei_core.errors import ExpertReadError
from moei_core.store.file_store import FileStore
from moei_core.store.packed_manifest import Manifest
from moei_core.types import ExpertKey


class PackedStore(FileStore):
    """An ``ExpertStore`` over the folder that ``moei_core.store.packing`` writes."""

    def __init__(self, folder: Path, manifest: Manifest, direct: bool = True) -> None:
        """Raises: DamagedFileError if a file cannot be opened."""
        super().__init__({key: manifest.layout(folder, key) for key in manifest.experts}, direct)
        self._checksums = {key: expert.checksum for key, expert in manifest.experts.items()}

    def _check(self, key: ExpertKey, found: str) -> None:
        if found != self._checksums[key]:
            (extent,) = self._layouts[key].extents
            raise ExpertReadError(
                f"The bytes of {key} in {extent.file.name} are damaged.",
                f"{extent.file}: at byte {extent.offset:,} the checksum is not the one of packing.",
                "Nothing was computed with them. Check the disk, then pack the model again with `moei quantize`.",
            )
