"""What a person may call a model, and where it is on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moei_core.errors import ModelNotFoundError, UnsupportedModelError
from moei_core.hub.aliases import aliases, find_alias, near_matches
from moei_core.hub.gguf_model import gguf_folder
from moei_core.hub.layout import (
    DEFAULT_REVISION,
    RepoCache,
    cached_repos,
    default_cache_dir,
    is_commit,
    is_repo_id,
    is_safe_name,
    missing_files,
)
from moei_core.hub.packed import (
    PACKED_NAMES,
    UNPACKED,
    FoundStore,
    choose_store,
    file_identities,
    packed_commit,
    place_of,
)
from moei_core.paths import cache_dir
from moei_core.store.packed_folder import is_packed

if TYPE_CHECKING:
    from moei_core.store.packed_manifest import PackedSource

DEMO_NAME = "moei-demo"
SYNTHETIC_PREFIX = "synthetic:"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A complete model on this machine.

    name: short, for people; a folder's own name. source: ``bundled``, ``folder``, ``gguf``, ``hub`` or ``synthetic``.
    revision: the commit of a model from the hub, else empty. format: of a packed store (``q4_0``), else empty.
    """

    name: str
    folder: Path
    source: str
    revision: str = ""
    format: str = ""


@dataclass(frozen=True, slots=True)
class ModelName:
    """A name taken apart. kind: ``bundled``, ``folder``, ``gguf`` (``folder`` is then the file), ``synthetic`` or
    ``hub`` (with repo and revision).

    text: without the format. format: ``q8_0``, ``q4_0``, ``none`` for the model's own, or None: not asked for.
    """

    text: str
    kind: str
    folder: Path | None = None
    repo: str = ""
    revision: str | None = None
    format: str | None = None


def bundled_folder() -> Path:
    """Where the demo model is if this installation has it."""
    return Path(__file__).parents[1] / "bundled" / DEMO_NAME


def synthetic_root() -> Path:
    """Where the synthetic models are, each in a folder called ``name@layers``."""
    return cache_dir() / "synthetic"


def parse_name(text: str) -> ModelName:
    """Take ``text`` apart: the demo, a folder, an alias or ``owner/name`` with an optional ``@revision``; after any
    of them ``:q4_0`` or another format to pack to, or ``:none``.

    An existing folder wins over a hub id of the same spelling, as in transformers.
    Raises: ModelNotFoundError with near matches, UnsupportedModelError for GGUF.
    """
    text = text.strip()
    base, _, form = text.rpartition(":")
    if base and form in (*PACKED_NAMES, UNPACKED) and not _is_folder(_path(text)):
        return replace(_parse_plain(base), format=form)
    return _parse_plain(text)


def _parse_plain(text: str) -> ModelName:
    if text == DEMO_NAME:
        return ModelName(text, "bundled", folder=bundled_folder())
    if text.startswith(SYNTHETIC_PREFIX):
        name = text.removeprefix(SYNTHETIC_PREFIX)
        if not is_safe_name(name) or "/" in name:
            raise unknown_name(text)
        return ModelName(text, "synthetic", folder=synthetic_root() / name)
    path = _path(text)
    if text.lower().endswith(".gguf"):
        return ModelName(text, "gguf", folder=path.absolute())
    if _names_gguf(text):
        raise UnsupportedModelError(
            f"{text}: GGUF files of the hub are not pulled yet.",
            hint="Download the file, then name it: moei chat FILE.gguf. Or pull the original model.",
        )
    looks_like_path = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    if text and (looks_like_path or _is_folder(path)):
        if not _is_folder(path):
            raise ModelNotFoundError(f"{text} is not a folder.", hint="Check the path.")
        return ModelName(text, "folder", folder=path.absolute())
    name, _, revision = text.partition("@")
    if (alias := find_alias(name)) is not None:
        name = alias.repo
    if not is_repo_id(name) or (revision and not is_safe_name(revision)):
        raise unknown_name(text)
    return ModelName(text, "hub", repo=name, revision=revision or None)


