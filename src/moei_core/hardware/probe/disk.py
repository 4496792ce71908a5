"""How fast a disk gives expert-sized blocks. Reads a model's own file where there is one.

Otherwise it writes a file that has no name: with ``O_TMPFILE``, or unlinked before its first byte, so that it is
gone whatever ends this process.
"""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from moei_core.config import CHUNK_NBYTES, READERS, format_size
from moei_core.hardware.disks import DiskFacts
from moei_core.hardware.profile import DiskProfile, Figure, ReadSpeed
from moei_core.store.base import PAGE
from moei_core.store.checksums import checksum

BLOCKS = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
DEPTHS = (1, 2, 4, 8, 16)
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_LARGEST_FILE = 1 << 30
_SMALLEST_FILE = 8 << 20
_TARGET = 128 << 20
_FRESH_NBYTES = 16 << 20
_TOGETHER = 4
"""Experts that a layer lacks at once."""
_FREE_SHARE = 10
"""A file of ours takes at most a tenth of what the disk has free."""


@dataclass(frozen=True, slots=True)
class DiskEffort:
    """seconds: of all reads of one disk. file_nbytes: of a file of ours. blocks, depths: the settings."""

    seconds: float = 7.0
    file_nbytes: int = _LARGEST_FILE
    blocks: tuple[int, ...] = BLOCKS
    depths: tuple[int, ...] = DEPTHS

    @property
    def settings(self) -> int:
        """How many settings are measured, besides the sustained run."""
        return len(self.blocks) * len(self.depths)


@dataclass(frozen=True, slots=True)
class _Source:
    descriptor: int
    nbytes: int
    direct: bool
    name: str


def probe_disk(
    facts: DiskFacts,
    files: Sequence[Path] = (),
    effort: DiskEffort | None = None,
    progress: Callable[[], None] = lambda: None,
) -> DiskProfile:
    """Measure the disk of ``facts``. files: weights of models that lie on it; the largest is read.

    progress: called after each setting. A disk that cannot be measured has a note that says why.
    """
    effort = effort or DiskEffort()
    try:
        with _source(facts, files, effort) as source, _target(max(*effort.blocks, _TARGET)) as target:
            experts = _ExpertReads(source, target, [one for one in effort.blocks if one <= source.nbytes])
            reads = []
            # A quarter of the time for blocks and one for experts, whose rounds take longer; a fifth at the end.
            share = 0.25 * effort.seconds / (len(effort.blocks) * len(effort.depths))
            for nbytes in effort.blocks:
                for depth in effort.depths:
                    if nbytes <= source.nbytes:
                        reads.append(_measure(source, target, nbytes, depth, share))
                    experts.sample(share)
                    progress()
            best = max(reads, key=lambda read: read.bandwidth.value)
            sustained = _measure(source, target, best.nbytes, best.depth, 0.2 * effort.seconds).bandwidth
            speeds, fresh = experts.speeds()
            return DiskProfile(
                facts, source.direct, source.name, tuple(reads), speeds, sustained, fresh=fresh
            )
    except OSError as error:
        return DiskProfile(facts, False, "", (), (), None, _why_not(facts, error))


def _why_not(facts: DiskFacts, error: OSError) -> str:
    if facts.read_only or error.errno == errno.EROFS:
        return "mounted read-only, and no model is there that could be read"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"full: {format_size(facts.free)} are free, and no model is there that could be read"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{facts.folder} cannot be written, and no model is there that could be read"
    return f"{error.strerror or error}"


