"""Checkpoints with the real shapes of well-known models and random weights, made here at the disk's speed.

They are for measuring where the real weights are not: same tensor names, shapes, order and files as published,
in bf16. ``layers`` counts the layers with routed experts; leading dense layers come on top, so ``deepseek-v2-lite``
with 4 layers has 5 decoder layers. The weights are one block of normal numbers (std 0.02) read from a different
place for each tensor. So that a token's own identity and not the average over the context decides its routing in
deep layers too, the input embedding has std 1 and what layers add to it is 16 times smaller; otherwise all tokens
of a random model end at the same experts.

The models live in ``<cache>/synthetic`` under a size limit; those used longest ago go first.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from moei_core.config import format_size, parse_size
from moei_core.errors import DoesNotFitError, ModelNotFoundError, MoeiError, UsageError
from moei_core.hub.layout import INDEX_NAME
from moei_core.hub.resolve import SYNTHETIC_PREFIX, ModelFiles, synthetic_root
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS, Config, SyntheticModel, TensorPlan

if TYPE_CHECKING:
    from moei_core.hub.transfer import PullProgress

DEFAULT_LIMIT = "40GB"
_SHARD_NBYTES = 5 * 10**9
_MARKER = "moei-synthetic.json"
_FORMAT_VERSION = 1
# Odd and no multiple of any row, so that rows of a tensor longer than the block are not the same rows again.
_BLOCK_ITEMS = 2**24 + 43
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Made:
    """A synthetic model on this machine. used: when, in seconds since the epoch."""

    name: str
    folder: Path
    nbytes: int
    used: float


def full_name(name: str, layers: int) -> str:
    """What the model with ``layers`` MoE layers is called: ``synthetic:mixtral-8x7b@4``."""
    return f"{SYNTHETIC_PREFIX}{name}@{layers}"


def size_limit() -> int:
    """``MOEI_SYNTHETIC_LIMIT`` in bytes, 40 GB if it is not set. Raises: UsageError."""
    return parse_size(os.environ.get("MOEI_SYNTHETIC_LIMIT", DEFAULT_LIMIT), "MOEI_SYNTHETIC_LIMIT")


def made_models() -> list[Made]:
    """The synthetic models here, the one used longest ago first."""
    found = []
    for folder in sorted(synthetic_root().glob("*@*")):
        with suppress(OSError):
            used = (folder / _MARKER).stat().st_mtime
            nbytes = sum(path.stat().st_size for path in folder.iterdir())
            found.append(Made(SYNTHETIC_PREFIX + folder.name, folder, nbytes, used))
    return sorted(found, key=lambda made: made.used)


def make_synthetic(
    name: str,
    layers: int | None = None,
    *,
    limit_nbytes: int | None = None,
    progress: PullProgress | None = None,
) -> ModelFiles:
    """The synthetic ``name`` with ``layers`` MoE layers (all without), made now unless it is here already.

    Raises: ModelNotFoundError for an unknown name, UsageError, DoesNotFitError (limit or disk), MoeiError.
    """
    model = SYNTHETIC_MODELS.get(name)
    if model is None:
        raise ModelNotFoundError(
            f"There is no synthetic model '{name}'.",
            f"There are: {', '.join(SYNTHETIC_MODELS)}.",
            "How many layers it has, --layers says; its format --quant." if "@" in name else "",
        )
    layers = model.moe_layers if layers is None else layers
    if not 1 <= layers <= model.moe_layers:
        raise UsageError(f"{name} has 1 to {model.moe_layers} layers with experts, not {layers}.")
    folder = synthetic_root() / f"{name}@{layers}"
    with _lock():
        if not (folder / _MARKER).is_file():
            _remove_unfinished()
            config = model.cut(layers)
            tensors = list(model.tensors(config))
            nbytes = sum(_nbytes(tensor) for tensor in tensors)
            _make_room(
                nbytes, size_limit() if limit_nbytes is None else limit_nbytes, full_name(name, layers)
            )
            write_checkpoint(model, config, folder, progress)
        (folder / _MARKER).touch()
    return ModelFiles(full_name(name, layers), folder, "synthetic")


def write_checkpoint(
    model: SyntheticModel, config: Config, folder: Path, progress: PullProgress | None = None
) -> None:
    """Write config, tokenizer and weights to ``folder``, which appears only when all of it is there."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    tensors = list(model.tensors(config))
    if progress is not None:
        progress.start(sum(_nbytes(tensor) for tensor in tensors), 0)
    try:
        unfinished.mkdir(parents=True)
        _write_json(unfinished / "config.json", config)
        ids: dict[str, int | None] = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
        }
        _write_json(unfinished / "generation_config.json", ids)
        write_tokenizer(unfinished, config["vocab_size"], ids)
        _write_weights(unfinished, tensors, progress)
        _write_json(
            unfinished / _MARKER,
            {"format_version": _FORMAT_VERSION, "model": model.name, "layers": config["num_hidden_layers"]},
        )
        unfinished.replace(folder)
    except OSError as error:
        raise MoeiError(
            f"{folder} cannot be written.",
            f"{error.strerror or error}.",
            "MOEI_HOME (or XDG_CACHE_HOME) names the place.",
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(folder: Path, tensors: list[TensorPlan], progress: PullProgress | None) -> None:
    shards = list(_shards(tensors))
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    blocks = _Blocks()
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb", buffering=0) as file:
            _write_shard(file, shard, blocks, progress)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(_nbytes(tensor) for tensor in tensors)
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterable[TensorPlan]) -> Iterator[list[TensorPlan]]:
    shard: list[TensorPlan] = []
    size = 0
    for tensor in tensors:
        if shard and size + _nbytes(tensor) > _SHARD_NBYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += _nbytes(tensor)
    yield shard


