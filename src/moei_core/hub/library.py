"""The models on this machine: listing them, and removing what moei brought."""

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
from moei_core.hub.layout import RepoCache, default_cache_dir, missing_files
from moei_core.hub.resolve import DEMO_NAME, ModelName, bundled_folder, parse_name, resolve_model
from moei_core.hub.summary import ModelSummary, is_moe, summarize
from moei_core.hub.synthetic import made_models


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """One model of the library.

    source: ``moei`` (downloaded by moei), ``mixed``, ``other`` (another tool), ``bundled``, ``synthetic``,
    ``folder``.
    state: ``complete``, ``partial`` or ``damaged``; problem says what is missing or wrong.
    nbytes: on disk. expected_nbytes: when complete, if known, else 0.
    """

    name: str
    folder: Path
    source: str
    state: str
    nbytes: int
    repo: str = ""
    revisions: tuple[str, ...] = ()
    commit: str = ""
    expected_nbytes: int = 0
    licence: str = ""
    problem: str = ""
    summary: ModelSummary | None = None


def list_models(cache_dir: Path | None = None) -> list[LibraryModel]:
    """Every Mixture-of-Experts model on this machine, complete or not; no other models of the cache."""
    found = []
    if bundled_folder().is_dir():
        found.append(_describe_folder(DEMO_NAME, bundled_folder(), "bundled"))
    found.extend(_describe_folder(made.name, made.folder, "synthetic") for made in made_models())
    for cache in registry.known_repos((cache_dir or default_cache_dir()).absolute()):
        try:
            found.extend(_describe_repo(cache))
        except OSError as error:
            # One folder that cannot be read must not hide the others.
            problem = f"{error.filename or cache.folder}: {error.strerror or error}"
            found.append(LibraryModel(cache.repo, cache.folder, "other", "damaged", 0, problem=problem))
    return found


def describe(text: str, cache_dir: Path | None = None) -> list[LibraryModel]:
    """What is here of the model that ``text`` names; empty if nothing. Raises: ModelNotFoundError."""
    name = parse_name(text)
    if name.kind != "hub":
        assert name.folder is not None
        if not name.folder.is_dir():
            # Says why, and what to do.
            resolve_model(text)
        return [_describe_folder(name.text, name.folder, name.kind)]
    cache = RepoCache((cache_dir or default_cache_dir()).absolute(), name.repo)
    models = _describe_repo(cache, any_kind=True)
    if name.revision is None:
        return models
    return [model for model in models if name.revision in (*model.revisions, model.commit)]


def _describe_folder(name: str, folder: Path, source: str) -> LibraryModel:
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return _described(LibraryModel(name, folder, source, "complete", nbytes))


def _described(model: LibraryModel) -> LibraryModel:
    """``model`` with its summary, or with what is wrong with it."""
    missing = missing_files(model.folder) if model.folder.is_dir() else ["everything"]
    summary, state, problem = None, model.state, model.problem
    if missing:
        state, problem = "partial", f"missing: {', '.join(missing[:3])}" + (" ..." if missing[3:] else "")
    else:
        try:
            summary = summarize(model.folder)
        except MoeiError as error:
            state, problem = "damaged", error.what
    return replace(model, summary=summary, state=state, problem=problem)


def _describe_repo(cache: RepoCache, any_kind: bool = False) -> list[LibraryModel]:
    ours = registry.owned(cache)
    records = {record.commit: record for record in registry.records(cache.repo, cache.cache_dir)}
    refs = cache.refs()
    models = []
    for commit in sorted({*cache.commits(), *records}):
        folder, record = cache.snapshot(commit), records.get(commit)
        if not (any_kind or record is not None or is_moe(folder)):
            continue
        blobs = _blobs_of(folder)
        partial = sum(
            _size(cache.partial(etag)) for etag in (record.etags if record else ()) if etag not in blobs
        )
        own = sum(1 for etag in blobs if etag in ours)
        source = "moei" if own == len(blobs) else "mixed" if own else "other"
        named = tuple(name for name, at in sorted(refs.items()) if at == commit)
        if record is not None and record.revision not in named and record.revision != commit:
            named = (*named, record.revision)
        model = LibraryModel(
            name=cache.repo if "main" in named or not named else f"{cache.repo}@{named[0]}",
            folder=folder,
            source=source if blobs or record is None else "moei",
            state="complete",
            nbytes=sum(blobs.values()) + partial,
            repo=cache.repo,
            revisions=named,
            commit=commit,
            expected_nbytes=record.nbytes if record else 0,
            licence=record.licence if record else "",
        )
        models.append(_described(model))
    return models