def _path(text: str) -> Path:
    """Of what may be a question as well: ``~what is this?`` names nobody's home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # A question that is longer than any name.
        return False


def _names_gguf(text: str) -> bool:
    """``owner/repo:Q4_K_M``."""
    name, colon, file = text.partition(":")
    return bool(colon and file) and is_repo_id(name)


def unknown_name(text: str) -> ModelNotFoundError:
    """The error for a name that means nothing, with what might have been meant."""
    near = near_matches(text, [DEMO_NAME, *(cache.repo for cache in cached_repos(default_cache_dir()))])
    return ModelNotFoundError(
        f"There is no model called '{text}'.",
        f"Did you mean {' or '.join(near)}?"
        if near
        else f"Known names: {', '.join(aliases())}, {DEMO_NAME}.",
        "Any owner/name of the hub and any local folder works too.",
    )


def resolve_model(text: str) -> ModelFiles:
    """Find the model that ``text`` names on this machine; never uses the network.

    A plain name means the packed store that was asked for last, if there is one, else the model as published.
    Raises: ModelNotFoundError if it is not here or only in part, UnsupportedModelError, DamagedFileError.
    """
    name = parse_name(text)
    if name.format == UNPACKED:
        return _resolve_source(name)
    try:
        source = _resolve_source(name)
    except ModelNotFoundError as error:
        # The source may have been dropped after packing.
        if (found := _resolve_without_source(name)) is None:
            raise error
        return found
    if source.format:
        return source
    if source.source == "gguf":
        if name.format is not None:
            raise UnsupportedModelError(
                f"{name.text} has a format of its own.", hint=f"Name it alone: moei chat {name.text}"
            )
        return source
    place = place_of(source.source, _place_name(source), source.revision)
    store = choose_store(place, name.format, source.folder, name.text)
    return source if store is None else _packed(source, store)


def _resolve_without_source(name: ModelName) -> ModelFiles | None:
    if name.kind == "hub":
        commit = packed_commit(name.repo, name.revision)
        files = ModelFiles(shown_name(name), Path(), "hub", commit or "")
        if commit is None:
            return None
    elif name.kind == "synthetic":
        files = ModelFiles(name.text, Path(), name.kind)
    else:
        return None
    place = place_of(files.source, files.name, files.revision)
    store = choose_store(place, name.format, None, name.text)
    return None if store is None else _packed(files, store)


def _packed(source: ModelFiles, store: FoundStore) -> ModelFiles:
    return replace(source, name=f"{source.name}:{store.format}", folder=store.folder, format=store.format)


def _place_name(files: ModelFiles) -> str:
    """What stores call their source: a folder by its path, which names it from everywhere."""
    return str(files.folder) if files.source == "folder" else files.name


def packed_source(files: ModelFiles, revision: str | None = None) -> PackedSource:
    """What a store packed from ``files`` says about its source. revision: as a person gave it, of a hub's model."""
    from moei_core.store.packed_manifest import PackedSource

    named = (revision or DEFAULT_REVISION) if files.source == "hub" else ""
    return PackedSource(
        files.source, _place_name(files), named, files.revision, file_identities(files.folder)
    )


def _resolve_source(name: ModelName) -> ModelFiles:
    """The model as published; or the packed store in a folder that is given by its path."""
    if name.kind == "hub":
        return _resolve_cached(name)
    assert name.folder is not None
    if name.kind == "gguf":
        return ModelFiles(name.text, gguf_folder(name.folder), name.kind)
    if name.kind == "bundled" and not name.folder.is_dir():
        raise ModelNotFoundError(
            f"{DEMO_NAME} is not part of this installation.",
            hint="Install a release of moei, or pull a model: `moei pull olmoe-1b-7b`.",
        )
    if name.kind == "synthetic" and not name.folder.is_dir():
        base, _, layers = name.folder.name.partition("@")
        raise ModelNotFoundError(
            f"{name.text} has not been made on this machine.",
            hint=f"Make it with: moei bench --synthetic {base}" + (f" --layers {layers}" if layers else ""),
        )
    # A folder that lost some of its weights is a damaged model, which loading it tells by file.
    if not (name.folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"There is no model in {name.folder}.",
            "It has no config.json.",
            "A model's folder holds config.json and safetensors weights.",
        )
    folder = name.folder.resolve()
    if name.kind == "synthetic":
        return ModelFiles(name.text, folder, name.kind)
    if is_packed(folder):
        from moei_core.store.packed_manifest import read_manifest

        manifest = read_manifest(folder)
        form = manifest.format.lower()
        return ModelFiles(f"{manifest.source.name}:{form}", folder, name.kind, format=form)
    return ModelFiles(folder.name, folder, name.kind)


def _resolve_cached(name: ModelName) -> ModelFiles:
    cache = RepoCache(default_cache_dir(), name.repo)
    commit = cache.commit_of(name.revision)
    command = f"moei pull {name.repo}"
    if name.revision not in (None, DEFAULT_REVISION):
        command += f" --revision {name.revision}"
    if commit is None:
        partly = bool(cache.commits() or cache.partials())
        raise ModelNotFoundError(
            f"{name.text} is only partly on this machine."
            if partly
            else f"{name.text} is not on this machine.",
            hint=f"{'Finish' if partly else 'Download'} it with: {command}",
        )
    folder = cache.snapshot(commit)
    if missing := missing_files(folder):
        raise ModelNotFoundError(
            f"{name.text} is only partly on this machine: {missing[0]} is missing.",
            hint=f"Finish it with: {command}",
        )
    return ModelFiles(shown_name(name), folder, "hub", commit)


def shown_name(name: ModelName) -> str:
    """What a model from the hub is called in reports."""
    return name.repo if name.revision is None or is_commit(name.revision) else f"{name.repo}@{name.revision}"
