"""One file from the hub into the Hugging Face cache: resumed inside the file, verified, moved under a lock.

Why not ``hf_hub_download``: version 2 writes to a partial file with a random name for each attempt and
deletes it on failure, so that two processes never append to one file on file systems where locks silently do
nothing. A killed download of a 5 GB shard then starts again at zero. Here the partial file is keyed by etag
and written at explicit offsets, never appended to, so two writers of one etag write the same bytes to the
same places.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx2
from filelock import Timeout
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import WeakFileLock

from moei_core.config import format_size
from moei_core.errors import DamagedFileError, DoesNotFitError, MoeiError
from moei_core.hub.layout import RepoCache, is_checksum
from moei_core.hub.remote import Remote, Stopped

_READ_NBYTES = 8 * 2**20


class PullProgress(Protocol):
    """What a pull tells whoever shows it. Called from several threads."""

    def start(self, total: int, present: int) -> None:
        """The pull is about ``total`` bytes, of which ``present`` are here already."""

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more are here; negative if a file had to be started again."""

    def note(self, text: str) -> None:
        """A sentence worth reading: a wait, a repetition."""


class SilentProgress:
    """Shows nothing."""

    def start(self, total: int, present: int) -> None:
        return

    def advance(self, nbytes: int) -> None:
        return

    def note(self, text: str) -> None:
        return


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file that a pull needs.

    etag: sha256 (LFS) or git-sha1, as the hub gives it; the blob's name in the cache and its checksum.
    content: the bytes, where planning had to read them anyway (config and index).
    """

    name: str
    nbytes: int
    etag: str
    content: bytes | None = None


class Transfer:
    """Brings files of one commit into the cache.

    own: called with an etag just before moei's own file becomes a blob of the cache.
    """

    def __init__(
        self,
        cache: RepoCache,
        commit: str,
        remote: Remote,
        progress: PullProgress,
        own: Callable[[str], None],
    ) -> None:
        self._cache = cache
        self._commit = commit
        self._remote = remote
        self._progress = progress
        self._own = own

    def bring(self, file: PlannedFile) -> None:
        """Make ``snapshots/<commit>/<name>`` exist and be right.

        Raises: DamagedFileError if the bytes are wrong twice, DoesNotFitError, MoeiError, Stopped.
        """
        pointer = self._cache.snapshot(self._commit) / file.name
        if is_copy(pointer, file):
            return
        credited = nbytes_here(self._cache, file)
        for attempt in (1, 2):
            # Content read while planning was verified then; a second attempt downloads it like any other.
            current = file if file.content is not None and attempt == 1 else self._ask(file)
            if current.etag != file.etag and attempt == 1:
                self._progress.note(f"{file.name} has changed on the hub; starting it again.")
            with blob_lock(self._cache, current.etag, self._remote.stop, self._progress):
                if blob_is_here(self._cache, current):
                    self._progress.advance(current.nbytes - credited)
                    link(self._cache.blob(current.etag), pointer)
                    return
                if self._receive(current, credited):
                    link(self._cache.blob(current.etag), pointer)
                    return
            self._progress.advance(-current.nbytes)
            credited = 0
            if attempt == 1:
                self._progress.note(f"{file.name} arrived damaged; downloading it again.")
        raise damaged_twice(file.name, self._cache.repo)

    def _ask(self, file: PlannedFile) -> PlannedFile:
        """``file`` as the hub serves it now."""
        metadata = self._remote.file_metadata(self._commit, file.name)
        etag = metadata.etag if metadata.etag and is_checksum(metadata.etag) else file.etag
        nbytes = file.nbytes if metadata.size is None else metadata.size
        return PlannedFile(file.name, nbytes, etag)

    def _receive(self, file: PlannedFile, credited: int) -> bool:
        """Fill the partial file and make it the blob; False (and no partial file) if its checksum is wrong.

        credited: bytes of this file that the progress already counts as here.
        """
        partial = self._cache.partial(file.etag)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(partial):
            # Without O_TRUNC: what is there is resumed. O_NOFOLLOW: a planted link is not written through.
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                digest = _Filling(fd, file, self._remote, self._commit, self._progress, credited).fill()
                if digest == file.etag:
                    os.fsync(fd)
            finally:
                os.close(fd)
            if digest != file.etag:
                partial.unlink(missing_ok=True)
                return False
            self._own(file.etag)
            with suppress(FileNotFoundError):
                # Gone only where locks do nothing and another pull of the same bytes has just moved it.
                partial.replace(self._cache.blob(file.etag))
        return True


class _Filling:
    """The state of one file while its bytes arrive: offset and running checksum."""

    def __init__(
        self, fd: int, file: PlannedFile, remote: Remote, commit: str, progress: PullProgress, credited: int
    ) -> None:
        self._fd = fd
        self._file = file
        self._remote = remote
        self._commit = commit
        self._progress = progress
        self._offset = 0
        self._credited = credited
        self._hash = new_checksum(file.etag, file.nbytes)

    def fill(self) -> str:
        """Returns the checksum of the whole file."""
        self._take_up_partial()
        if self._file.content is not None:
            self._accept(self._file.content[self._offset :])
        failures = 0
        while self._offset < self._file.nbytes:
            before = self._offset
            try:
                self._read_stream()
            except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
                if before and _range_refused(error):
                    self._restart()
                    continue
                failures = 1 if self._offset > before else failures + 1
                self._remote.wait_or_raise(error, failures, self._commit)
        return self._hash.hexdigest()

    def _take_up_partial(self) -> None:
        """Count and check-sum what an earlier attempt left."""
        there = os.fstat(self._fd).st_size
        if there > self._file.nbytes:
            os.ftruncate(self._fd, 0)
            there = 0
        self._progress.advance(there - self._credited)
        while self._offset < there:
            block = os.pread(self._fd, min(_READ_NBYTES, there - self._offset), self._offset)
            if not block:
                break
            self._hash.update(block)
            self._offset += len(block)
            if self._remote.stop.is_set():
                raise Stopped

    def _read_stream(self) -> None:
        with self._remote.stream(self._commit, self._file.name, self._offset) as response:
            first = _first_byte(response)
            if first != self._offset:
                self._restart()
                if first != 0:
                    raise httpx2.RemoteProtocolError("The server answered with other bytes than asked for.")
            # Raw reads go to the file as they arrive: a kill loses one network read, not a chunk.
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            for data in response.iter_bytes() if encoded else response.iter_raw():
                if self._remote.stop.is_set():
                    raise Stopped
                self._accept(data[: self._file.nbytes - self._offset])
                if self._offset == self._file.nbytes:
                    return
            if self._offset < self._file.nbytes:
                raise httpx2.RemoteProtocolError(f"The server ended {self._file.name} too early.")

    def _accept(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self._offset)
            self._hash.update(view[:written])
            self._offset += written
            self._progress.advance(written)
            view = view[written:]

    def _restart(self) -> None:
        """From the first byte again. Not truncated: the same bytes are written over."""
        self._progress.advance(-self._offset)
        self._offset = 0
        self._hash = new_checksum(self._file.etag, self._file.nbytes)


def blob_is_here(cache: RepoCache, file: PlannedFile) -> bool:
    """Whether the blob of ``file`` exists with the right size. A blob was verified before it got its name."""
    with suppress(OSError):
        return cache.blob(file.etag).stat().st_size == file.nbytes
    return False


def is_copy(pointer: Path, file: PlannedFile) -> bool:
    """Whether the snapshot holds ``file`` itself instead of a link, as it does where links are impossible."""
    with suppress(OSError):
        return not pointer.is_symlink() and pointer.stat().st_size == file.nbytes
    return False


def nbytes_here(cache: RepoCache, file: PlannedFile) -> int:
    """Bytes of ``file`` that are in the cache, as a blob or partly."""
    if blob_is_here(cache, file):
        return file.nbytes
    with suppress(OSError):
        return min(cache.partial(file.etag).stat().st_size, file.nbytes)
    return 0


def _first_byte(response: httpx2.Response) -> int:
    """The offset of the first byte of an answer."""
    if response.status_code != 206 or response.headers.get("Content-Encoding", "identity") != "identity":
        return 0
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else -1


def _range_refused(error: Exception) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code == 416


def damaged_twice(name: str, repo: str) -> DamagedFileError:
    """The error for a file whose bytes were wrong, and wrong again."""
    return DamagedFileError(
        f"{name} of {repo} arrived damaged twice and was deleted.",
        "Its checksum is not the one that the hub gives for it.",
        "Pull again; if it happens again, suspect the proxy, the memory or the disk of this machine.",
    )


def new_checksum(etag: str, nbytes: int) -> hashlib._Hash:
    """The running checksum that ends as ``etag``: sha256 of LFS files, git's blob hash of the others."""
    if len(etag) == 64:
        return hashlib.sha256()
    checksum = hashlib.sha1(usedforsecurity=False)
    checksum.update(b"blob %d\0" % nbytes)
    return checksum


