"""The models on this machine, listed with what is known about each."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moei_core.errors import MoeiError
from moei_core.hub import registry
from moei_core.hub.layout import RepoCache, default_cache_dir, missing_files
from moei_core.hub.packed import (
    UNPACKED,
    FoundStore,
    all_stores,
    is_current,
    is_repo_place,
    packed_commit,
    place_of,
    repo_place,
    stores_at,
)
from moei_core.hub.resolve import DEMO_NAME, ModelName, bundled_folder, parse_name, resolve_model
from moei_core.hub.summary import ModelSummary, is_moe, summarize
from moei_core.hub.synthetic import made_models
from moei_core.store.packed_folder import is_packed, packed_share

if TYPE_CHECKING:
    from moei_core.store.packed_manifest import PackedSource


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """One model of the library.

    source: ``moei`` (downloaded by moei), ``mixed``, ``other`` (another tool), ``bundled``, ``synthetic``,
    ``folder``, ``packed`` (by moei from another one).
    state: ``complete``, ``partial``, ``damaged`` or ``outdated`` (packed from weights that have been replaced); problem
    says what is missing or wrong.
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
    found.extend(_describe_store(store) for store in all_stores())
    return found


def describe(text: str, cache_dir: Path | None = None) -> list[LibraryModel]:
    """What is here of the model that ``text`` names; empty if nothing. Raises: ModelNotFoundError."""
    name = parse_name(text)
    stores = [_describe_store(store) for store in stores_of(name)]
    if name.format not in (None, UNPACKED):
        return stores
    if name.kind == "gguf":
        return [_describe_folder(name.text, resolve_model(text).folder, name.kind)]
    if name.kind != "hub":
        assert name.folder is not None
        if not name.folder.is_dir():
            if not stores:
                # Says why, and what to do.
                resolve_model(text)
            return stores
        if is_packed(name.folder):
            return [_describe_store(FoundStore(name.folder, name.folder.name))]
        return [_describe_folder(name.text, name.folder, name.kind), *stores]
    cache = RepoCache((cache_dir or default_cache_dir()).absolute(), name.repo)
    models = [*_describe_repo(cache, any_kind=True), *stores]
    if name.revision is None:
        return models
    return [model for model in models if name.revision in (*model.revisions, model.commit)]


def stores_of(name: ModelName) -> list[FoundStore]:
    """The packed stores of a model, finished or not; those of all revisions without one, of one format if named."""
    if name.kind == "hub":
        place = repo_place(name.repo)
        found = [store for store in all_stores() if store.folder.parent.parent == place]
        if name.revision is not None:
            commit = RepoCache(default_cache_dir(), name.repo).commit_of(name.revision)
            commit = commit or packed_commit(name.repo, name.revision)
            found = [store for store in found if store.folder.parent.name == commit]
    else:
        assert name.folder is not None
        known = str(name.folder.resolve()) if name.kind == "folder" else name.text
        found = stores_at(place_of(name.kind, known))
    return [store for store in found if name.format in (None, UNPACKED, store.format)]


def _describe_store(store: FoundStore) -> LibraryModel:
    nbytes = sum(path.stat().st_blocks * 512 for path in store.folder.iterdir() if path.is_file())
    place = store.folder.parent
    model = LibraryModel(f"{place.name}:{store.format}", store.folder, "packed", "complete", nbytes)
    if is_repo_place(place.parent):
        repo = place.parent.name.removeprefix("models--").replace("--", "/", 1)
        model = replace(model, name=f"{repo}@{place.name}:{store.format}", repo=repo, commit=place.name)
    if not store.is_complete:
        problem = f"{packed_share(store.folder):.0%} packed, `moei quantize` resumes"
        return replace(model, state="partial", problem=problem)
    try:
        source = store.manifest().source
        model = replace(
            model,
            name=f"{source.name}:{store.format}",
            revisions=tuple(filter(None, [source.revision])),
            summary=summarize(store.folder),
        )
        if (folder := _source_folder(source)) is not None and not is_current(store, folder):
            problem = "its source has other weights now, `moei quantize` packs them"
            return replace(model, state="outdated", problem=problem)
    except MoeiError as error:
        return replace(model, state="damaged", problem=error.what)
    return model


def _source_folder(source: PackedSource) -> Path | None:
    """Where the source of a store is if it can have changed: a commit of the hub never does."""
    with suppress(MoeiError):
        if source.kind != "hub" and (folder := parse_name(source.name).folder) is not None:
            return folder if folder.is_dir() else None
    return None


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
        blobs = blobs_of(folder)
        partial = sum(
            file_size(cache.partial(etag)) for etag in (record.etags if record else ()) if etag not in blobs
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


def blobs_of(snapshot: Path) -> dict[str, int]:
    """Blob name -> bytes of the files of one snapshot; links that lead elsewhere count with their size."""
    found: dict[str, int] = {}
    for path in files_below(snapshot):
        target = Path(os.readlink(path)) if path.is_symlink() else path  # noqa: PTH115
        with suppress(OSError):
            found[target.name] = path.stat().st_size
    return found


def files_below(folder: Path) -> list[Path]:
    """All files and links below ``folder``, never going through a linked folder."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=False):
        linked = [name for name in folders if (Path(root) / name).is_symlink()]
        found.extend(Path(root) / name for name in (*names, *linked))
    return sorted(found)


def file_size(path: Path) -> int:
    with suppress(OSError):
        return path.lstat().st_size
    return 0
