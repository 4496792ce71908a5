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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moei_core.config import format_size
from moei_core.hardware.disks import DiskFacts
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.reads import (
    TARGET_NBYTES,
    ExpertReads,
    Source,
    open_file,
    read_fully,
    read_target,
    try_direct,
)
from moei_core.hardware.profile import DiskProfile, Figure, ReadSpeed
from moei_core.store.base import PAGE

BLOCKS = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
DEPTHS = (1, 2, 4, 8, 16)
_LARGEST_FILE = 1 << 30
_SMALLEST_FILE = 8 << 20
_WRITTEN_AT_ONCE = 32 << 20
_INSTANT_S = 0.5
_FREE_SHARE = 10
"""A file of ours takes at most a tenth of what the disk has free."""


@dataclass(frozen=True, slots=True)
class DiskEffort:
    """seconds: of one disk, a file of ours written and all reads. file_nbytes: of that file. blocks, depths: the
    settings."""

    seconds: float = 8.0
    file_nbytes: int = _LARGEST_FILE
    blocks: tuple[int, ...] = BLOCKS
    depths: tuple[int, ...] = DEPTHS

    @property
    def settings(self) -> int:
        """How many settings are measured, besides the sustained run."""
        return len(self.blocks) * len(self.depths)


class DiskProbe:
    """Measures the disk of ``facts``. files: weights of models that lie on it; the largest is read.

    ``measure`` does most of it; ``sample`` before, between and afterwards looks at other moments, since a disk's speed
    changes from minute to minute. A disk that cannot be measured has a note that says why.
    """

    def __init__(
        self,
        facts: DiskFacts,
        files: Sequence[Path] = (),
        effort: DiskEffort | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        """allowance: of writing a file of ours; a disk that is slower than that is read in a smaller one."""
        self._facts, self._effort = facts, effort or DiskEffort()
        self._reads: list[ReadSpeed] = []
        self._sustained: Figure | None = None
        self._note = ""
        self._held = ExitStack()
        with self._failing_to_a_note():
            time_to_write = allowance or Allowance(self._effort.seconds)
            self._source = self._held.enter_context(_source(facts, files, self._effort, time_to_write))
            self._target = self._held.enter_context(read_target(max(*self._effort.blocks, TARGET_NBYTES)))
            sizes = [one for one in self._effort.blocks if one <= self._source.nbytes]
            self._experts = ExpertReads(self._source, self._target, sizes)

    @contextmanager
    def _failing_to_a_note(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._note = _why_not(self._facts, error)
            self._held.close()

    @property
    def number(self) -> str:
        return self._facts.number

    @property
    def bandwidth(self) -> float:
        """The best so far, bytes a second."""
        return max((read.bandwidth.value for read in self._reads), default=0.0)

    def sample(self, allowance: Allowance) -> None:
        """Read experts for so long."""
        if not self._note:
            with self._failing_to_a_note():
                self._experts.sample(allowance)

    def measure(self, allowance: Allowance, progress: Callable[[], None] = lambda: None) -> None:
        """Read in all settings, experts between them, and one of them for longer. progress: called after each."""
        if not self._note:
            with self._failing_to_a_note():
                self._measure(allowance, progress)

    def _measure(self, allowance: Allowance, progress: Callable[[], None]) -> None:
        source, effort = self._source, self._effort
        settings = [(nbytes, depth) for nbytes in effort.blocks for depth in effort.depths]
        # A quarter of the time for blocks and half for experts, whose rounds take longer; a quarter at the end.
        for number, (nbytes, depth) in enumerate(settings):
            left = 4 * len(settings) - 3 * number
            share = allowance.part(1 / left)
            if nbytes <= source.nbytes and self._affordable(nbytes * depth, allowance):
                self._reads.append(_measure(source, self._target, nbytes, depth, share))
            self._experts.sample(allowance.part(2 / (left - 1)))
            progress()
        best = max(self._reads, key=lambda read: read.bandwidth.value)
        self._sustained = _measure(source, self._target, best.nbytes, best.depth, allowance).bandwidth

    def _affordable(self, nbytes: int, allowance: Allowance) -> bool:
        """Whether reading so much once is done within a tenth of the time, or nothing was read yet."""
        if not self._reads:
            return True
        return nbytes / self.bandwidth <= max(0.1 * (allowance.left + allowance.spent), _INSTANT_S)

    def finish(self) -> DiskProfile:
        """What was found. The file of ours is gone."""
        with self._held:
            if self._note:
                return DiskProfile(self._facts, False, "", (), (), None, self._note)
            speeds, fresh = self._experts.speeds()
            source = self._source
            return DiskProfile(
                self._facts,
                source.direct,
                source.name,
                tuple(self._reads),
                speeds,
                self._sustained,
                fresh=fresh,
            )


def probe_disk(
    facts: DiskFacts,
    files: Sequence[Path] = (),
    effort: DiskEffort | None = None,
    progress: Callable[[], None] = lambda: None,
) -> DiskProfile:
    """Measure a disk at one go, for ``effort.seconds``. Other arguments as ``DiskProbe`` has them."""
    effort = effort or DiskEffort()
    allowance = Allowance(effort.seconds)
    probe = DiskProbe(facts, files, effort, allowance.part(0.5))
    try:
        probe.measure(allowance, progress)
    finally:
        profile = probe.finish()
    return profile


def _why_not(facts: DiskFacts, error: OSError) -> str:
    if facts.read_only or error.errno == errno.EROFS:
        return "mounted read-only, and no model is there that could be read"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"full: {format_size(facts.free)} are free, and no model is there that could be read"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{facts.folder} cannot be written, and no model is there that could be read"
    return f"{error.strerror or error}"


@contextmanager
def _source(
    facts: DiskFacts, files: Sequence[Path], effort: DiskEffort, allowance: Allowance
) -> Iterator[Source]:
    existing = _largest(files)
    if existing is not None:
        descriptor, direct = open_file(existing)
        try:
            yield Source(descriptor, os.fstat(descriptor).st_size, direct, f"the model file {existing.name}")
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
        size = _fill(descriptor, size, allowance)
        direct = try_direct(descriptor)
        yield Source(
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


def _fill(descriptor: int, size: int, allowance: Allowance) -> int:
    """Write ``size`` bytes, or as many as there is time for, but one of ``_SMALLEST_FILE``. Returns how many."""
    # Random bytes: some file systems store zeros and repetitions without storing them.
    block = random.Random(0).randbytes(4 << 20)
    at = 0
    while at < size and (at < _SMALLEST_FILE or not allowance.over):
        at += os.pwrite(descriptor, block[: size - at], at)
        if at % _WRITTEN_AT_ONCE == 0:
            # Else the page cache takes it all, and the time is spent when nobody looks at the clock.
            os.fdatasync(descriptor)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, at, os.POSIX_FADV_DONTNEED)
    return at


def _measure(source: Source, target: memoryview, nbytes: int, depth: int, allowance: Allowance) -> ReadSpeed:
    """Read random blocks until the time is over, each of ``depth`` threads at least one.

    Many large blocks at a time share the memory of ``target``: nobody looks at what arrives.
    """
    positions = list(range(source.nbytes // nbytes))
    random.Random(nbytes * depth).shuffle(positions)
    latencies: list[float] = []
    taken = 0
    lock = threading.Lock()
    clock = allowance.clock
    started = clock()

    def reader(start: int) -> int:
        nonlocal taken
        done = 0
        view = target[start : start + nbytes]
        while True:
            with lock:
                # Every block once before any a second time: a repeated read may come from a cache below.
                position = positions[taken % len(positions)]
                taken += 1
            before = clock()
            read_fully(source, view, position * nbytes)
            with lock:
                latencies.append(clock() - before)
            done += nbytes
            if allowance.over:
                return done

    with ThreadPoolExecutor(depth) as pool:
        starts = (number * nbytes % (len(target) - nbytes + PAGE) for number in range(depth))
        total = sum(future.result() for future in [pool.submit(reader, start) for start in starts])
    elapsed = max(clock() - started, 1e-9)
    latency = Figure.of(latencies)
    value = total / elapsed
    low, high = depth * nbytes / max(latency.high, 1e-9), depth * nbytes / max(latency.low, 1e-9)
    return ReadSpeed(nbytes, depth, Figure(value, min(low, value), max(high, value)), latency)
