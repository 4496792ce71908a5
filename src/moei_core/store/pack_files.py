"""What a packing process leaves on disk: files written in place, and the journal of what is finished in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from moei_core.store.checksums import checksum
from moei_core.store.file_reader import FileReader

# Of a dense weight at a time; a multiple of every block's bytes in every float format.
CHUNK = 8 << 20
# Written bytes that may wait in the page cache: beyond, the kernel would stall us at a moment of its own.
_UNSYNCED = 256 << 20

Bytes = NDArray[np.uint8]


class PackFile:
    """A file of the store, written in place."""

    def __init__(self, path: Path, nbytes: int, fresh: bool) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._unsynced = 0
        if fresh:
            # What another plan left must not show through between two items.
            os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, nbytes)

    def __enter__(self) -> PackFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, offset: int, pieces: Iterable[Bytes]) -> str:
        """Put ``pieces`` one after the other at ``offset``. Returns their checksum."""
        digest = xxhash.xxh3_64()
        for piece in pieces:
            view = memoryview(piece.data)
            digest.update(view)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                offset, view = offset + written, view[written:]
                self._unsynced += written
        if self._unsynced >= _UNSYNCED:
            self.sync()
        return digest.hexdigest()

    def holds(self, offset: int, nbytes: int, expected: str) -> bool:
        """Whether the bytes there have the checksum ``expected``."""
        reader = FileReader(self._path)
        try:
            return checksum(reader.chunks(offset, nbytes, CHUNK)) == expected
        finally:
            reader.close()

    def sync(self) -> None:
        """Bring everything to the disk, and out of the page cache, which nobody will read it from."""
        os.fsync(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0


class Journal:
    """One line for the plan, then one for each finished item: its name and checksum."""

    def __init__(self, path: Path, plan: object) -> None:
        """plan: anything that JSON can hold; a journal of another one counts for nothing."""
        self._path = path
        self._stamp = checksum([json.dumps(plan, sort_keys=True).encode()])
        self._stream: TextIO | None = None

    def done(self) -> dict[str, str]:
        """The items that an earlier attempt at this very plan finished. A line cut short counts for nothing."""
        found: dict[str, str] = {}
        with suppress(OSError, UnicodeDecodeError):
            first, *lines = self._path.read_text(encoding="utf-8").split("\n")
            if first == self._stamp:
                # The last piece is what follows the last line end: nothing, or a line cut short.
                for line in lines[:-1]:
                    name, _, digest = line.rpartition(" ")
                    found[name] = digest
        return found

    def open(self) -> dict[str, str]:
        """Start writing, keeping what is ``done``, which is returned."""
        done = self.done()
        # Rewritten by a rename: it never ends in half a line, and a death here loses nothing.
        text = "".join([f"{self._stamp}\n", *(f"{name} {digest}\n" for name, digest in done.items())])
        write_synced(self._path, text.encode())
        self._stream = self._path.open("a", encoding="utf-8", buffering=1)
        return done

    def note(self, name: str, digest: str) -> None:
        assert self._stream is not None
        self._stream.write(f"{name} {digest}\n")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file whole: it appears by a rename, and both are on disk when this returns."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
