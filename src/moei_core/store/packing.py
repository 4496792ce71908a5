"""Packing: a checkpoint streamed once, expert by expert, into a packed store.

Everything that will be in the store is planned first (``plan_packing``): where each item goes depends on shapes
alone. ``pack`` then makes the items one after the other, each written to its place and noted with its checksum in
a journal. A process that dies leaves a journal, with which the next one goes on; what the journal names is read
back and compared before it is believed. The manifest comes last, by a rename.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from moei_core.config import format_size
from moei_core.errors import DoesNotFitError, MoeiError, UnsupportedModelError
from moei_core.quant import fp8
from moei_core.quant.formats import ENCODABLE_FORMATS, FLOAT_FORMATS, FORMATS, decode, transcode
from moei_core.quant.fp8 import F8_E4M3
from moei_core.quant.layouts import PLAIN, ROWS16, can_interleave, from_layout, to_layout
from moei_core.quant.mxfp4 import MXFP4
from moei_core.store.base import ExpertLayout, StoredTensor, align_up, read_expert
from moei_core.store.file_range import ScaleGrid
from moei_core.store.file_reader import FileReader
from moei_core.store.pack_files import CHUNK, Journal, PackFile, write_synced
from moei_core.store.packed_folder import JOURNAL_NAME, LOCK_NAME, MANIFEST_NAME
from moei_core.store.packed_manifest import (
    Manifest,
    PackedExpert,
    PackedPart,
    PackedSource,
    PackedTensor,
)
from moei_core.store.safetensors_header import TensorEntry
from moei_core.store.safetensors_store import SafetensorsStore
from moei_core.types import ExpertKey

_DENSE_NAME = "dense.bin"
_LARGEST_FILE = 16 << 30
# Parts start where a vector register would like them.
_ALIGNMENT = 64
Progress = Callable[[int], None]
Bytes = NDArray[np.uint8]

OWN_FORMAT = "none"
"""Instead of a format to pack to: weights stay as they are stored."""

USUAL_LAYOUT = ROWS16
"""In which blocks are packed unless a caller wants otherwise."""


@dataclass(frozen=True, slots=True)
class PackSource:
    """A checkpoint as packing needs it.

    transposed: by layer, whether transformers' module multiplies with [in, out] parameters.
    keep: names of dense weights that stay in full precision whatever their shape (routers).
    """

    source: PackedSource
    experts: Mapping[ExpertKey, list[StoredTensor]]
    transposed: Mapping[int, bool]
    dense: Mapping[str, TensorEntry]
    keep: frozenset[str]


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Where everything will be. manifest: complete but for checksums and the sizes of ``companions``.

    companions: small files (configuration, tokenizer) that are copied, so that the store is a model of its own.
    """

    source: PackSource
    manifest: Manifest
    companions: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return self.manifest.nbytes

    @property
    def source_nbytes(self) -> int:
        """Bytes of the checkpoint that are read, the measure of progress."""
        experts = sum(tensor.nbytes for stored in self.source.experts.values() for tensor in stored)
        return experts + sum(entry.nbytes for entry in self.source.dense.values())