@contextmanager
def _source(facts: DiskFacts, files: Sequence[Path], effort: DiskEffort) -> Iterator[_Source]:
    existing = _largest(files)
    if existing is not None:
        descriptor, direct = _open(existing)
        try:
            yield _Source(descriptor, os.fstat(descriptor).st_size, direct, f"the model file {existing.name}")
        finally:
            os.close(descriptor)
        return
    if facts.read_only:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    size = min(effort.file_nbytes, facts.free // _FREE_SHARE)
    if size < min(_SMALLEST_FILE, effort.file_nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    size -= size % (1 << 20)
    descriptor = nameless_file(Path(facts.folder))
    try:
        _fill(descriptor, size)
        direct = _try_direct(descriptor)
        yield _Source(
            descriptor,
            size,
            direct,
            f"a file of {format_size(size)}, written for this and gone; old files may be slower",
        )
    finally:
        os.close(descriptor)


def _largest(files: Sequence[Path]) -> Path | None:
    sizes: list[tuple[int, Path]] = []
    for file in files:
        with suppress(OSError):
            if os.access(file, os.R_OK):
                sizes.append((file.stat().st_size, file))
    size, file = max(sizes, default=(0, Path()))
    return file if size >= _SMALLEST_FILE else None


def _open(file: Path) -> tuple[int, bool]:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return descriptor, _try_direct(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def nameless_file(folder: Path) -> int:
    """The descriptor of an empty file in ``folder`` that no name leads to. Raises: OSError."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # File systems without it (NFS, some overlays) say one of these.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
    descriptor, name = tempfile.mkstemp(prefix=".moei-probe-", dir=folder)
    Path(name).unlink()
    return descriptor


def _try_direct(descriptor: int) -> bool:
    """Switch to reading past the page cache. Returns whether the file system does that."""
    if not _O_DIRECT:
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT)
        with mmap(-1, 1 << 16) as page:
            os.preadv(descriptor, [page], 0)
    except OSError:
        # Not told (tmpfs), or told only by the first read.
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return False
    return True


def _fill(descriptor: int, size: int) -> None:
    # Random bytes: some file systems store zeros and repetitions without storing them.
    block = random.Random(0).randbytes(4 << 20)
    at = 0
    while at < size:
        at += os.pwrite(descriptor, block[: size - at], at)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)


@contextmanager
def _target(nbytes: int) -> Iterator[memoryview]:
    """Page-aligned memory that is there already: the first touch of a page costs more than reading into it."""
    with mmap(-1, nbytes) as memory, memoryview(memory) as view:
        view[::PAGE] = bytes(len(range(0, nbytes, PAGE)))
        yield view


class _ExpertReads:
    """Reads experts as the engine does for one layer: some at once, in chunks that readers take in turn, each hashed
    when its last chunk is there, until all of them are.

    A disk's speed changes from second to second, so each size is read a little at a time, all through the
    measurement, and one size also into memory that nobody has touched: whoever writes to a page first waits for the
    kernel.
    """

    def __init__(self, source: _Source, target: memoryview, sizes: Sequence[int]) -> None:
        self._source, self._target = source, target
        self._samples: dict[tuple[int, bool], list[float]] = {(nbytes, False): [] for nbytes in sizes}
        self._fresh = max((nbytes for nbytes in sizes if nbytes <= _FRESH_NBYTES), default=None)
        if self._fresh is not None:
            self._samples[self._fresh, True] = []
        self._random = random.Random(0)

    def sample(self, seconds: float) -> None:
        """Read each size at least once, for about ``seconds`` in all."""
        with ThreadPoolExecutor(READERS) as pool:
            for (nbytes, fresh), samples in self._samples.items():
                end = time.perf_counter() + seconds / len(self._samples)
                samples.append(self._read(pool, nbytes, fresh))
                while time.perf_counter() < end:
                    samples.append(self._read(pool, nbytes, fresh))

    def speeds(self) -> tuple[tuple[ReadSpeed, ...], ReadSpeed | None]:
        """(by size, into fresh memory)."""
        found = {kind: self._speed(kind[0], samples) for kind, samples in self._samples.items()}
        fresh = None if self._fresh is None else found[self._fresh, True]
        return tuple(speed for (_, is_fresh), speed in found.items() if not is_fresh), fresh

    def _speed(self, nbytes: int, samples: list[float]) -> ReadSpeed:
        together = self._together(nbytes)
        rates = Figure.of([together * nbytes / one for one in samples])
        return ReadSpeed(nbytes, READERS, rates, Figure.of([one / together for one in samples]))

    def _together(self, nbytes: int) -> int:
        return max(1, min(_TOGETHER, _TARGET // nbytes, self._source.nbytes // nbytes))

    def _read(self, pool: ThreadPoolExecutor, nbytes: int, fresh: bool) -> float:
        """Seconds of reading some experts at once."""
        together = self._together(nbytes)
        places = self._random.sample(range(self._source.nbytes // nbytes), together)
        with (
            mmap(-1, together * nbytes) if fresh else nullcontext(self._target) as room,
            memoryview(room) as into,
        ):
            started = time.perf_counter()
            reads = [
                pool.submit(
                    _read_chunk, self._source, place * nbytes + start, into, number * nbytes, start, nbytes
                )
                for number, place in enumerate(places)
                for start in range(0, nbytes, min(nbytes, CHUNK_NBYTES))
            ]
            wait(reads)  # all, since the memory is about to go
            elapsed = time.perf_counter() - started
        for one in reads:
            one.result()
        return elapsed


def _read_chunk(source: _Source, offset: int, into: memoryview, base: int, start: int, nbytes: int) -> None:
    """A chunk of the expert of ``nbytes`` that goes to ``base``, and if it is the last one, the expert's hash."""
    stop = min(start + CHUNK_NBYTES, nbytes)
    _read_fully(source, into[base + start : base + stop], offset)
    if stop == nbytes:
        checksum([into[base : base + nbytes]])


def _read_fully(source: _Source, view: memoryview, offset: int) -> None:
    got = 0
    while got < len(view):
        count = os.preadv(source.descriptor, [view[got:]], offset + got)
        if count == 0:
            raise OSError(errno.EIO, "the file has become shorter while it was read")
        got += count
    if not source.direct and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(source.descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)


def _measure(source: _Source, target: memoryview, nbytes: int, depth: int, seconds: float) -> ReadSpeed:
    """Read random blocks for ``seconds``, each of ``depth`` threads at least one.

    Many large blocks at a time share the memory of ``target``: nobody looks at what arrives.
    """
    positions = list(range(source.nbytes // nbytes))
    random.Random(nbytes * depth).shuffle(positions)
    latencies: list[float] = []
    taken = 0
    lock = threading.Lock()
    started = time.perf_counter()
    end = started + seconds

    def reader(start: int) -> int:
        nonlocal taken
        done = 0
        view = target[start : start + nbytes]
        while True:
            with lock:
                # Every block once before any a second time: a repeated read may come from a cache below.
                position = positions[taken % len(positions)]
                taken += 1
            before = time.perf_counter()
            _read_fully(source, view, position * nbytes)
            now = time.perf_counter()
            with lock:
                latencies.append(now - before)
            done += nbytes
            if now >= end:
                return done

    with ThreadPoolExecutor(depth) as pool:
        starts = (number * nbytes % (len(target) - nbytes + PAGE) for number in range(depth))
        total = sum(future.result() for future in [pool.submit(reader, start) for start in starts])
    elapsed = time.perf_counter() - started
    latency = Figure.of(latencies)
    value = total / elapsed
    low, high = depth * nbytes / max(latency.high, 1e-9), depth * nbytes / max(latency.low, 1e-9)
    return ReadSpeed(nbytes, depth, Figure(value, min(low, value), max(high, value)), latency)
