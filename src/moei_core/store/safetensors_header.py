"""Where the tensors of a safetensors file are. The library reads tensors; we need their byte ranges.

Format (huggingface/safetensors): 8 bytes little-endian length N, N bytes of JSON, then the data; each tensor
has ``data_offsets`` relative to the start of the data.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from moei_core.errors import DamagedFileError
from moei_core.store.file_range import ScaleGrid

DTYPE_NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of one file: ``offset`` is absolute in the file, in bytes.

    dtype: safetensors' name, or a block format's in a packed store. checksum: xxh3 of its bytes, where known.
    scales: of blocks whose scales are a tensor of their own, see ``StoredTensor``; ``nbytes`` then counts both.
    grid: of FP8 weights; ``nbytes`` is that of the weights alone.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: str = ""
    scales: TensorEntry | None = None
    grid: ScaleGrid | None = None


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of ``file`` by name.

    Raises: DamagedFileError if the file is missing, is not a safetensors file, or is shorter than its header
    says (an interrupted download or copy).
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise _damaged(file, f"It has {size:,} bytes and no safetensors header.")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise DamagedFileError(
            f"The model's file {file.name} is missing.",
            f"It belongs in {file.parent}.",
            "Pull the model again, or copy the file to that folder.",
        ) from None
    except (ValueError, UnicodeDecodeError):
        raise _damaged(file, "Its header is not valid JSON.") from None
    except OSError as error:
        raise _damaged(file, f"It cannot be read: {error.strerror}.") from error
    return _parse(file, header, data_start=8 + length, size=size)


def _parse(file: Path, header: object, data_start: int, size: int) -> dict[str, TensorEntry]:
    if not isinstance(header, dict):
        raise _damaged(file, "Its header is not a JSON object.")
    tensors: dict[str, TensorEntry] = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = fields["dtype"], tuple(int(dim) for dim in fields["shape"])
            start, end = (int(offset) for offset in fields["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise _damaged(file, f"Its header describes '{name}' in an unknown way.") from None
        item = DTYPE_NBYTES.get(dtype)
        if start < 0 or end < start or (item is not None and end - start != item * math.prod(shape)):
            raise _damaged(file, f"Its header gives '{name}' a size that does not match its shape.")
        if data_start + end > size:
            raise _damaged(
                file, f"It is truncated: {size:,} bytes, but '{name}' ends at byte {data_start + end:,}."
            )
        tensors[name] = TensorEntry(file, dtype, shape, data_start + start, end - start)
    return tensors


def _damaged(file: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"The model's file {file.name} is damaged.",
        why,
        "Remove the model and pull it again: a pull alone keeps a file that has its size.",
    )