def plan_packing(
    source: PackSource,
    experts_format: str,
    dense_format: str = "",
    layout: str = USUAL_LAYOUT,
    companions: Iterable[Path] = (),
) -> PackPlan:
    """Lay a store out. Tensors that are no matrices, or whose rows are no whole blocks, keep their own format.

    experts_format: MXFP4 only reorders what is stored so, and loses nothing. dense_format: empty for the usual one,
    ``OWN_FORMAT`` beside MXFP4 and Q8_0 beside the others. Raises: UnsupportedModelError for a model that is not to be
    packed so.
    """
    _check_formats(source, experts_format)
    dense_format = dense_format or (OWN_FORMAT if experts_format == MXFP4 else "Q8_0")
    files: dict[str, int] = {}
    kinds: dict[tuple[PackedPart, ...], int] = {}
    experts: dict[ExpertKey, PackedExpert] = {}
    number, end = 1, 0
    for key in sorted(source.experts):
        parts = _parts(source.experts[key], source.transposed[key.layer], experts_format, layout)
        nbytes = parts[-1].offset + parts[-1].nbytes
        if end and end + nbytes > _LARGEST_FILE:
            number, end = number + 1, 0
        name = f"experts-{number:05d}.bin"
        experts[key] = PackedExpert(kinds.setdefault(parts, len(kinds)), name, end, nbytes)
        end += align_up(nbytes)
        files[name] = end
    dense: dict[str, PackedTensor] = {}
    end = 0
    for name, entry in source.dense.items():
        wanted = OWN_FORMAT if name in source.keep else dense_format
        form = _format_of(entry.dtype, entry.shape, wanted)
        nbytes = FORMATS[form].nbytes(entry.shape) if form in FORMATS else entry.nbytes
        dense[name] = PackedTensor(_DENSE_NAME, form, entry.shape, end, nbytes)
        end = align_up(end + nbytes, _ALIGNMENT)
    files[_DENSE_NAME] = end
    companions = tuple(sorted(companions))
    files |= {path.name: path.stat().st_size for path in companions}
    manifest = Manifest(experts_format, dense_format, source.source, files, tuple(kinds), experts, dense)
    return PackPlan(source, manifest, companions)


def _check_formats(source: PackSource, wanted: str) -> None:
    """Raises: UnsupportedModelError if blocks would be packed again, or MXFP4 made of what is not."""
    name = source.source.name
    blocks = {one.format for stored in source.experts.values() for one in stored}
    blocks -= {*FLOAT_FORMATS, F8_E4M3}
    if blocks and blocks != {wanted}:
        form = min(blocks)
        raise UnsupportedModelError(
            f"{name} cannot be packed as {wanted.lower()}.",
            f"Its experts are stored as {form} already: packing again would lose accuracy and save nothing.",
            f"`moei quantize MODEL {form.lower()}` keeps their values and lays them out for direct reads.",
        )
    if wanted == MXFP4 and not blocks:
        raise UnsupportedModelError(
            f"{name} cannot be packed as {wanted.lower()}.",
            "Only experts that were published in MXFP4 are kept so; moei does not round to it.",
            "Choose q8_0 or q4_0.",
        )


def _format_of(stored: str, shape: tuple[int, ...], wanted: str) -> str:
    if stored == F8_E4M3:
        # With its scales multiplied in.
        stored = "F32"
    if wanted not in ENCODABLE_FORMATS:
        return stored
    fits = stored in FORMATS and FORMATS[stored].is_float and len(shape) == 2 and FORMATS[wanted].holds(shape)
    return wanted if fits else stored


def _parts(stored: list[StoredTensor], transposed: bool, wanted: str, layout: str) -> tuple[PackedPart, ...]:
    """An expert's parts in the order of its parameters, matrices as [out, in] rows."""
    parts: list[PackedPart] = []
    end = 0
    for tensor in sorted(stored, key=_order):
        matrix = len(tensor.shape) == 2
        shape = tensor.shape[::-1] if _turns(tensor, transposed) else tensor.shape
        form = _format_of(tensor.format, shape, wanted)
        place = layout if can_interleave(form, shape) else PLAIN
        offset, nbytes = align_up(end, _ALIGNMENT), FORMATS[form].nbytes(shape)
        parts.append(
            PackedPart(tensor.param, tensor.index, form, place, shape, matrix and transposed, offset, nbytes)
        )
        end = offset + nbytes
    return tuple(parts)


def _order(tensor: StoredTensor) -> tuple[bool, str, int]:
    """gate_up before down, since a product needs them in this order."""
    return (tensor.param.startswith("down"), tensor.param, tensor.index)


def _turns(tensor: StoredTensor, transposed: bool) -> bool:
    """Whether a stored matrix must be transposed to become [out, in] rows."""
    return len(tensor.shape) == 2 and tensor.transposed != transposed


