"""The manifest of a packed store: what is where, in which format, with which checksum.

``docs/store-format.md`` describes the store for other programs. The manifest is one JSON object,
``{"format_version", "checksum", "content"}``; the checksum is the xxh3 of ``content`` written without spaces and
with sorted keys. It appears by a rename when everything else is on disk: a folder without it is unfinished.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moei_core.errors import DamagedFileError
from moei_core.quant.formats import FORMATS
from moei_core.quant.layouts import LAYOUTS
from moei_core.store.base import PAGE, ExpertLayout, Extent, Part, StoredTensor, align_up
from moei_core.store.checksums import checksum
from moei_core.store.packed_folder import MANIFEST_NAME
from moei_core.store.safetensors_header import TensorEntry
from moei_core.types import ExpertKey

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class PackedSource:
    """What a store was packed from.

    kind: ``hub``, ``folder``, ``bundled`` or ``synthetic``. name: what a person calls it. revision, commit: of a
    model from the hub. files: the identity of each weight file (its blob's name, or size and modification time).
    """

    kind: str
    name: str
    revision: str
    commit: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class PackedPart:
    """One tensor of an expert; ``offset`` counts from the expert's first byte. Fields as in ``StoredTensor``."""

    param: str
    index: int
    format: str
    layout: str
    shape: tuple[int, ...]
    transposed: bool
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PackedExpert:
    """Where an expert is. kind: index into ``Manifest.kinds``. offset: a multiple of the page size."""

    kind: int
    file: str
    offset: int
    nbytes: int
    checksum: str = ""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A dense weight: [rows, columns] in whole blocks of ``format``, ``plain``, or a float tensor of any shape."""

    file: str
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a packed store.

    format: what experts were packed to; parts that no block fits keep their own, so the parts say what is used.
    files: size in bytes of every file of the store, the copied ones included. kinds: the distinct ways in which
    experts are put together, as lists of parts.
    """

    format: str
    dense_format: str
    source: PackedSource
    files: dict[str, int]
    kinds: tuple[tuple[PackedPart, ...], ...]
    experts: dict[ExpertKey, PackedExpert]
    dense: dict[str, PackedTensor]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def layout(self, folder: Path, key: ExpertKey) -> ExpertLayout:
        """Where ``key`` is, for a slot. An expert is one read."""
        expert = self.experts[key]
        file = folder / expert.file
        parts = tuple(
            Part(_stored(part, file, expert.offset), part.offset) for part in self.kinds[expert.kind]
        )
        return ExpertLayout(parts, (Extent(file, expert.offset, expert.nbytes, 0),), align_up(expert.nbytes))

    def stored_experts(self, folder: Path) -> dict[ExpertKey, list[StoredTensor]]:
        """The stored tensors of each expert."""
        return {key: [part.tensor for part in self.layout(folder, key).parts] for key in self.experts}

    def dense_entries(self, folder: Path) -> dict[str, TensorEntry]:
        """The dense weights by their name in the checkpoint."""
        return {
            name: TensorEntry(
                folder / one.file, one.format, one.shape, one.offset, one.nbytes, checksum=one.checksum
            )
            for name, one in self.dense.items()
        }

    def to_json(self) -> str:
        """The text of the manifest's file."""
        body = _canonical(self.content())
        return f'{{"format_version":{FORMAT_VERSION},"checksum":"{checksum([body.encode()])}","content":{body}}}\n'

    def content(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "format": self.format,
            "dense_format": self.dense_format,
            "source": asdict(self.source),
            "files": self.files,
            "kinds": [[asdict(part) for part in kind] for kind in self.kinds],
            "experts": [{"layer": key.layer, "expert": key.expert, **asdict(one)} for key, one in self.experts.items()],
            "dense": {name: asdict(one) for name, one in self.dense.items()},
        }  # fmt: skip


def _stored(part: PackedPart, file: Path, start: int) -> StoredTensor:
    return StoredTensor(
        part.param, part.index, file, start + part.offset, part.nbytes, part.format, part.shape, part.transposed,
        part.layout,
    )  # fmt: skip


def _canonical(content: object) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in ``folder``, after checking that all its files are there with their sizes.

    Raises: DamagedFileError for a manifest that is missing, cut short, changed or of another version, and for
    missing or truncated files.
    """
    path = folder / MANIFEST_NAME
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
        version, expected, content = outer["format_version"], outer["checksum"], outer["content"]
    except FileNotFoundError:
        raise _damaged(path, "It is missing: packing was never finished.") from None
    except OSError as error:
        raise _damaged(path, f"It cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "It is not a manifest in JSON, or was cut short.") from None
    if version != FORMAT_VERSION:
        raise DamagedFileError(
            f"The packed store in {folder} has format version {version}.",
            f"This moei reads version {FORMAT_VERSION}.",
            "Use the moei that packed it, or pack the model again with `moei quantize`.",
        )
    if checksum([_canonical(content).encode()]) != expected:
        raise _damaged(path, "Its checksum is not that of its content.")
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"Its content is not understood ({error}).") from None
    for name, nbytes in manifest.files.items():
        _check_size(folder / name, nbytes)
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    kinds = tuple(
        tuple(PackedPart(**{**part, "shape": tuple(part["shape"])}) for part in kind)
        for kind in content["kinds"]
    )
    experts = {}
    for entry in content["experts"]:
        key = ExpertKey(entry.pop("layer"), entry.pop("expert"))
        experts[key] = PackedExpert(**entry)
    dense = {
        name: PackedTensor(**{**entry, "shape": tuple(entry["shape"])})
        for name, entry in content["dense"].items()
    }
    unknown = {part.format for kind in kinds for part in kind} - set(FORMATS)
    unknown |= {part.layout for kind in kinds for part in kind} - set(LAYOUTS)
    if unknown:
        raise ValueError(f"unknown format or layout {sorted(unknown)[0]}")
    _check_bounds(kinds, experts, dense, content["files"])
    return Manifest(
        content["format"], content["dense_format"], PackedSource(**content["source"]), dict(content["files"]),
        kinds, dict(sorted(experts.items())), dense,
    )  # fmt: skip


def _check_bounds(
    kinds: tuple[tuple[PackedPart, ...], ...],
    experts: dict[ExpertKey, PackedExpert],
    dense: dict[str, PackedTensor],
    files: dict[str, int],
) -> None:
    """A kernel computes from where the manifest says that weights are: all of them must be inside what is read.

    Raises: ValueError.
    """
    ends = []
    for kind in kinds:
        for part in kind:
            if part.offset < 0 or part.nbytes != FORMATS[part.format].nbytes(part.shape):
                raise ValueError(f"{part.param} has {part.nbytes} bytes at {part.offset}")
        ends.append(max(part.offset + part.nbytes for part in kind))
    for key, one in experts.items():
        if not 0 <= one.kind < len(kinds) or ends[one.kind] > one.nbytes:
            raise ValueError(f"{key} is smaller than its parts")
        if one.offset < 0 or one.offset % PAGE or one.offset + one.nbytes > files[one.file]:
            raise ValueError(f"{key} is not within {one.file}")
    for name, tensor in dense.items():
        # Of others, such as integers, the checkpoint's reader knows the size.
        if tensor.format in FORMATS and tensor.nbytes != FORMATS[tensor.format].nbytes(tensor.shape):
            raise ValueError(f"{name} has {tensor.nbytes} bytes")
        if tensor.offset < 0 or tensor.offset + tensor.nbytes > files[tensor.file]:
            raise ValueError(f"{name} is not within {tensor.file}")


def _check_size(file: Path, nbytes: int) -> None:
    try:
        found = file.stat().st_size
    except OSError:
        raise _damaged(file, "It is missing.") from None
    if found != nbytes:
        raise _damaged(file, f"It has {found:,} bytes instead of {nbytes:,}.")


def _damaged(file: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"The packed store's file {file.name} is damaged.",
        f"{file}: {why}",
        "Pack the model again with `moei quantize`; if its source is gone, with `moei pull --quant`.",
    )
