"""Reading experts from a disk as the engine does, to tell how fast that is."""

from __future__ import annotations

import errno
import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from moei_core.config import CHUNK_NBYTES, READERS
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.profile import Figure, ReadSpeed
from moei_core.store.base import PAGE, align_down
from moei_core.store.checksums import checksum
from moei_core.store.slot_memory import slot_memory

TARGET_NBYTES = 128 << 20
FRESH_NBYTES = 16 << 20
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_TOGETHER = 4
"""Experts that a layer lacks at once."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that is read. direct: past the page cache."""

    descriptor: int
    nbytes: int
    direct: bool
    name: str


def open_file(file: Path) -> tuple[int, bool]:
    """(descriptor, whether it is read past the page cache). Raises: OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return descriptor, try_direct(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def try_direct(descriptor: int) -> bool:
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


@contextmanager
def read_target(nbytes: int) -> Iterator[memoryview]:
    """Page-aligned memory that is there already: the first touch of a page costs more than reading into it."""
    with slot_memory(nbytes) as memory, memoryview(memory) as view:
        view[::PAGE] = bytes(len(range(0, nbytes, PAGE)))
        yield view


class ExpertReads:
    """Reads experts as the engine does for one layer: some at once, in chunks that readers take in turn, each hashed
    when its last chunk is there, until all of them are.

    A disk's speed changes from second to second, so each size is read a little at a time, in places all over the
    file, at every moment that ``sample`` is called, and one size also into memory that nobody has touched: whoever
    writes to a page first waits for the kernel.
    """

    def __init__(self, source: Source, target: memoryview, sizes: Sequence[int]) -> None:
        self._source, self._target = source, target
        self._samples: dict[tuple[int, bool], list[list[float]]] = {(nbytes, False): [] for nbytes in sizes}
        self._fresh = max((nbytes for nbytes in sizes if nbytes <= FRESH_NBYTES), default=None)
        if self._fresh is not None:
            self._samples[self._fresh, True] = []
        self._spent = dict.fromkeys(self._samples, 0.0)
        self._random = random.Random(0)

    def sample(self, allowance: Allowance) -> None:
        """One moment: read until it is over, whatever size had the least time so far; each size at the first one.

        So on a slow disk large experts are not read at every moment.
        """
        for samples in self._samples.values():
            samples.append([])
        with ThreadPoolExecutor(READERS) as pool:
            while True:
                kind = min(self._spent, key=lambda one: self._spent[one])
                if allowance.over and self._spent[kind]:
                    return
                seconds = self._read(pool, *kind, allowance.clock)
                self._spent[kind] += seconds
                self._samples[kind][-1].append(seconds)

    def speeds(self) -> tuple[tuple[ReadSpeed, ...], ReadSpeed | None]:
        """(by size, into fresh memory). The median of all reads; its range is that of the moments, not of reads."""
        found = {kind: self._speed(kind[0], samples) for kind, samples in self._samples.items()}
        fresh = None if self._fresh is None else found[self._fresh, True]
        return tuple(speed for (_, is_fresh), speed in found.items() if not is_fresh), fresh

    def _speed(self, nbytes: int, moments: list[list[float]]) -> ReadSpeed:
        together = self._together(nbytes)
        usual = statistics.median(one for moment in moments for one in moment)
        each = Figure.of([statistics.median(moment) for moment in moments if moment])
        seconds = Figure(usual, min(each.low, usual), max(each.high, usual))
        whole = together * nbytes
        return ReadSpeed(
            nbytes,
            READERS,
            Figure(whole / seconds.value, whole / seconds.high, whole / seconds.low),
            Figure(seconds.value / together, seconds.low / together, seconds.high / together),
        )

    def _together(self, nbytes: int) -> int:
        return max(1, min(_TOGETHER, TARGET_NBYTES // nbytes, self._source.nbytes // nbytes))

    def _read(self, pool: ThreadPoolExecutor, nbytes: int, fresh: bool, clock: Callable[[], float]) -> float:
        """Seconds of reading some experts at once."""
        together = self._together(nbytes)
        places = self._random.sample(range(self._source.nbytes // nbytes), together)
        with (
            slot_memory(together * nbytes) if fresh else nullcontext(self._target) as room,
            memoryview(room) as into,
        ):
            started = clock()
            reads = [
                pool.submit(
                    _read_chunk, self._source, place * nbytes + start, into, number * nbytes, start, nbytes
                )
                for number, place in enumerate(places)
                for start in range(0, nbytes, min(nbytes, CHUNK_NBYTES))
            ]
            wait(reads)  # all, since the memory is about to go
            elapsed = max(clock() - started, 1e-9)
        for one in reads:
            one.result()
        return elapsed


_MOMENTS = 4
_AGAIN_NBYTES = 4 << 20
"""Two chunks: eight of them in memory are little beside what a model that is loaded has not used yet of its budget."""


def read_again(file: Path, nbytes: int, seconds: float) -> tuple[ReadSpeed, ReadSpeed | None] | None:
    """Read experts of ``nbytes`` (large ones in part) all over ``file`` for so long: (as in ``DiskProfile.experts``, as
    in ``fresh``).

    None if the file cannot be opened, or is so small that what is read once is known. Raises: OSError while reading.
    """
    size = align_down(min(nbytes, _AGAIN_NBYTES))
    try:
        descriptor, direct = open_file(file)
    except OSError:
        return None
    try:
        source = Source(descriptor, os.fstat(descriptor).st_size, direct, file.name)
        if source.nbytes < 2 * _TOGETHER * size:
            return None
        with read_target(_TOGETHER * size) as target:
            reads, allowance = ExpertReads(source, target, [size]), Allowance(seconds)
            for number in range(_MOMENTS):
                reads.sample(allowance.part(1 / (_MOMENTS - number)))
            (now,), fresh = reads.speeds()
            return now, fresh
    finally:
        os.close(descriptor)


def _read_chunk(source: Source, offset: int, into: memoryview, base: int, start: int, nbytes: int) -> None:
    """A chunk of the expert of ``nbytes`` that goes to ``base``, and its hash."""
    chunk = into[base + start : base + min(start + CHUNK_NBYTES, nbytes)]
    read_fully(source, chunk, offset)
    checksum([chunk])


def read_fully(source: Source, view: memoryview, offset: int) -> None:
    """Fill ``view`` from there on. Raises: OSError, also if the file ends before that."""
    got = 0
    while got < len(view):
        count = os.preadv(source.descriptor, [view[got:]], offset + got)
        if count == 0:
            raise OSError(errno.EIO, "the file has become shorter while it was read")
        got += count
    if not source.direct and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(source.descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
