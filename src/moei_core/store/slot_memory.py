"""Memory that experts are read into: anonymous, private, in huge pages where the system has them at hand."""

from __future__ import annotations

import contextlib
import mmap as mmap_module
import sys
from functools import cache
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

DONTNEED: int | None = getattr(mmap_module, "MADV_DONTNEED", None)
HUGEPAGE: int | None = getattr(mmap_module, "MADV_HUGEPAGE", None)
NOHUGEPAGE: int | None = getattr(mmap_module, "MADV_NOHUGEPAGE", None)
COLD: int | None = 20 if sys.platform == "linux" else None
"""Of Linux 5.4; Python has no name for it."""

_NORESERVE: int = getattr(mmap_module, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Addresses alone are no promise of memory then, of which a kernel may refuse more than there is."""

_REPORTING = 5
"""The bit of a virtio balloon's features that says so (virtual I/O device specification 1.2, section 5.5.3)."""


def slot_memory(nbytes: int, sparse: bool = False) -> mmap:
    """``nbytes`` that the kernel commits when they are first written. sparse: never all of them. Raises: OSError."""
    # Private, so that pages can be given back: what is shared stays until the mapping goes.
    memory = mmap(-1, nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS | (_NORESERVE if sparse else 0))
    advise(memory, best_pages())
    return memory


@cache
def best_pages() -> int | None:
    """The advice to give for memory to read into: ``HUGEPAGE``, or ``NOHUGEPAGE`` where those must come from a host.

    A disk reads into huge pages with half of the processor's time. But a virtual machine that reports its free memory
    gives it to the host in pieces of that size, and gets them again at .5 GB/s; small pages are made of pieces that it
    kept, at 2.5. A first prompt fills all slots: it took two to three times as long.
    """
    return NOHUGEPAGE if reports_free_memory() else HUGEPAGE


def reports_free_memory(system: Path = Path("/sys/bus")) -> bool:
    """Whether this is a virtual machine that gives free memory back to its host."""
    for features in system.glob("virtio/drivers/virtio_balloon/*/features"):
        with contextlib.suppress(OSError):
            if features.read_text()[_REPORTING : _REPORTING + 1] == "1":
                return True
    # Hyper-V's says nowhere whether it does; under WSL it does. Its devices are named by GUIDs.
    return any(system.glob("vmbus/drivers/hv_balloon/*-*-*-*-*"))


def advise(memory: mmap, advice: int | None, *where: int) -> None:
    """Tell the kernel something of ``where``: offset and bytes, or all. What a system does not know is no error."""
    if advice is not None:
        with contextlib.suppress(OSError):
            memory.madvise(advice, *where)
