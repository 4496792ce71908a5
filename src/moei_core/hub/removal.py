"""Removing what moei brought or made of a model, and leaving what it did not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import Timeout

from moei_core.errors import ModelNotFoundError, MoeiError, UsageError
from moei_core.hub import registry
from moei_core.hub.layout import RepoCache, default_cache_dir
from moei_core.hub.library import blobs_of, file_size, files_below, stores_of
from moei_core.hub.packed import UNPACKED, remove_store
from moei_core.hub.resolve import DEMO_NAME, ModelName, parse_name, resolve_model


@dataclass(frozen=True, slots=True)
class Removal:
    """What ``rm`` would delete.

    own: files that moei downloaded (blobs and partial files). foreign: what other tools brought.
    kept: what is never deleted, with the reason. folder: of a synthetic model, which goes as a whole.
    stores: folders of packed stores, whose files are in ``own``.
    """

    cache: RepoCache
    name: str
    commits: tuple[str, ...]
    own: tuple[Path, ...]
    foreign: tuple[Path, ...]
    kept: tuple[tuple[Path, str], ...]
    revisions: tuple[str, ...] = ()
    folder: Path | None = None
    stores: tuple[Path, ...] = ()

    def nbytes(self, paths: Iterable[Path]) -> int:
        return sum(file_size(path) for path in paths)


def plan_removal(text: str, cache_dir: Path | None = None, *, stores: bool = True) -> Removal:
    """Sort what is here of the model into own, foreign and kept; with ``stores`` also what was packed from it.

    Raises: ModelNotFoundError if nothing is here, UsageError for a folder or the demo: those are not moei's.
    """
    name = parse_name(text)
    packed = tuple(store.folder for store in stores_of(name)) if stores and name.format != UNPACKED else ()
    files = tuple(path for folder in packed for path in files_below(folder))
    cache = RepoCache((cache_dir or default_cache_dir()).absolute(), name.repo)
    if name.format not in (None, UNPACKED):
        if not packed:
            raise ModelNotFoundError(f"{text} is not on this machine.", hint="See `moei list`.")
        return Removal(cache, text, (), files, (), (), stores=packed)
    removal = _plan_source_removal(text, name, cache, has_stores=bool(packed))
    return replace(removal, own=(*removal.own, *files), stores=packed)


def _plan_source_removal(text: str, name: ModelName, cache: RepoCache, has_stores: bool) -> Removal:
    if name.kind == "bundled":
        raise UsageError(f"{DEMO_NAME} is part of moei and cannot be removed.")
    if name.kind == "synthetic":
        assert name.folder is not None
        if has_stores and not name.folder.is_dir():
            return Removal(cache, name.text, (), (), (), ())
        folder = resolve_model(f"{name.text}:{UNPACKED}").folder
        return Removal(cache, name.text, (), tuple(files_below(folder)), (), (), folder=folder)
    if name.kind in ("folder", "gguf"):
        what = "folder" if name.kind == "folder" else "file"
        raise UsageError(
            f"{text} is a {what} that moei did not make.",
            hint=f"moei removes models of its library only; delete the {what} yourself if you want that.",
        )
    try:
        commits, revisions = _chosen(cache, name)
    except ModelNotFoundError:
        if has_stores:
            return Removal(cache, name.text, (), (), (), ())
        raise
    ours = registry.owned(cache)
    own: dict[Path, None] = {}
    foreign: dict[Path, None] = {}
    kept: dict[Path, str] = {}
    # A blob that another snapshot uses as well stays; the links of this one go.
    others = [cache.snapshot(other) for other in cache.commits() if other not in commits]
    used_elsewhere = {blob for other in others for blob in blobs_of(other)}
    for commit in commits:
        for path in files_below(cache.snapshot(commit)):
            blob = _blob_behind(cache, path)
            if blob is None and path.is_symlink():
                kept[path.resolve()] = "outside the cache; only the link to it goes"
                foreign[path] = None
            elif blob is None:
                foreign[path] = None
            elif blob.name in used_elsewhere:
                kept[blob] = "another revision uses it"
            else:
                (own if blob.name in ours else foreign)[blob] = None
    if _leads_elsewhere(cache):
        kept[(cache.folder / "blobs").resolve()] = "outside the cache; only the links to it go"
        return Removal(cache, name.text, commits, (), tuple(foreign), tuple(kept.items()), revisions)
    records = registry.records(cache.repo, cache.cache_dir)
    mine = {etag for record in records if record.revision in revisions for etag in record.etags}
    theirs = {etag for record in records if record.revision not in revisions for etag in record.etags}
    for etag, path in cache.partials().items():
        if etag not in theirs and (etag in mine or name.revision is None):
            own[path] = None
    for etag in ours - used_elsewhere - theirs:
        # Blobs whose snapshot never got its link, because the pull died in between.
        if file_size(cache.blob(etag)) and (etag in mine or name.revision is None):
            own[cache.blob(etag)] = None
    return Removal(cache, name.text, commits, tuple(own), tuple(foreign), tuple(kept.items()), revisions)


def _chosen(cache: RepoCache, name: ModelName) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The commits and recorded revisions that ``name`` means: all of the repository without a revision."""
    records = registry.records(cache.repo, cache.cache_dir)
    if name.revision is None:
        commits = {*cache.commits(), *(record.commit for record in records)}
    else:
        commit = cache.commit_of(name.revision)
        commits = {commit} if commit else set()
        commits |= {record.commit for record in records if record.revision == name.revision}
    if not commits and not (name.revision is None and cache.partials()):
        raise ModelNotFoundError(f"{name.text} is not on this machine.", hint="See `moei list`.")
    return tuple(sorted(commits)), tuple(record.revision for record in records if record.commit in commits)