def _write_shard(
    file: BinaryIO, shard: list[TensorPlan], blocks: _Blocks, progress: PullProgress | None
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + _nbytes(tensor)
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # As safetensors' own writer does: data that begins at an odd byte could only be used as a copy.
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in shard:
        for piece in blocks.pieces(tensor):
            while piece:
                written = file.write(piece) or 0
                piece = piece[written:]
                if progress is not None:
                    progress.advance(written)


class _Blocks:
    """The random numbers, once, in bf16: rounded float32 without its lower half."""

    def __init__(self) -> None:
        import numpy as np

        numbers = np.random.default_rng(0).standard_normal(_BLOCK_ITEMS, dtype=np.float32)
        self._blocks = {
            "embedding": self._bf16(numbers),
            "weight": self._bf16(numbers * np.float32(0.02)),
            "output": self._bf16(numbers * np.float32(0.02 / 16)),
            "norm": self._bf16(np.ones(2**16, np.float32)),
        }

    @staticmethod
    def _bf16(numbers: object) -> memoryview:
        import numpy as np

        bits = np.asarray(numbers, np.float32).view(np.uint32)
        rounded = ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
        return memoryview(rounded.tobytes())

    def pieces(self, tensor: TensorPlan) -> Iterator[memoryview]:
        """The bytes of ``tensor``: the block from a place that its name decides, round and round."""
        block = self._blocks[tensor.kind]
        at = 2 * (zlib.crc32(tensor.name.encode()) % (len(block) // 2))
        left = _nbytes(tensor)
        while left:
            piece = block[at : at + left]
            yield piece
            left -= len(piece)
            at = 0


def _nbytes(tensor: TensorPlan) -> int:
    return 2 * math.prod(tensor.shape)


def write_tokenizer(folder: Path, vocab_size: int, special_ids: dict[str, int | None]) -> None:
    """A byte-level tokenizer with ``vocab_size`` tokens: the special ones, 256 bytes, and numbered words.

    The words are never produced by encoding; they make a random model's output visible.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = {
        key.removesuffix("_id"): (f"<{key.removesuffix('_token_id')}>", number)
        for key, number in special_ids.items()
        if number is not None
    }
    vocabulary = dict(specials.values())
    taken = set(vocabulary.values())
    free = (number for number in range(vocab_size) if number not in taken)
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = next(free)
    for number in free:
        vocabulary[f"Ġ{number:x}"] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, _ in specials.values()])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            **{key: token for key, (token, _) in specials.items()},
        },
    )


def _make_room(nbytes: int, limit: int, name: str) -> None:
    """Remove models used longest ago until ``nbytes`` more stay within ``limit`` and fit on the disk."""
    if nbytes > limit:
        raise DoesNotFitError(
            f"{name} needs {format_size(nbytes)}, more than the limit of synthetic models, {format_size(limit)}.",
            hint="Ask for fewer --layers, or set MOEI_SYNTHETIC_LIMIT.",
        )
    synthetic_root().mkdir(parents=True, exist_ok=True)
    there = made_models()
    while there and sum(made.nbytes for made in there) + nbytes > limit:
        shutil.rmtree(there.pop(0).folder)
    free = shutil.disk_usage(synthetic_root()).free
    if nbytes > free:
        raise DoesNotFitError(
            f"{name} does not fit on the disk of {synthetic_root()}.",
            f"{format_size(nbytes)} are needed, {format_size(free)} are free.",
            "Ask for fewer --layers, or set MOEI_HOME to a larger disk.",
        )


def _remove_unfinished() -> None:
    """Delete what killed processes left. The lock is held, so nobody is writing."""
    for path in synthetic_root().glob(".*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _lock() -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock

    try:
        synthetic_root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoeiError(
            f"{synthetic_root()} cannot be made.",
            f"{error.strerror or error}.",
            "Set MOEI_HOME to a folder that you may write, or ask its owner.",
        ) from error
    with WeakFileLock(synthetic_root() / ".lock"):
        yield