def pack(plan: PackPlan, folder: Path, progress: Progress = lambda nbytes: None) -> Manifest:
    """Carry ``plan`` out in ``folder``, going on where an earlier attempt at the same plan stopped.

    progress is told how many bytes of the source are done. Raises: DoesNotFitError before the first byte or when
    the disk fills up, DamagedFileError and ExpertReadError about the source, MoeiError if another process packs.
    """
    with _disk_errors(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(FileLock(folder / LOCK_NAME, timeout=0))
        except Timeout:
            raise MoeiError(
                f"Another moei is packing {plan.manifest.source.name} right now.",
                hint="Wait for it to finish.",
            ) from None
        journal = Journal(folder / JOURNAL_NAME, plan.manifest.content())
        _check_space(plan, folder)
        # A store of other weights must not look complete while its bytes are replaced.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        done = journal.open()
        stack.callback(journal.close)
        files = {
            name: stack.enter_context(PackFile(folder / name, nbytes, fresh=not done))
            for name, nbytes in plan.manifest.files.items()
            if name.endswith(".bin")
        }
        experts = dict(plan.manifest.experts)
        with _ExpertMaker(plan) as maker:
            for key, expert in experts.items():
                name = f"{key.layer}.{key.expert}"
                made = done.get(name) or ""
                if not made or not files[expert.file].holds(expert.offset, expert.nbytes, made):
                    made = files[expert.file].write(expert.offset, maker.pieces(key))
                    journal.note(name, made)
                experts[key] = replace(expert, checksum=made)
                progress(sum(tensor.nbytes for tensor in plan.source.experts[key]))
        dense = dict(plan.manifest.dense)
        with _Files() as sources:
            for name, packed in dense.items():
                made, entry = done.get(name) or "", plan.source.dense[name]
                if not made or not files[packed.file].holds(packed.offset, packed.nbytes, made):
                    pieces = _dense_pieces(name, entry, packed.format, sources)
                    made = files[packed.file].write(packed.offset, pieces)
                    journal.note(name, made)
                dense[name] = replace(packed, checksum=made)
                progress(entry.nbytes)
        for path in plan.companions:
            write_synced(folder / path.name, path.read_bytes())
        for file in files.values():
            file.sync()
        manifest = replace(plan.manifest, experts=experts, dense=dense)
        write_synced(folder / MANIFEST_NAME, manifest.to_json().encode())
        journal.close()
        (folder / JOURNAL_NAME).unlink()
    return manifest


class _Files:
    """Source files, opened when they are wanted first."""

    def __init__(self) -> None:
        self._readers: dict[Path, FileReader] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def chunks(self, file: Path, offset: int, nbytes: int, size: int) -> Iterator[Bytes]:
        """A range of a file in pieces of ``size`` bytes, each valid until the next is asked for."""
        if file not in self._readers:
            self._readers[file] = FileReader(file)
        for chunk in self._readers[file].chunks(offset, nbytes, size):
            yield np.frombuffer(chunk, np.uint8)

    def scales(self, grid: ScaleGrid) -> NDArray[np.float32]:
        """[rows, columns] of them."""
        place = grid.place
        raw = next(self.chunks(place.file, place.offset, place.nbytes, place.nbytes))
        return decode(grid.format, raw, grid.shape)


class _ExpertMaker:
    """Experts of the source, read and converted one at a time through one buffer."""

    def __init__(self, plan: PackPlan) -> None:
        self._plan = plan
        self._store = SafetensorsStore(plan.source.experts)
        largest = max(self._store.layout(key).slot_nbytes for key in self._store.experts())
        self._slot = memoryview(mmap(-1, largest))
        self._files = _Files()

    def __enter__(self) -> _ExpertMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()
        self._store.close()

    def pieces(self, key: ExpertKey) -> Iterator[Bytes]:
        """The packed bytes of ``key``, padding included."""
        expert = self._plan.manifest.experts[key]
        read_expert(self._store, key, self._slot)
        layout: ExpertLayout = self._store.layout(key)
        transposed = self._plan.source.transposed[key.layer]
        at = 0
        stored = sorted(layout.parts, key=lambda part: _order(part.tensor))
        for source, part in zip(stored, self._plan.manifest.kinds[expert.kind], strict=True):
            yield np.zeros(part.offset - at, np.uint8)
            tensor, form = source.tensor, source.tensor.format
            raw = np.frombuffer(self._slot, np.uint8, tensor.nbytes, source.slot_offset)
            if tensor.grid is not None:
                form, raw = _multiplied(raw, tensor.grid, self._files.scales(tensor.grid), tensor.shape)
            if _turns(tensor, transposed):
                item = FORMATS[form].block_nbytes
                raw = np.ascontiguousarray(raw.reshape(*tensor.shape, item).swapaxes(0, 1)).reshape(-1)
            if (form, tensor.layout) == (part.format, part.layout):
                yield raw
                at = part.offset + part.nbytes
                continue
            raw = from_layout(tensor.layout, form, raw, tensor.shape)
            packed = transcode(form, raw, part.format, f"{tensor.param} of {key}")
            yield to_layout(part.layout, part.format, packed, part.shape)
            at = part.offset + part.nbytes


def _multiplied(
    raw: Bytes, grid: ScaleGrid, scales: NDArray[np.float32], shape: tuple[int, ...]
) -> tuple[str, Bytes]:
    """FP8 weights of ``shape`` with their scales: (what they are then, their bytes)."""
    return "F32", fp8.decode(raw, scales, shape, grid.square).view(np.uint8).reshape(-1)


def _dense_pieces(name: str, entry: TensorEntry, form: str, files: _Files) -> Iterator[Bytes]:
    """The packed bytes of one dense weight. Rows are whole blocks, so chunks of whole blocks need no rows."""
    if entry.grid is None:
        for chunk in files.chunks(entry.file, entry.offset, entry.nbytes, CHUNK):
            yield transcode(entry.dtype, chunk, form, name)
        return
    # Whole rows of squares.
    (height, _), columns = entry.grid.square, entry.shape[1]
    at_once = max(1, CHUNK // (height * columns))
    scales, first = files.scales(entry.grid), 0
    for chunk in files.chunks(entry.file, entry.offset, entry.nbytes, at_once * height * columns):
        part = scales[first : first + at_once]
        kind, raw = _multiplied(chunk, entry.grid, part, (len(chunk) // columns, columns))
        yield transcode(kind, raw, form, name)
        first += at_once


def _check_space(plan: PackPlan, folder: Path) -> None:
    """Raises: DoesNotFitError if the disk has less room than the store still needs."""
    here = sum(path.stat().st_blocks * 512 for path in folder.glob("*.bin"))
    needed = max(0, plan.nbytes - here)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise DoesNotFitError(
            f"The packed {plan.manifest.source.name} does not fit on the disk of {folder}.",
            f"{format_size(needed)} are needed, {format_size(free)} are free.",
            "Free some space (`moei list`, `moei rm`) or set MOEI_HOME to a larger disk.",
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about the disk into sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFitError(
                f"The disk is full: {folder} has no space left.",
                hint="Free some space and run the same command: what is packed is kept.",
            ) from error
        if error.errno == errno.EFBIG:
            raise DoesNotFitError(
                f"{folder} takes no files as large as are needed.",
                "The file system, or a limit of this process (ulimit -f), ends them earlier.",
                "Lift the limit, or set MOEI_HOME to another disk; what is packed is kept.",
            ) from error
        if error.filename and not Path(error.filename).is_relative_to(folder):
            raise MoeiError(
                f"{error.filename} cannot be read.",
                f"{error.strerror or error}.",
                "Run the same command when it is there again: what is packed is kept.",
            ) from error
        raise MoeiError(
            f"{folder} cannot be written.",
            f"{error.strerror or error}.",
            "Set MOEI_HOME to a folder that you may write, or ask its owner.",
        ) from error
