"""The table of a GGUF file's tensors under the names that transformers gives them, kept beside the model's config.

Experts, which GGUF stores as one tensor a layer, are slices of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moei_core.errors import DamagedFileError
from moei_core.store.safetensors_header import TensorEntry

TABLE_NAME = "gguf.json"


def is_gguf_folder(folder: Path) -> bool:
    """Whether the weights of the model in ``folder`` are in a GGUF file."""
    return (folder / TABLE_NAME).is_file()


def gguf_files(folder: Path) -> list[str]:
    """The names of links in ``folder`` to the files. Raises: DamagedFileError."""
    return [name for name, _ in _read(folder)["files"]]


def write_table(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Keep ``tensors`` in ``folder``, and links to their files."""
    files = sorted({entry.file for entry in tensors.values()})
    places = {file: number for number, file in enumerate(files)}
    for file in files:
        (folder / file.name).symlink_to(file)
    rows = [
        [name, places[one.file], one.dtype, one.shape, one.offset, one.nbytes]
        for name, one in tensors.items()
    ]
    content = {"files": [[file.name, file.stat().st_size] for file in files], "tensors": rows}
    (folder / TABLE_NAME).write_text(json.dumps(content), encoding="utf-8")


def read_table(folder: Path) -> dict[str, TensorEntry]:
    """The tensors by name. Raises: DamagedFileError if the table means nothing, or a file is not what it was."""
    content = _read(folder)
    files = [(folder / name).resolve() for name, _ in content["files"]]
    for file, (_, nbytes) in zip(files, content["files"], strict=True):
        if not file.is_file() or file.stat().st_size != nbytes:
            raise DamagedFileError(
                f"The model's file {file.name} is missing or has changed.",
                f"It was {file}, of {nbytes:,} bytes.",
                "Name the file where it is now.",
            )
    return {
        name: TensorEntry(files[number], dtype, tuple(shape), offset, nbytes)
        for name, number, dtype, shape, offset, nbytes in content["tensors"]
    }


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / TABLE_NAME).read_text(encoding="utf-8"))
        assert content["files"] and content["tensors"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DamagedFileError(
            f"{folder / TABLE_NAME} cannot be read.",
            f"{error or 'It is empty'}.",
            f"Delete the folder {folder}.",
        ) from None
    return dict(content)