def _blobs_of(snapshot: Path) -> dict[str, int]:
    """Blob name -> bytes of the files of one snapshot; links that lead elsewhere count with their size."""
    found: dict[str, int] = {}
    for path in _files(snapshot):
        target = Path(os.readlink(path)) if path.is_symlink() else path  # noqa: PTH115
        with suppress(OSError):
            found[target.name] = path.stat().st_size
    return found


def _files(folder: Path) -> list[Path]:
    """All files and links below ``folder``, never going through a linked folder."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=False):
        linked = [name for name in folders if (Path(root) / name).is_symlink()]
        found.extend(Path(root) / name for name in (*names, *linked))
    return sorted(found)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.lstat().st_size
    return 0


@dataclass(frozen=True, slots=True)
class Removal:
    """What ``rm`` would delete.

    own: files that moei downloaded (blobs and partial files). foreign: what other tools brought.
    kept: what is never deleted, with the reason. folder: of a synthetic model, which goes as a whole.
    """

    cache: RepoCache
    name: str
    commits: tuple[str, ...]
    own: tuple[Path, ...]
    foreign: tuple[Path, ...]
    kept: tuple[tuple[Path, str], ...]
    revisions: tuple[str, ...] = ()
    folder: Path | None = None

    def nbytes(self, paths: Iterable[Path]) -> int:
        return sum(_size(path) for path in paths)


def plan_removal(text: str, cache_dir: Path | None = None) -> Removal:
    """Sort what is here of the model into own, foreign and kept.

    Raises: ModelNotFoundError if nothing is here, UsageError for a folder or the demo: those are not moei's.
    """
    name = parse_name(text)
    if name.kind == "bundled":
        raise UsageError(f"{DEMO_NAME} is part of moei and cannot be removed.")
    if name.kind == "synthetic":
        folder = resolve_model(text).folder
        return Removal(RepoCache(folder, ""), name.text, (), tuple(_files(folder)), (), (), folder=folder)
    if name.kind == "folder":
        raise UsageError(
            f"{text} is a folder that moei did not make.",
            hint="moei removes models of its library only; delete the folder yourself if you want that.",
        )
    cache = RepoCache((cache_dir or default_cache_dir()).absolute(), name.repo)
    commits, revisions = _chosen(cache, name)
    ours = registry.owned(cache)
    own: dict[Path, None] = {}
    foreign: dict[Path, None] = {}
    kept: dict[Path, str] = {}
    # A blob that another snapshot uses as well stays; the links of this one go.
    others = [cache.snapshot(other) for other in cache.commits() if other not in commits]
    used_elsewhere = {blob for other in others for blob in _blobs_of(other)}
    for commit in commits:
        for path in _files(cache.snapshot(commit)):
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
        if _size(cache.blob(etag)) and (etag in mine or name.revision is None):
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

    if removal.folder is not None:
        freed = removal.nbytes(removal.own)
        shutil.rmtree(removal.folder)
        return freed
    cache = removal.cache
    doomed = [*removal.own, *(removal.foreign if foreign else ())]
    freed = removal.nbytes(doomed)
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
        try:
            _delete(cache, removal, doomed, foreign)
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


def _delete(cache: RepoCache, removal: Removal, doomed: list[Path], foreign: bool) -> None:
    blobs = set(doomed)
    for commit in removal.commits:
        # Links before blobs: a death in between leaves no link to nothing.
        for path in _files(cache.snapshot(commit)):
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
