"""The only file with transformers' private imports. transformers is pinned to one minor version for it.

Everything here is a thin, named door: what the rest of the adapters needs from ``conversion_mapping``,
``core_model_loading``, ``modeling_utils`` and ``integrations.moe``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig

ExpertsFunction = Callable[..., torch.Tensor]
IMPLEMENTATION = "moei"


def register_experts_function(function: ExpertsFunction) -> None:
    """Make ``function(module, hidden_states, top_k_index, top_k_weights)`` selectable as ``moei``."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, function)


def wrap_attention(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let every attention that goes through torch's fused product go through ``wrap`` of it instead."""
    ALL_ATTENTION_FUNCTIONS.register("sdpa", wrap(sdpa_attention_forward))


def causal_lm_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers would build for ``config``; None if it is not a causal language model."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def build_on_meta(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model without any memory for its weights, exactly as ``from_pretrained`` would start it."""
    with contextlib.ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        return model_class(config)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the tensors of one parameter come from in the checkpoint.

    tensors: for each concatenated piece, the names of its checkpoint tensors in order.
    merged: each tensor holds one expert (True) or all of them along the first dimension (False).
    transpose: ``no``, ``always`` or ``if-needed`` (when the stored shape differs from the parameter's).
    """

    tensors: tuple[tuple[str, ...], ...]
    merged: bool
    transpose: str


@dataclass(frozen=True, slots=True)
class MappedCheckpoint:
    """Where checkpoint tensors go. wanted: the sources of the parameters asked for.

    dense: all other names with their parameter's. converted: those of them that are more than renamed.
    """

    wanted: dict[str, Source]
    dense: dict[str, str]
    converted: frozenset[str]


class UnknownConversionError(Exception):
    """A checkpoint conversion that cannot be undone tensor by tensor; the argument names its operations."""


def map_checkpoint(model: PreTrainedModel, names: Iterable[str], wanted: Iterable[str]) -> MappedCheckpoint:
    """Which checkpoint tensors make up each parameter of ``wanted``, and where the others go.

    Names that the model's class ignores (multi-token prediction layers) are in neither.

    Must be called while ``model`` still has these parameters (on meta), since transformers resolves prefixes
    by looking at the model's state dict. Raises: UnknownConversionError.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state: dict[str, torch.Tensor] = model.state_dict()
    targets = set(wanted)
    found: dict[str, dict[str, list[str]]] = {}
    dense: dict[str, str] = {}
    converted: set[str] = set()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target in targets:
            found.setdefault(target, {}).setdefault(pattern or "", []).append(name)
        elif target in state or not any(pattern.search(name) for pattern in ignored):
            dense[name] = target
            if pattern is not None:
                converted.add(name)
    sources = {target: _source(converter_of, pieces) for target, pieces in found.items()}
    return MappedCheckpoint(sources, dense, frozenset(converted))


def tied_parameters(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """For each parameter that shares its weights: the others that do."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        group = groups.setdefault(source, {source})
        group.add(target)
        groups[target] = group
    return {name: tuple(sorted(group - {name})) for name, group in groups.items()}


def _source(converter_of: Mapping[str, WeightConverter], pieces: Mapping[str, list[str]]) -> Source:
    if "" in pieces:
        return Source(tuple((name,) for name in pieces[""]), merged=False, transpose="no")
    converter = converter_of[next(iter(pieces))]
    ordered = tuple(tuple(pieces[pattern]) for pattern in converter.source_patterns if pattern in pieces)
    operations = [_describe(operation) for operation in converter.operations]
    match operations:
        case ["merge"] | ["merge", "concatenate"]:
            return Source(ordered, merged=True, transpose="no")
        case ["concatenate"]:
            return Source(ordered, merged=False, transpose="no")
        case ["transpose always"] | ["transpose if-needed"]:
            return Source(ordered, merged=False, transpose=operations[0].removeprefix("transpose "))
        case _:
            raise UnknownConversionError(", ".join(operations))


def _describe(operation: Any) -> str:
    """The operation in our words where it keeps each expert's bytes contiguous, else its class's name."""
    if isinstance(operation, MergeModulelist) and operation.dim == 0:
        return "merge"
    if isinstance(operation, Concatenate) and operation.dim == 1:
        return "concatenate"
    if isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {1, 2}:
        return "transpose if-needed" if operation.check_dims else "transpose always"
    return type(operation).__name__


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What did not fit when the dense weights were loaded; all empty when everything did."""

    missing: list[str]
    mismatched: list[str]
    errors: list[str]


def load_dense(
    model: PreTrainedModel, tensors: Mapping[str, Any], dtype: torch.dtype, absent: Iterable[str]
) -> LoadReport:
    """Fill the parameters of ``model`` (on meta), except those named in ``absent``: they stay on meta.

    tensors: checkpoint name to an object whose ``[...]`` reads the tensor. Conversions, non-persistent buffers
    and weight tying are transformers' own.
    """
    mapping: list[Any] = list(get_model_conversion_mapping(model))
    load_config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    for name in absent:
        # Without the mark, initialisation would give the experts memory and random values.
        model.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), load_config)
    mismatched = [str(entry[0]) for entry in info.mismatched_keys]
    errors = [*info.error_msgs, *(str(error) for error in info.conversion_errors.values())]
    if mismatched or errors:
        return LoadReport([], sorted(mismatched), errors)
    info.missing_keys.difference_update(absent)
    # Tied weights are filled by tying; what else is missing must not be initialised at random.
    model.mark_tied_weights_as_initialized(info)  # type: ignore[no-untyped-call]
    missing = sorted(info.missing_keys - set(model.all_tied_weights_keys))
    if missing:
        return LoadReport(missing, [], [])
    model._move_missing_keys_from_meta_to_device(info.missing_keys, None, None, None)
    model._initialize_missing_keys(is_quantized=False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    return LoadReport([], [], [])
