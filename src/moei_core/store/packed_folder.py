"""What a folder of a packed store looks like from outside, for those who only list or choose."""

from __future__ import annotations

from pathlib import Path

MANIFEST_NAME = "moei-packed.json"
JOURNAL_NAME = "moei-packed.journal"
LOCK_NAME = ".lock"


def is_packed(folder: Path) -> bool:
    """Whether ``folder`` holds a packed store, finished."""
    return (folder / MANIFEST_NAME).is_file()


def is_begun(folder: Path) -> bool:
    """Whether ``folder`` holds an unfinished one."""
    return (folder / JOURNAL_NAME).is_file()


def packed_share(folder: Path) -> float:
    """About how much of an unfinished store is on disk, from 0 to 1."""
    files = [path.stat() for path in folder.glob("*.bin")]
    total = sum(status.st_size for status in files)
    return min(1.0, sum(status.st_blocks * 512 for status in files) / total) if total else 0.0
