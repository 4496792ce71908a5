"""Reading ranges of a file into page-aligned memory, past the page cache where the file system allows it.

The page cache is charged to the process by the kernel's memory accounting and would hold a second copy of what
the slots hold; direct reads avoid both. Where O_DIRECT is refused, reads are buffered and their pages are
dropped right after.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

from moei_core.errors import DamagedFileError
from moei_core.store.base import PAGE, align_down, align_up

_O_DIRECT = getattr(os, "O_DIRECT", 0)
# The kernel reads at most 2 GiB - 4 KiB at a time; a smaller bound keeps each call interruptible.
_LARGEST_READ = 64 << 20


class FileReader:
    """One open file. ``read_into`` may be called from several threads at once."""

    def __init__(self, file: Path, direct: bool = True) -> None:
        """direct: use O_DIRECT if the file system has it. Raises: DamagedFileError if it cannot be opened."""
        self.file = file
        self.direct = False
        try:
            self._descriptor = -1
            if direct and _O_DIRECT:
                self._descriptor = self._open_direct()
            if self._descriptor < 0:
                self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedFileError(
                f"The model's file {file.name} cannot be opened.",
                f"{file}: {error.strerror}.",
                "Check that the file is there and readable, or pull the model again.",
            ) from error

    def _open_direct(self) -> int:
        """A descriptor for direct reads, or -1 where the file system refuses to open one."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return -1
            raise
        self.direct = True
        return descriptor

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, start: int) -> None:
        """Read ``nbytes`` at ``offset`` of the file to ``buffer[start:]``.

        ``buffer`` is page-aligned, ``start % PAGE == offset % PAGE``, and the rest of the last page belongs to
        the caller's slot too: direct reads fill whole pages.

        Raises: OSError, or EOFError when the file has become shorter.
        """
        if self.direct:
            try:
                self._read_direct(offset, nbytes, buffer, start)
                return
            except OSError as error:
                # Some file systems accept the flag and refuse the read (or want larger blocks).
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._fall_back_to_buffered()
        self._read_fully(offset, buffer[start : start + nbytes])
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _read_direct(self, offset: int, nbytes: int, buffer: memoryview, start: int) -> None:
        first, last = align_down(offset), align_up(offset + nbytes)
        lead = offset - first
        # Whole pages in, but the file may end inside the last one: what counts is that our range is complete.
        self._read_fully(first, buffer[start - lead : start - lead + last - first], enough=lead + nbytes)

    def _read_fully(self, offset: int, target: memoryview, enough: int | None = None) -> None:
        enough = len(target) if enough is None else enough
        done = 0
        while done < enough:
            count = os.preadv(self._descriptor, [target[done : done + _LARGEST_READ]], offset + done)
            if count == 0:
                raise EOFError(f"the file ends at byte {offset + done:,}, {enough - done:,} bytes too early")
            done += count
            if done < enough and self.direct and done % PAGE:
                raise EOFError(f"the file ends at byte {offset + done:,}, {enough - done:,} bytes too early")

    def _fall_back_to_buffered(self) -> None:
        descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        # The old number stays valid for threads that are reading with it.
        os.dup2(descriptor, self._descriptor, inheritable=False)
        os.close(descriptor)
        self.direct = False

    def chunks(self, offset: int, nbytes: int, size: int) -> Iterator[memoryview]:
        """A range of the file in pieces of ``size`` bytes (the last may be shorter), through one buffer.

        Each piece is valid until the next is asked for. Raises: DamagedFileError.
        """
        # Not closed at the end: a piece may still be seen by somebody, and its memory goes with the last view.
        buffer = memoryview(mmap(-1, align_up(size) + 2 * PAGE))
        for done in range(0, nbytes, size):
            count, lead = min(size, nbytes - done), (offset + done) % PAGE
            try:
                self.read_into(offset + done, count, buffer, lead)
            except (OSError, EOFError) as error:
                raise DamagedFileError(
                    f"Reading {self.file.name} failed.",
                    f"{self.file}: {error}.",
                    "Remove the model and pull it again: a pull alone keeps a file that has its size.",
                ) from error
            yield buffer[lead : lead + count]

    def identity(self) -> tuple[int, int, int, int]:
        """(device, inode, size, modification time in ns): changes when the file is replaced or rewritten."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
