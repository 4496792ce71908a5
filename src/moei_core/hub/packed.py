"""The packed stores on this machine: where they are, what they were packed from, which one a plain name means.

    <data>/packed/<place>/<format>/     one store, as moei_core.store.packing writes it
    <data>/packed/<place>/preferred     the format that was asked for last, or ``none``

The place belongs to one version of one model: ``models--owner--name/<commit>`` of the hub, ``bundled--moei-demo``,
``synthetic--name@layers``, or ``folder--name-<digest of its path>``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from moei_core.errors import ModelNotFoundError, MoeiError, UsageError
from moei_core.hub.layout import COMPANION_FILES, DEFAULT_REVISION, RepoCache, weight_files
from moei_core.paths import data_dir
from moei_core.store.packed_folder import LOCK_NAME, is_begun, is_packed

if TYPE_CHECKING:
    from moei_core.store.packed_manifest import Manifest

# Named here and not taken from the table of formats, which would import numpy into `moei --help`.
PACKED_NAMES = ("q8_0", "q4_0", "mxfp4")
"""What a person calls the formats that a model can be packed to."""
UNPACKED = "none"
"""What a person calls the model's own format."""
_PREFERRED = "preferred"


def check_format(text: str, *others: str) -> str:
    """``text`` in lower case if it is a format to pack to, or one of ``others``. Raises: UsageError."""
    name = text.lower()
    if name not in (*PACKED_NAMES, *others):
        raise UsageError(
            f"'{text}' is not a format that moei packs to.",
            hint=f"Choose from: {', '.join((*PACKED_NAMES, *others))}.",
        )
    return name


def packed_root() -> Path:
    """Where all packed stores are."""
    return data_dir() / "packed"


def place_of(kind: str, name: str, commit: str = "") -> Path:
    """The folder of the stores packed from one source; kind, name and commit as ``PackedSource`` has them."""
    if kind == "hub":
        return repo_place(name) / commit
    if kind == "folder":
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
        return packed_root() / f"folder--{Path(name).name}-{digest}"
    return packed_root() / f"{kind}--{name.rpartition(':')[2]}"


def repo_place(name: str) -> Path:
    """The folder of the places of a repository, whatever their commits. name: ``owner/name`` or with ``@revision``."""
    return packed_root() / RepoCache(Path(), name.partition("@")[0]).folder.name


def is_repo_place(folder: Path) -> bool:
    """Whether ``folder`` holds the places of a repository of the hub, by commit."""
    return folder.parent == packed_root() and folder.name.startswith("models--")


def file_identities(folder: Path) -> dict[str, str]:
    """What tells the weight files of a model folder from others of the same name, without reading them."""
    found = {}
    for name in weight_files(folder):
        path = folder / name
        status = path.stat()
        link = Path(os.readlink(path)).name if path.is_symlink() else ""  # noqa: PTH115
        found[name] = link or f"{status.st_size}-{status.st_mtime_ns}"
    return found


def companion_files(folder: Path) -> list[Path]:
    """The configuration and tokenizer of a model folder, which a store has copies of."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COMPANION_FILES)
    ]


@dataclass(frozen=True, slots=True)
class FoundStore:
    """A store, finished or not, or damaged. format: ``q4_0``."""

    folder: Path
    format: str

    @property
    def is_complete(self) -> bool:
        return is_packed(self.folder)

    def manifest(self) -> Manifest:
        """Raises: DamagedFileError."""
        from moei_core.store.packed_manifest import read_manifest

        return read_manifest(self.folder)


def stores_at(place: Path) -> list[FoundStore]:
    """The stores of one place, finished or not."""
    found = []
    for name in PACKED_NAMES:
        folder = place / name
        if is_packed(folder) or is_begun(folder):
            found.append(FoundStore(folder, name))
    return found


def all_stores() -> Iterator[FoundStore]:
    """Every store on this machine."""
    root = packed_root()
    for place in sorted((*root.glob("*"), *root.glob("models--*/*"))):
        yield from stores_at(place)


def prefer(place: Path, name: str) -> None:
    """Make the plain name of the model mean the store in format ``name``, or with ``none`` its own format."""
    if place.is_dir():
        (place / _PREFERRED).write_text(name + "\n", encoding="utf-8")


def packed_commit(repo: str, revision: str | None) -> str | None:
    """The commit of ``repo`` that is here packed, for when its source is not; None if that is not clear."""
    place = repo_place(repo)
    found = {store.folder.parent.name: store for store in all_stores() if store.folder.parent.parent == place}
    if revision in found:
        return revision
    wanted = revision or DEFAULT_REVISION
    for commit, store in found.items():
        with suppress(MoeiError):
            if store.manifest().source.revision == wanted:
                return commit
    return next(iter(found)) if revision is None and len(found) == 1 else None


def choose_store(place: Path, asked: str | None, source: Path | None, text: str) -> FoundStore | None:
    """The finished store that a name means; None for the model's own format.

    asked: a format, ``none``, or None for a plain name. source: the folder that the store must be packed from, if
    that is known and here. text: the name, for errors. Raises: ModelNotFoundError, DamagedFileError.
    """
    there = {store.format: store for store in stores_at(place) if store.is_complete}
    wanted = asked
    if wanted is None:
        with suppress(OSError):
            wanted = (place / _PREFERRED).read_text(encoding="utf-8").strip()
    if wanted is None and source is None:
        wanted = next(iter(there), None)
    if wanted is None or wanted == UNPACKED:
        return None
    store = there.get(wanted)
    if store is not None and (source is None or is_current(store, source)):
        return store
    if asked is None:
        # Removed by hand, or packed from weights that have been replaced: a plain name means what is right.
        return None if source is not None else next(iter(there.values()), None)
    raise ModelNotFoundError(
        f"{text} is not packed as {asked}" + (" from the weights that are there now." if store else "."),
        hint=f"Pack it with: moei quantize {text} {asked}",
    )


def is_current(store: FoundStore, source: Path) -> bool:
    """Whether ``store`` was packed from the weights in the folder ``source``. Raises: DamagedFileError."""
    with suppress(OSError):
        return store.manifest().source.files == file_identities(source)
    # Some of the weights are gone; what is packed is all that is left of them.
    return True


def remove_store(folder: Path) -> None:
    """Delete a store, and its place when nothing else is in it. Raises: MoeiError if it is being packed."""
    try:
        with FileLock(folder / LOCK_NAME, timeout=0):
            shutil.rmtree(folder)
    except Timeout:
        raise MoeiError(f"{folder} is being packed right now.", hint="Stop that, then remove it.") from None
    except OSError as error:
        raise MoeiError(f"{folder} cannot be deleted.", f"{error.strerror or error}.") from error
    place = folder.parent
    if not stores_at(place):
        shutil.rmtree(place, ignore_errors=True)
    for parent in (place.parent, packed_root()):
        with suppress(OSError):
            parent.rmdir()
