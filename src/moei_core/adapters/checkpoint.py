"""The files of a model folder: which tensor is where, and which of them are routed experts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moei_core.adapters.transformers_private import Source, UnknownConversionError, map_checkpoint
from moei_core.errors import DamagedFileError, ModelNotFoundError, UnsupportedModelError
from moei_core.quant.formats import FLOAT_FORMATS, FORMATS
from moei_core.quant.fp8 import F8_E4M3, SCALES_SUFFIX
from moei_core.quant.layouts import PLAIN, ROWS16, can_interleave
from moei_core.quant.mxfp4 import BLOCK, BLOCK_NBYTES, MXFP4
from moei_core.store.base import StoredTensor
from moei_core.store.file_range import FileRange, ScaleGrid
from moei_core.store.gguf_table import is_gguf_folder, read_table
from moei_core.store.safetensors_header import TensorEntry, read_header
from moei_core.types import ExpertKey

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of the checkpoint in ``folder`` by name.

    With an index, exactly the tensors of its weight map: a folder may hold a second copy of the weights.

    Raises: ModelNotFoundError without weights; DamagedFileError for missing, truncated or swapped shards.
    """
    if is_gguf_folder(folder):
        return read_table(folder)
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ModelNotFoundError(
                f"There are no weights in {folder}.",
                f"Neither {INDEX} nor {SINGLE} is there; moei reads safetensors checkpoints.",
                "Pull the model again, or give the folder that holds its .safetensors files.",
            )
        return read_header(folder / SINGLE)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFileError(
            f"The model's file {INDEX} is damaged.",
            "It holds no weight map in JSON.",
            "Remove the model and pull it again: a pull alone keeps a file that has its size.",
        ) from None
    headers = {shard: read_header(folder / shard) for shard in sorted(set(shards.values()))}
    tensors: dict[str, TensorEntry] = {}
    for name, shard in shards.items():
        if name not in headers[shard]:
            raise DamagedFileError(
                f"The model's file {shard} is not the one that the index describes.",
                f"It has no tensor '{name}': shards were swapped, or files of two models were mixed.",
                "Pull the model again into a clean folder.",
            )
        tensors[name] = headers[shard][name]
    return tensors


