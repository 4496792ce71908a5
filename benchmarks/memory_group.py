"""A control group that bounds the memory of a benchmark's processes, page cache included. Needs root."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def capped(nbytes: int) -> Iterator[Path | None]:
    """A memory control group (version 1 or 2) of so many bytes; None where none can be made."""
    name = f"moei-benchmark-{os.getpid()}"
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root, name)
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(nbytes))
                yield group
                return
        finally:
            _remove(group)
    yield None


def _remove(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)  # the last process is not quite gone


def join(group: Path) -> None:
    """Let this process, and what it starts, be counted in ``group``."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def read_count(group: Path, names: Sequence[str]) -> int | None:
    """The number in the first of these files of ``group`` that is there."""
    for name in names:
        if (group / name).exists():
            return int((group / name).read_text().split()[-1])
    return None
