"""What a pull will do, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moei_core.config import format_size
from moei_core.errors import DoesNotFitError
from moei_core.hub.layout import RepoCache
from moei_core.hub.transfer import PlannedFile
from moei_core.paths import data_dir


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull will do.

    present_nbytes: of ``total_nbytes``, in the cache already, whole or in part.
    free_nbytes: on the disk of the cache. packed_as: the format to pack to afterwards, or empty; is_packed: that
    has been done, so nothing needs to be downloaded. is_moe: whether the model's config names routed experts.
    online: False if the hub was not asked, and the snapshot is complete as far as can be seen from here.
    """

    cache: RepoCache
    revision: str
    commit: str
    files: tuple[PlannedFile, ...]
    present_nbytes: int
    free_nbytes: int
    licence: str = ""
    gated: bool = False
    is_moe: bool = True
    online: bool = True
    packed_as: str = ""
    is_packed: bool = False
    quant_method: str = ""

    @property
    def repo(self) -> str:
        return self.cache.repo

    @property
    def folder(self) -> Path:
        """Where the model is when the pull is done."""
        return self.cache.snapshot(self.commit)

    @property
    def total_nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def needed_nbytes(self) -> int:
        """What must still be downloaded, which is also the space it takes."""
        return self.total_nbytes - self.present_nbytes

    @property
    def packed_nbytes(self) -> int:
        """About what packing adds: nearly all of a model are experts, and the rest is packed to 8 bits.

        What is published as MXFP4 keeps its size.
        """
        stored = 8 if self.quant_method == "fp8" else 16
        share = {"": 0.0, "q8_0": 8.5 / stored, "q4_0": 4.5 / stored, "mxfp4": 1.0}[self.packed_as]
        return 0 if self.is_packed else int(self.total_nbytes * share)

    @property
    def fits(self) -> bool:
        if self.is_packed:
            return True
        beside = self.packed_nbytes if _same_disk(self.cache.cache_dir, data_dir()) else 0
        apart = self.packed_nbytes <= free_space(data_dir())
        return apart and self.needed_nbytes + beside <= self.free_nbytes


def _same_disk(one: Path, other: Path) -> bool:
    """Whether two folders are or will be on the same file system."""
    devices = []
    for folder in (one, other):
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        devices.append(there.stat().st_dev)
    return devices[0] == devices[1]


def free_space(folder: Path) -> int:
    """Free bytes on the disk where ``folder`` is or will be."""
    for path in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(path).free
    return 0


def check_space(plan: PullPlan) -> None:
    """Raises: DoesNotFitError, saying how much is needed and how much is free."""
    if not plan.fits:
        packing = f" and about {format_size(plan.packed_nbytes)} for packing" if plan.packed_nbytes else ""
        raise DoesNotFitError(
            f"{plan.repo} does not fit on the disk of {plan.cache.cache_dir}.",
            f"{format_size(plan.needed_nbytes)}{packing} are needed, {format_size(plan.free_nbytes)} are free.",
            "Free some space (`moei list`, `moei rm`) or set HF_HOME to a larger disk.",
        )
