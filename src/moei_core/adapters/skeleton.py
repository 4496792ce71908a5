"""Building a model without its experts: on meta, expert parameters removed, dense weights loaded.

Done otherwise (``from_pretrained`` without the expert keys) transformers materialises the experts after all,
and ``to_empty`` leaves non-persistent buffers as garbage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import EllipsisType

import numpy as np
import torch
import xxhash
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moei_core.adapters.kept_blocks import GROUP_ROWS, KeptBlocks, bring_in, place_chunk
from moei_core.adapters.transformers_private import build_on_meta, causal_lm_class, load_dense
from moei_core.errors import DamagedFileError, UnsupportedModelError
from moei_core.quant import native
from moei_core.quant.formats import FORMATS, decode
from moei_core.store.file_reader import FileReader
from moei_core.store.safetensors_header import TensorEntry

# Read at once through a small buffer; whole blocks of every format whose rows are whole blocks.
_CHUNK_NBYTES = {name: (4 << 20) // form.block_nbytes * form.block_nbytes for name, form in FORMATS.items()}
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's types by safetensors' names."""


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward through its experts interface."""
    return all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "has_bias"))


def experts_modules(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(path, decoder layer index, module) of every hookable experts module, in layer order."""
    for path, module in model.named_modules():
        if is_experts_module(module):
            # Modules carry no layer index: it is the first number of the path.
            numbers = [int(piece) for piece in path.split(".") if piece.isdigit()]
            if len(numbers) != 1:
                raise _unsupported(model, f"'{path}' does not tell its decoder layer.")
            yield path, numbers[0], module


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on meta, experts included. Raises: UnsupportedModelError."""
    model_class = causal_lm_class(config)
    if model_class is None:
        raise UnsupportedModelError(
            f"'{config.model_type}' is not a language model that transformers can generate with.",
            hint="moei runs Mixture-of-Experts chat models such as Mixtral, Qwen3-MoE, gpt-oss or DeepSeek.",
        )
    model = build_on_meta(model_class, config, dtype)
    if not any(True for _ in experts_modules(model)):
        raise _unsupported(model, None)
    return model


def _unsupported(model: nn.Module, why: str | None) -> UnsupportedModelError:
    name, config = type(model).__name__, getattr(model, "config", None)
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if why is None and not any(getattr(config, count, None) for count in counts):
        return UnsupportedModelError(
            f"{name} is not a Mixture-of-Experts model.",
            "Its configuration has no routed experts, so there is nothing to keep on disk.",
            "moei runs MoE models such as Mixtral, Qwen3-MoE, OLMoE, gpt-oss or DeepSeek.",
        )
    return UnsupportedModelError(
        f"The architecture {name} is not supported.",
        why or "Its experts do not run through transformers' experts interface, so moei cannot move them.",
        "Please report it with the model's name.",
    )


def _remove(model: PreTrainedModel, parameters: Iterable[str]) -> None:
    """Take parameters out of their modules, so that nothing can allocate or compute with them."""
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(path), leaf)


class _LazyTensor:
    """A tensor that is read from its file when transformers asks for ``tensor[...]``."""

    def __init__(self, name: str, entry: TensorEntry, reader: FileReader, dtype: torch.dtype) -> None:
        self._name = name
        self._entry = entry
        self._reader = reader
        self._dtype = dtype

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return read_tensor(self._name, self._entry, self._reader, self._dtype)


def read_tensor(name: str, entry: TensorEntry, reader: FileReader, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of its own memory, read past the page cache: as stored, or blocks decoded to ``dtype``.

    Raises: UnsupportedModelError for an unknown number format, DamagedFileError.
    """
    blocks = FORMATS.get(entry.dtype)
    if blocks is not None and blocks.is_float:
        blocks = None
    if blocks is None and entry.dtype not in TORCH_DTYPES:
        raise UnsupportedModelError(
            f"The weights are stored as {entry.dtype}, which moei does not read yet.",
            hint="Use a bf16 version of the model.",
        )
    if blocks is None:
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        result = raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)
    else:
        result = torch.empty(entry.shape, dtype=dtype)
        flat = result.view(-1)
    done = 0
    for chunk in _chunks(name, entry, reader, _CHUNK_NBYTES.get(entry.dtype, 4 << 20)):
        piece = np.frombuffer(chunk, np.uint8)
        if blocks is None:
            raw[done : done + len(piece)] = torch.from_numpy(piece)
            done += len(piece)
        else:
            count = len(piece) // blocks.block_nbytes * blocks.block_size
            flat[done : done + count] = torch.from_numpy(decode(blocks.name, piece, (count,)))
            done += count
    return result


