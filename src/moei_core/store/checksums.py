"""Checksums of experts, computed at the first read ever and compared at every later one.

They are kept by file identity (device, inode, size, modification time): a file that was replaced starts anew,
a file whose bytes changed behind an unchanged identity (a failing disk, a bad cable) is caught by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from moei_core.paths import cache_dir
from moei_core.store.base import Extent
from moei_core.types import ExpertKey

_VERSION = 1
Identity = tuple[int, int, int, int]


def checksum(pieces: Iterable[memoryview | bytes]) -> str:
    """The xxh3 (64 bits, hexadecimal) of the pieces one after the other."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class RunningChecksum:
    """The checksum of an expert while its chunks arrive, in any order and from several threads.

    A chunk is taken in as soon as all before it are there, while others are read: after the last one little is left.
    """

    def __init__(self, chunks: Iterable[Extent]) -> None:
        """chunks: in the order in which ``checksum`` would take them."""
        self._left = deque(chunks)
        # Places in the slot.
        self._there: set[int] = set()
        self._taking = False
        self._lock = threading.Lock()
        self._digest = xxhash.xxh3_64()

    def arrived(self, chunk: Extent, slot: memoryview) -> None:
        """``chunk`` is in ``slot``. Complete once this has returned for every one."""
        with self._lock:
            self._there.add(chunk.slot_offset)
            if self._taking:
                # Who takes in what was there before looks again.
                return
            self._taking = True
        while (next_one := self._next()) is not None:
            start = next_one.slot_offset
            self._digest.update(slot[start : start + next_one.nbytes])

    def _next(self) -> Extent | None:
        with self._lock:
            if self._left and self._left[0].slot_offset in self._there:
                return self._left.popleft()
            self._taking = False
            return None

    def hexdigest(self) -> str:
        """As ``checksum`` gives it."""
        assert not self._left
        return self._digest.hexdigest()


class ChecksumLedger:
    """The known checksums of one set of files. Thread-safe; a home that cannot be written is no error."""

    def __init__(self, identities: Mapping[Path, Identity]) -> None:
        stamp = json.dumps(
            [_VERSION, sorted((str(path), *identity) for path, identity in identities.items())]
        )
        name = hashlib.sha256(stamp.encode()).hexdigest()[:32]
        self._path = cache_dir() / "checksums" / f"{name}.json"
        self._lock = threading.Lock()
        self._known = self._load()
        self._dirty = False

    def check(self, key: ExpertKey, found: str) -> bool:
        """Whether this is the checksum of the first read of ``key``. That of the first read itself always is."""
        name = f"{key.layer}.{key.expert}"
        with self._lock:
            known = self._known.setdefault(name, found)
            self._dirty |= len(self._known) != self._saved
        return known == found

    def save(self) -> None:
        """Write what was learned, atomically."""
        with self._lock:
            if not self._dirty:
                return
            text = json.dumps(self._known)
            self._dirty, self._saved = False, len(self._known)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".checksums-")
            try:
                with os.fdopen(descriptor, "w") as stream:
                    stream.write(text)
                Path(temporary).replace(self._path)
            except OSError:
                Path(temporary).unlink(missing_ok=True)

    def _load(self) -> dict[str, str]:
        known: object = {}
        # A missing, unreadable or garbled ledger only means that experts are read for the first time again.
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._path.read_text())
        entries = known if isinstance(known, dict) else {}
        self._saved = len(entries)
        return {str(name): str(digest) for name, digest in entries.items()}