def join_mxfp4(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """``tensors`` with each ``X_blocks`` and ``X_scales`` of MXFP4, as gpt-oss publishes it, as one matrix ``X``.

    Raises: DamagedFileError if the two do not fit together.
    """
    joined = dict(tensors)
    for name, blocks in tensors.items():
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if stem == name or scales is None:
            continue
        *rows, count, nbytes = blocks.shape or (0, 0)
        if (nbytes, blocks.dtype, scales.dtype) != (BLOCK_NBYTES, "U8", "U8") or scales.shape != (
            *rows,
            count,
        ):
            raise _mismatch(f"'{name}' and its scales have shapes {blocks.shape} and {scales.shape}.")
        del joined[name], joined[f"{stem}_scales"]
        shape = (*rows, count * BLOCK)
        joined[stem] = TensorEntry(
            blocks.file, MXFP4, shape, blocks.offset, blocks.nbytes + scales.nbytes, scales=scales
        )
    return joined


def join_fp8(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """``tensors`` with each FP8 matrix ``X`` and its ``X_scale_inv``, as DeepSeek publishes it, as one.

    config: ``quantization_config``. Raises: DamagedFileError if the two do not fit together, UnsupportedModelError for
    FP8 with other scales.
    """
    joined = dict(tensors)
    height, width = config.get("weight_block_size") or (0, 0)
    for name, weights in tensors.items():
        if weights.dtype != F8_E4M3:
            continue
        scales = joined.pop(f"{name}{SCALES_SUFFIX}", None)
        if scales is None or scales.dtype not in FLOAT_FORMATS or min(height, width) < 1:
            raise UnsupportedModelError(
                "The weights are stored in a kind of FP8 that moei does not read.",
                f"'{name}' has no scales for squares of it, as DeepSeek-V3 has them.",
                "Use a bf16 version of the model.",
            )
        *several, rows, columns = weights.shape if len(weights.shape) > 1 else (0, 0)
        grid = (*several, -(-rows // height), -(-columns // width))
        if scales.shape != grid:
            raise _mismatch(f"'{name}' and its scales have shapes {weights.shape} and {scales.shape}.")
        place = FileRange(scales.file, scales.offset, scales.nbytes)
        shape = math.prod(grid[:-1]), grid[-1]
        joined[name] = replace(weights, grid=ScaleGrid(place, scales.dtype, shape, (height, width)))
    return joined


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint taken apart.

    experts: the stored tensors of each routed expert. dense: all the rest. routers: those names of ``dense`` that
    decide over experts.
    """

    experts: dict[ExpertKey, list[StoredTensor]]
    dense: dict[str, TensorEntry]
    routers: frozenset[str]


def take_apart(
    model: PreTrainedModel, expert_parameters: Mapping[str, int], tensors: Mapping[str, TensorEntry]
) -> Checkpoint:
    """Split ``tensors`` into routed experts and the rest.

    expert_parameters: full name of each expert parameter of ``model`` to its decoder layer index.
    Raises: UnsupportedModelError for layouts or number formats moei cannot read in place; DamagedFileError
    when tensors are missing or have other shapes than the configuration says.
    """
    try:
        mapped = map_checkpoint(model, tensors, expert_parameters)
    except UnknownConversionError as error:
        raise UnsupportedModelError(
            f"The checkpoint layout of {type(model).__name__} is not supported.",
            f"Its experts are stored in a way that must be converted first ({error}).",
            "Save the model once with transformers' save_pretrained and give moei that folder.",
        ) from None
    experts: dict[ExpertKey, list[StoredTensor]] = {}
    for parameter, layer in expert_parameters.items():
        source = mapped.wanted.get(parameter)
        if source is None:
            raise _mismatch(f"There is no tensor for '{parameter}'.")
        shape = tuple(model.get_parameter(parameter).shape)
        turned = bool(model.get_submodule(parameter.rpartition(".")[0]).is_transposed)
        for expert, stored in enumerate(_per_expert(parameter, source, shape, turned, tensors)):
            experts.setdefault(ExpertKey(layer, expert), []).extend(stored)
    check_shapes(model, expert_parameters, experts)
    blocks = [name for name in mapped.dense if tensors[name].scales is not None]
    if blocks:
        raise UnsupportedModelError(
            f"Dense weights of this checkpoint are stored as {MXFP4}, which moei reads for experts only.",
            f"Found at '{blocks[0]}'.",
            "Use a bf16 version of the model.",
        )
    routers = _routers(model, expert_parameters, mapped.dense)
    return Checkpoint(experts, {name: tensors[name] for name in mapped.dense}, routers)


def check_shapes(
    model: PreTrainedModel,
    expert_parameters: Mapping[str, int],
    experts: Mapping[ExpertKey, list[StoredTensor]],
) -> None:
    """Compare the stored experts with what the model's configuration asks for. Raises: DamagedFileError."""
    wanted = set()
    for parameter, layer in expert_parameters.items():
        num_experts, *dimensions = model.get_parameter(parameter).shape
        leaf = parameter.rpartition(".")[2]
        for expert in range(num_experts):
            stored = experts.get(ExpertKey(layer, expert), [])
            found = _joined_shape([tensor for tensor in stored if tensor.param == leaf])
            if found != (expected := tuple(dimensions)):
                raise _mismatch(f"'{parameter}' of expert {expert} has shape {found}, not {expected}.")
            wanted.add(ExpertKey(layer, expert))
    if extra := sorted(set(experts) - wanted):
        raise _mismatch(f"There is no {extra[0]} in its configuration.")


def _routers(
    model: PreTrainedModel, expert_parameters: Mapping[str, int], dense: Mapping[str, str]
) -> frozenset[str]:
    """The names in ``dense`` (checkpoint name -> parameter) of matrices that score experts.

    They are beside the experts in their block, with a row for each expert, or one row (the gate of a shared expert).
    """
    blocks = {
        parameter.rpartition(".")[0].rpartition(".")[0]: model.get_parameter(parameter).shape[0]
        for parameter in expert_parameters
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = set()
    for name, parameter in dense.items():
        shape = shapes.get(parameter, ())
        for block, num_experts in blocks.items():
            if parameter.startswith(f"{block}.") and len(shape) == 2 and shape[0] in (1, num_experts):
                found.add(name)
    return frozenset(found)


def _per_expert(
    parameter: str, source: Source, shape: tuple[int, ...], turned: bool, tensors: Mapping[str, TensorEntry]
) -> list[list[StoredTensor]]:
    """The stored tensors of each expert for one parameter of shape [num_experts, ...].

    turned: whether matrices of the parameter are [in, out]; blocks always are rows of outputs.
    """
    num_experts, expected = shape[0], shape[1:]
    leaf = parameter.rpartition(".")[2]
    pieces: list[list[StoredTensor]] = []
    for index, names in enumerate(source.tensors):
        entries = [_known_entry(name, tensors[name]) for name in names]
        if source.merged:
            if len(entries) != num_experts:
                raise _mismatch(f"'{parameter}' needs {num_experts} tensors, {len(entries)} are stored.")
            pieces.append([_stored(leaf, index, entry, entry.shape, 0, 1, False) for entry in entries])
            continue
        if len(entries) != 1 or not entries[0].shape or entries[0].shape[0] != num_experts:
            raise _mismatch(f"'{parameter}' does not hold {num_experts} experts.")
        entry, each = entries[0], entries[0].shape[1:]
        swapped = source.transpose == "always" or (source.transpose == "if-needed" and each != expected)
        swapped = turned if entry.scales is not None else swapped
        pieces.append(
            [_stored(leaf, index, entry, each, expert, num_experts, swapped) for expert in range(num_experts)]
        )
    return [[piece[expert] for piece in pieces] for expert in range(num_experts)]


def _stored(
    leaf: str, index: int, entry: TensorEntry, shape: tuple[int, ...], place: int, of: int, transposed: bool
) -> StoredTensor:
    nbytes = entry.nbytes // of
    if entry.scales is None:
        grid = entry.grid.share(place, of) if entry.grid is not None else None
        offset = entry.offset + place * nbytes
        return StoredTensor(
            leaf, index, entry.file, offset, nbytes, entry.dtype, shape, transposed, grid=grid
        )
    each = entry.scales.nbytes // of
    scales = FileRange(entry.scales.file, entry.scales.offset + place * each, each)
    layout = ROWS16 if can_interleave(entry.dtype, shape) else PLAIN
    offset = entry.offset + place * (nbytes - each)
    return StoredTensor(
        leaf, index, entry.file, offset, nbytes, entry.dtype, shape, transposed, layout, scales
    )


def _joined_shape(pieces: list[StoredTensor]) -> tuple[int, ...]:
    """The shape after concatenating the pieces of one expert along the first dimension."""
    shapes = [piece.shape[::-1] if piece.transposed else piece.shape for piece in pieces]
    if not shapes or any(not shape for shape in shapes):
        return ()
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        return (-1, *shapes[0][1:])
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _known_entry(name: str, entry: TensorEntry) -> TensorEntry:
    if entry.grid is not None:
        return entry
    if entry.dtype not in FORMATS:
        raise UnsupportedModelError(
            f"The experts of this checkpoint are stored as {entry.dtype}, which moei does not read yet.",
            f"Found at '{name}'; supported are {', '.join(FLOAT_FORMATS)}, and {MXFP4} as gpt-oss has it.",
            "Use a bf16 version of the model.",
        )
    if entry.nbytes != FORMATS[entry.dtype].nbytes(entry.shape):
        raise _mismatch(f"'{name}' has {entry.nbytes} bytes, too few or too many for its shape.")
    return entry


def _mismatch(why: str) -> DamagedFileError:
    return DamagedFileError(
        "The weights do not match the model's config.json.",
        why,
        "Files of two models or revisions may be mixed: pull the model again into a clean folder.",
    )