def read_blocks(name: str, entry: TensorEntry, reader: FileReader, matrix: native.Matrix) -> torch.Tensor:
    """The bytes of a matrix in the order of ``matrix``, read past the page cache. Raises: DamagedFileError."""
    group = native.Matrix(matrix.format, GROUP_ROWS, matrix.cols).nbytes
    result = torch.empty(matrix.nbytes, dtype=torch.uint8)
    done = 0
    for chunk in _chunks(name, entry, reader, max(1, (4 << 20) // group) * group):
        done = place_chunk(matrix, chunk, done, result)
    return result


def _chunks(name: str, entry: TensorEntry, reader: FileReader, size: int) -> Iterator[memoryview]:
    """The bytes of a tensor, compared with its checksum once all are read."""
    digest = xxhash.xxh3_64()
    for chunk in reader.chunks(entry.offset, entry.nbytes, size):
        if entry.checksum:
            digest.update(chunk)
        yield chunk
    if entry.checksum and digest.hexdigest() != entry.checksum:
        raise DamagedFileError(
            f"The bytes of '{name}' in {entry.file.name} are damaged.",
            f"{entry.file}: at byte {entry.offset:,} the checksum is not the one of packing.",
            "Check the disk, then pack the model again with `moei quantize`.",
        )


def load_dense_weights(
    model: PreTrainedModel,
    dense: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    expert_parameters: Iterable[str],
    kept: Mapping[str, KeptBlocks],
) -> None:
    """Fill everything but the expert parameters, and take these out of their modules.

    kept: by checkpoint name, what stays blocks.
    Raises: DamagedFileError when weights are missing or do not fit.
    """
    readers: dict[Path, FileReader] = {}
    try:
        for entry in dense.values():
            if entry.file not in readers:
                readers[entry.file] = FileReader(entry.file)
        lazy = {
            name: _LazyTensor(name, entry, readers[entry.file], dtype)
            for name, entry in dense.items()
            if name not in kept
        }
        absent = [*expert_parameters, *(name for one in kept.values() for name in one.parameters)]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        report = load_dense(model, lazy, dtype, absent)

        def read(name: str) -> torch.Tensor:
            return read_blocks(name, dense[name], readers[dense[name].file], kept[name].matrix)

        bring_in(model, kept, read, dtype)
    finally:
        for reader in readers.values():
            reader.close()
    if report.missing:
        raise _incomplete(f"{len(report.missing)} are missing, such as '{report.missing[0]}'.")
    if report.mismatched:
        raise _incomplete(f"'{report.mismatched[0]}' has another shape than config.json says.")
    if report.errors:
        raise _incomplete(report.errors[0].splitlines()[0])
    _remove(model, expert_parameters)
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not left, f"left on meta: {left[:3]}"
    model.train(False)
    model.requires_grad_(False)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _incomplete(why: str) -> DamagedFileError:
    return DamagedFileError(
        "The model's dense weights do not match its config.json.",
        why,
        "Files of two models or revisions may be mixed: pull the model again into a clean folder.",
    )


def dense_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that the skeleton holds, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, tensor in _tensors(model)
    }
    return sum(storages.values())
