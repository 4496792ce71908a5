"""Which disk a folder is on, and what kind of disk that is. Facts from the mount table and sysfs."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moei_core.hardware.system import ROOT

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """The file system that holds ``folder``.

    device: what was mounted, ``/dev/...`` or a name. number: ``major:minor``, which tells file systems apart.
    rotational: spins, None where unknown. model: of the hardware, if it says.
    """

    folder: str
    mount: str
    file_system: str
    device: str
    number: str
    read_only: bool
    rotational: bool | None
    model: str
    total: int
    free: int

    @property
    def in_memory(self) -> bool:
        """Whether files there are memory: a model on it takes from the same RAM as its slots."""
        return self.file_system in _IN_MEMORY


def existing_parent(folder: Path) -> Path:
    """``folder`` or the nearest folder above it that exists."""
    folder = folder.expanduser().absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def read_disk(folder: Path, root: Path = ROOT) -> DiskFacts:
    """The facts of the file system under ``folder`` (or under its nearest existing parent)."""
    place = existing_parent(folder)
    real = str(place.resolve())
    mount, file_system, device, number, options = "/", "unknown", "", "", ""
    with suppress(OSError, UnicodeDecodeError):
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
            left, _, right = line.partition(" - ")
            head, tail = left.split(), right.split()
            if len(head) < 6 or len(tail) < 2:
                continue
            point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), head[4])
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            # The last of several mounts on one point is the one that is seen.
            if inside and len(point) >= len(mount):
                mount, number, options = point, head[2], head[5]
                file_system, device = tail[0], tail[1]
                options += "," + (tail[2] if len(tail) > 2 else "")
    rotational, model = _block_device(number, root)
    total = free = 0
    with suppress(OSError):
        usage = shutil.disk_usage(place)
        total, free = usage.total, usage.free
    read_only = "ro" in options.split(",")
    if root == ROOT:
        with suppress(OSError, AttributeError):
            read_only = read_only or bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    return DiskFacts(
        str(place), mount, file_system, device, number, read_only, rotational, model, total, free
    )


def _block_device(number: str, root: Path) -> tuple[bool | None, str]:
    """(whether it spins, the hardware's name) of a device or of the disk that a partition is on."""
    device = root / "sys/dev/block" / number
    if not number or not device.exists():
        return None, ""
    device = device.resolve()
    for folder in (device, device.parent):
        rotational = None
        with suppress(OSError):
            rotational = (folder / "queue/rotational").read_text().strip() == "1"
        if rotational is not None:
            model = ""
            with suppress(OSError, UnicodeDecodeError):
                model = (folder / "device/model").read_text().strip()
            return rotational, model
    return None, ""
