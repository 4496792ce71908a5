"""What moei itself downloaded, so that ``rm`` deletes that and nothing else.

Two things are kept for each repository under ``<data>/library/models--owner--name/``:

- ``<revision>.json``: the plan of a pull (files, sizes, checksums), written before its first byte, so that an
  interrupted pull can be shown and removed;
- ``downloaded``: one line, ``etag cache-folder``, for each blob that moei put into a cache. Blobs that were
  there before, or that other tools brought, are not in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moei_core.errors import MoeiError
from moei_core.hub.layout import RepoCache, cached_repos, is_checksum, is_commit, is_repo_id, is_safe_name
from moei_core.paths import data_dir

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class PullRecord:
    """The plan of a pull. files: name -> (nbytes, etag)."""

    repo: str
    revision: str
    commit: str
    cache_dir: Path
    files: dict[str, tuple[int, str]]
    licence: str = ""
    started: str = ""

    @property
    def nbytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.files.values())

    @property
    def etags(self) -> set[str]:
        return {etag for _, etag in self.files.values()}


def now() -> str:
    """The time of day as it is recorded."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_dir() -> Path:
    """Where the records are."""
    return data_dir() / "library"


def _folder(repo: str) -> Path:
    return library_dir() / RepoCache(Path(), repo).folder.name


def _record_path(repo: str, revision: str) -> Path:
    return _folder(repo) / (quote(revision, safe="") + ".json")


def write_record(record: PullRecord) -> None:
    """Remember ``record``, replacing an earlier one of the same revision."""
    content = {
        "format_version": _FORMAT_VERSION,
        "repo": record.repo,
        "revision": record.revision,
        "commit": record.commit,
        "cache_dir": str(record.cache_dir),
        "licence": record.licence,
        "started": record.started,
        "files": {
            name: {"nbytes": nbytes, "etag": etag} for name, (nbytes, etag) in sorted(record.files.items())
        },
    }
    with _writable(record.repo):
        _replace(_record_path(record.repo, record.revision), json.dumps(content, indent=1) + "\n")


def records(repo: str | None = None, cache_dir: Path | None = None) -> list[PullRecord]:
    """All records, those of ``repo``, those about ``cache_dir``. Damaged ones are passed over."""
    root = library_dir() if repo is None else _folder(repo)
    found = []
    for path in sorted(root.glob("*/*.json" if repo is None else "*.json")) if root.is_dir() else ():
        record = _read_record(path)
        if record is not None and cache_dir in (None, record.cache_dir):
            found.append(record)
    return found


def _read_record(path: Path) -> PullRecord | None:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {name: (int(facts["nbytes"]), str(facts["etag"])) for name, facts in content["files"].items()}
        record = PullRecord(
            repo=content["repo"],
            revision=content["revision"],
            commit=content["commit"],
            cache_dir=Path(content["cache_dir"]),
            files=files,
            licence=content.get("licence", ""),
            started=content.get("started", ""),
        )
        # Names and etags become paths that `rm` deletes, so a tampered record is as good as none.
        names_fine = all(is_safe_name(name) and is_checksum(etag) for name, (_, etag) in files.items())
        known = content["format_version"] == _FORMAT_VERSION and is_repo_id(record.repo)
        if names_fine and known and is_commit(record.commit) and is_safe_name(record.revision):
            return record
    return None


def forget_record(repo: str, revision: str) -> None:
    """Remove the record of one revision, and the repository's folder when nothing is left in it."""
    with _writable(repo):
        _record_path(repo, revision).unlink(missing_ok=True)
    if not records(repo) and not any(_ledger_lines(repo)):
        for name in ("downloaded", ".lock"):
            (_folder(repo) / name).unlink(missing_ok=True)
        with suppress(OSError):
            _folder(repo).rmdir()


def own(cache: RepoCache, etag: str) -> None:
    """Remember that moei put this blob into this cache. Called before the blob gets its name."""
    line = f"{etag} {cache.cache_dir}"
    with _writable(cache.repo), _locked(cache.repo):
        if line not in _ledger_lines(cache.repo):
            with (_folder(cache.repo) / "downloaded").open("a", encoding="utf-8") as ledger:
                ledger.write(line + "\n")


def owned(cache: RepoCache) -> set[str]:
    """Etags of the blobs that moei put into this cache."""
    pairs = (line.partition(" ") for line in _ledger_lines(cache.repo))
    return {etag for etag, _, folder in pairs if Path(folder) == cache.cache_dir and is_checksum(etag)}


def disown(cache: RepoCache, etags: Iterable[str]) -> None:
    """Forget blobs that have been removed."""
    gone = {f"{etag} {cache.cache_dir}" for etag in etags}
    if not (_folder(cache.repo) / "downloaded").is_file():
        return
    with _writable(cache.repo), _locked(cache.repo):
        left = [line for line in _ledger_lines(cache.repo) if line not in gone]
        _replace(_folder(cache.repo) / "downloaded", "".join(line + "\n" for line in left))


def known_repos(cache_dir: Path) -> list[RepoCache]:
    """Repositories that are in the cache or were being pulled into it."""
    repos = {cache.repo for cache in cached_repos(cache_dir)}
    repos.update(record.repo for record in records(cache_dir=cache_dir))
    return [RepoCache(cache_dir, repo) for repo in sorted(repos, key=str.lower)]


def _ledger_lines(repo: str) -> list[str]:
    with suppress(OSError):
        text = (_folder(repo) / "downloaded").read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line]
    return []


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


@contextmanager
def _locked(repo: str) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock

    with WeakFileLock(_folder(repo) / ".lock"):
        yield


@contextmanager
def _writable(repo: str) -> Iterator[None]:
    try:
        _folder(repo).mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise MoeiError(
            f"{library_dir()} cannot be written.",
            f"{error.strerror or error}.",
            "moei notes there what it downloads. Set MOEI_HOME to a folder that you may write.",
        ) from error
