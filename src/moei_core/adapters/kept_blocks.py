"""Which dense weights of a packed store stay blocks in memory, and bringing them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moei_core.adapters.dense_linear import BlockEmbedding, BlockLinear
from moei_core.adapters.transformers_private import map_checkpoint, tied_parameters
from moei_core.quant import native
from moei_core.quant.formats import FORMATS
from moei_core.store.safetensors_header import TensorEntry

GROUP_ROWS = 16
"""Rows that are interleaved with each other: a chunk of a file must hold whole groups."""


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """A stored matrix whose blocks several modules (tied ones) may share. modules: their paths."""

    matrix: native.Matrix
    modules: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that are not filled."""
        return tuple(f"{path}.weight" for path in self.modules)


def find_kept(
    model: PreTrainedModel, tensors: Mapping[str, TensorEntry], expert_parameters: Iterable[str]
) -> dict[str, KeptBlocks]:
    """By checkpoint name, the dense tensors that can stay as they are stored.

    A matrix stays if it is the weight of modules that are exactly ``nn.Linear`` or ``nn.Embedding`` and no
    conversion lies between. Without native kernels nothing stays: torch multiplies only floats.
    """
    if not native.available():
        return {}
    mapped = map_checkpoint(model, tensors, expert_parameters)
    sources: dict[str, list[str]] = {}
    for name, parameter in mapped.dense.items():
        sources.setdefault(parameter, []).append(name)
    ties = tied_parameters(model)
    kept = {}
    for parameter, names in sources.items():
        entry = tensors[names[0]]
        if len(names) > 1 or names[0] in mapped.converted or entry.dtype not in FORMATS:
            continue
        if FORMATS[entry.dtype].is_float or len(entry.shape) != 2:
            continue
        group = [parameter, *ties.get(parameter, ())]
        if any(other in sources for other in group[1:]):
            continue  # stored more than once: transformers decides what that means
        paths = tuple(name.removesuffix(".weight") for name in group)
        if all(_is_plain(model, name, entry.shape) for name in group):
            rows, cols = entry.shape
            product = any(type(model.get_submodule(path)) is nn.Linear for path in paths)
            interleaved = product and entry.dtype in native.ROWS16_FORMATS
            matrix = native.Matrix(entry.dtype, rows, cols, "rows16" if interleaved else "plain")
            kept[names[0]] = KeptBlocks(matrix, paths)
    return kept


def _is_plain(model: nn.Module, parameter: str, shape: tuple[int, ...]) -> bool:
    path, _, leaf = parameter.rpartition(".")
    if leaf != "weight" or tuple(model.get_parameter(parameter).shape) != tuple(shape):
        return False
    module = model.get_submodule(path)
    # Exactly these: a subclass may compute something else.
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return type(module) is nn.Linear


def place_chunk(matrix: native.Matrix, chunk: memoryview, done: int, out: torch.Tensor) -> int:
    """Put stored rows, whole groups unless they are the last, to their place. Returns the bytes of ``out`` done."""
    raw = np.frombuffer(chunk, np.uint8)
    rows = len(raw) // native.Matrix(matrix.format, 1, matrix.cols).nbytes
    part = native.Matrix(matrix.format, rows, matrix.cols, matrix.order)
    place = out.numpy()[done : done + part.nbytes]
    if matrix.order == "rows16":
        native.to_rows16(matrix.format, rows, matrix.cols, raw, place)
    else:
        place[:] = raw
    return done + part.nbytes


def bring_in(
    model: nn.Module, kept: Mapping[str, KeptBlocks], read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> None:
    """Replace the modules by ones that hold the blocks. read: the bytes of a checkpoint tensor, in its order."""
    for name, one in kept.items():
        blocks = read(name)
        for path in one.modules:
            module = model.get_submodule(path)
            replacement: nn.Module
            if isinstance(module, nn.Embedding):
                replacement = BlockEmbedding(blocks, one.matrix, dtype)
            else:
                assert isinstance(module, nn.Linear)
                replacement = BlockLinear(blocks, one.matrix, module.bias, dtype)
            model.set_submodule(path, replacement)


def give_up_read_ones(model: nn.Module) -> None:
    """Decode the layers whose weights model code has read instead of calling them."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BlockLinear) and module.weight_reads:
            model.set_submodule(path, module.as_float())
