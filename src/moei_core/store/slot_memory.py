"""Memory that experts are read into: anonymous, private, in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap as mmap_module
import sys
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

DONTNEED: int | None = getattr(mmap_module, "MADV_DONTNEED", None)
HUGEPAGE: int | None = getattr(mmap_module, "MADV_HUGEPAGE", None)
NOHUGEPAGE: int | None = getattr(mmap_module, "MADV_NOHUGEPAGE", None)
COLD: int | None = 20 if sys.platform == "linux" else None
"""Of Linux 5.4; Python has no name for it."""


def slot_memory(nbytes: int) -> mmap:
    """``nbytes`` that the kernel commits when they are first written. Raises: OSError."""
    # Private, so that pages can be given back: what is shared stays until the mapping goes.
    memory = mmap(-1, nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    advise(memory, HUGEPAGE)
    return memory


def advise(memory: mmap, advice: int | None, *where: int) -> None:
    """Tell the kernel something of ``where``: offset and bytes, or all. What a system does not know is no error."""
    if advice is not None:
        with contextlib.suppress(OSError):
            memory.madvise(advice, *where)
