"""Building a model without its experts: on meta, expert parameters removed, dense weights loaded.

Done otherwise (``from_pretrained`` without the expert keys) transformers materialises the experts after all,
and ``to_empty`` leaves non-persistent buffers as garbage.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from mmap import mmap
from pathlib import Path
from types import EllipsisType

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moei_core.adapters.transformers_private import build_on_meta, causal_lm_class, load_dense
from moei_core.errors import DamagedFileError, UnsupportedModelError
from moei_core.store.base import PAGE, align_up
from moei_core.store.file_reader import FileReader
from moei_core.store.safetensors_header import TensorEntry

_BOUNCE_NBYTES = 4 << 20
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


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

    def __init__(self, entry: TensorEntry, reader: FileReader) -> None:
        self._entry = entry
        self._reader = reader

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return read_tensor(self._entry, self._reader)


_bounce = threading.local()


def read_tensor(entry: TensorEntry, reader: FileReader) -> torch.Tensor:
    """A tensor of its own memory, read past the page cache through a small buffer per thread."""
    if entry.dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"The weights are stored as {entry.dtype}, which moei does not read yet.",
            hint="Use a bf16 version of the model.",
        )
    if not hasattr(_bounce, "buffer"):
        _bounce.buffer = mmap(-1, _BOUNCE_NBYTES + 2 * PAGE)
    result = torch.empty(entry.nbytes, dtype=torch.uint8)
    target = memoryview(result.numpy())  # type: ignore[arg-type]
    with memoryview(_bounce.buffer) as buffer:
        done = 0
        while done < entry.nbytes:
            offset = entry.offset + done
            # Up to a page boundary first, whole pages after that.
            count = min(align_up(offset + _BOUNCE_NBYTES - PAGE) - offset, entry.nbytes - done)
            lead = offset % PAGE
            try:
                reader.read_into(offset, count, buffer, lead)
            except (OSError, EOFError) as error:
                raise DamagedFileError(
                    f"Reading {entry.file.name} failed.", f"{entry.file}: {error}.", "Pull the model again."
                ) from error
            target[done : done + count] = buffer[lead : lead + count]
            done += count
    return result.view(_DTYPES[entry.dtype]).view(entry.shape)


def load_dense_weights(
    model: PreTrainedModel,
    dense: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    expert_parameters: Iterable[str],
) -> None:
    """Fill everything but the expert parameters, and take these out of their modules.

    Raises: DamagedFileError when weights are missing or do not fit.
    """
    readers: dict[Path, FileReader] = {}
    try:
        for entry in dense.values():
            if entry.file not in readers:
                readers[entry.file] = FileReader(entry.file)
        lazy = {name: _LazyTensor(entry, readers[entry.file]) for name, entry in dense.items()}
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        report = load_dense(model, lazy, dtype, expert_parameters)
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