def _blob_behind(cache: RepoCache, path: Path) -> Path | None:
    """The blob of this repository that a snapshot's link points to, or None if it leads anywhere else."""
    if not path.is_symlink():
        return None
    blobs = cache.folder / "blobs"
    # One step only: the blob itself may be a link into the store that hf shares among models.
    target = Path(os.path.normpath(path.parent / os.readlink(path)))  # noqa: PTH115
    inside = target.parent == blobs and not _leads_elsewhere(cache) and target.exists()
    return target if inside else None


def _leads_elsewhere(cache: RepoCache) -> bool:
    """Whether somebody put this repository's blobs elsewhere by a link."""
    return cache.folder.is_symlink() or (cache.folder / "blobs").is_symlink()


def remove(removal: Removal, *, foreign: bool = False) -> int:
    """Delete what is moei's own, and with ``foreign`` also the rest of the model. Returns the bytes freed.

    Links are removed, never followed. Raises: MoeiError if a download of the model is running.
    """
    from huggingface_hub.utils import WeakFileLock

    cache = removal.cache
    doomed = [*removal.own, *(removal.foreign if foreign else ())]
    freed = removal.nbytes(doomed)
    if removal.folder is not None or not cache.repo:
        for store in removal.stores:
            remove_store(store)
        if removal.folder is not None:
            shutil.rmtree(removal.folder)
        return freed
    doomed = [path for path in doomed if not any(path.is_relative_to(store) for store in removal.stores)]
    with ExitStack() as locks:
        for etag in sorted({path.name.split(".")[0] for path in doomed if path.parent.name == "blobs"}):
            path = cache.lock(etag)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                locks.enter_context(WeakFileLock(path, timeout=0.05))
            except Timeout as error:
                raise MoeiError(
                    f"{removal.name} is being downloaded right now.",
                    hint="Stop that download, then remove it.",
                ) from error
        # Not before all locks are held: a refusal deletes nothing.
        for store in removal.stores:
            remove_store(store)
        try:
            _delete(cache, removal, doomed)
        except OSError as error:
            raise MoeiError(
                f"{error.filename or cache.folder} cannot be deleted.", f"{error.strerror or error}."
            ) from error
    registry.disown(cache, [path.name for path in removal.own])
    for revision in removal.revisions:
        registry.forget_record(cache.repo, revision)
    if not cache.folder.exists():
        shutil.rmtree(cache.cache_dir / ".locks" / cache.folder.name, ignore_errors=True)
    return freed


def _delete(cache: RepoCache, removal: Removal, doomed: list[Path]) -> None:
    blobs = set(doomed)
    for commit in removal.commits:
        # Links before blobs: a death in between leaves no link to nothing.
        for path in files_below(cache.snapshot(commit)):
            blob = _blob_behind(cache, path)
            kept_blob = any(blob == other for other, _ in removal.kept)
            if path in blobs or blob in blobs or (blob is not None and kept_blob):
                path.unlink(missing_ok=True)
    for path in doomed:
        path.unlink(missing_ok=True)
    for commit in removal.commits:
        _remove_empty(cache.snapshot(commit))
        if not cache.snapshot(commit).exists():
            for name, at in cache.refs().items():
                if at == commit:
                    cache.ref(name).unlink(missing_ok=True)
            (cache.folder / "trees" / f"{commit}.json").unlink(missing_ok=True)
            shutil.rmtree(cache.folder / ".no_exist" / commit, ignore_errors=True)
    _remove_empty(cache.folder)


def _remove_empty(folder: Path) -> None:
    """Remove ``folder`` and the folders in it that hold nothing."""
    for root, _, _ in os.walk(folder, topdown=False, followlinks=False):
        with suppress(OSError):
            Path(root).rmdir()