@contextmanager
def blob_lock(cache: RepoCache, etag: str, stop: threading.Event, progress: PullProgress) -> Iterator[None]:
    """The hub's own lock of a blob. Waiting ends when ``stop`` is set."""
    path = cache.lock(etag)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        if stop.is_set():
            raise Stopped
        lock = WeakFileLock(path, timeout=0.5)
        try:
            with disk_errors(path):
                lock.__enter__()
        except Timeout:
            if not told:
                progress.note(f"Another download of {cache.repo} is running; waiting for its files.")
            told = True
            continue
        try:
            yield
        finally:
            lock.__exit__(None, None, None)
        return


def link(blob: Path, pointer: Path) -> None:
    """Make ``pointer`` a relative link to ``blob``, whatever it was. The caller holds the blob's lock."""
    target = os.path.relpath(blob, pointer.parent)
    with disk_errors(pointer):
        if pointer.is_symlink() and os.readlink(pointer) == target:  # noqa: PTH115 (compares text)
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(target)
        except FileExistsError:
            # Only where locks do nothing: another pull of the same bytes was a moment faster.
            return
        except OSError:
            # A file system without symbolic links: a hard link costs no space either.
            pointer.hardlink_to(blob)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about the disk into sentences."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (httpx2.HTTPError, OfflineModeIsEnabled, Timeout)):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFitError(
                f"The disk is full: {path.parent} has no space left.",
                f"{format_size(_free(path.parent))} are free.",
                "Free some space and pull again: what has arrived is kept.",
            ) from error
        raise MoeiError(
            f"{path.parent} cannot be written.",
            f"{error.strerror or error}.",
            "Set HF_HOME to a folder that you may write, or ask its owner.",
        ) from error


def _free(folder: Path) -> int:
    statistics = os.statvfs(folder)
    return statistics.f_bavail * statistics.f_frsize
