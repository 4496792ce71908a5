"""What a checkpoint is, read from ``config.json`` and the headers of its safetensors files alone.

A header is a few megabytes at most, so this takes milliseconds and needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moei_core.errors import DamagedFileError
from moei_core.hub.layout import weight_files
from moei_core.store.gguf_table import is_gguf_folder, read_table
from moei_core.store.packed_folder import is_packed
from moei_core.store.safetensors_header import TensorEntry, read_header

# Layers have these names in all families of transformers.
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
# `mlp.experts.7.up_proj.weight` (one expert) and `mlp.experts.gate_up_proj` (all of a layer in one tensor);
# Granite calls the fused tensors input_linear and output_linear. `shared_experts` has no dot in front.
_ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ALL_EXPERTS = re.compile(r"\.experts\.\D|\.block_sparse_moe\.(?:input|output)_linear\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|output|embed_out)\.weight$")

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_NUM_LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
_CONTEXT = ("max_position_embeddings", "max_seq_len", "n_positions")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What a checkpoint holds. All sizes are of the weights as stored.

    moe_layers: decoder layers with routed experts. num_experts: of the widest layer. top_k: 0 if unknown.
    expert_nbytes: bytes of one expert of one layer (the largest). experts_nbytes: all routed experts.
    dense_nbytes: what every token may need: attention, norms, routers, shared experts, embeddings.
    unused_nbytes: weights beyond the decoder (multi-token prediction layers), which a chat never reads.
    active_nbytes: weights that one token reads: dense part (of an input embedding one row), top-k experts.
    formats: bytes by format, the largest first.
    """

    model_type: str
    num_hidden_layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    context: int
    expert_nbytes: int
    experts_nbytes: int
    dense_nbytes: int
    unused_nbytes: int
    active_nbytes: int
    formats: Mapping[str, int]
    quantization: str = ""

    @property
    def shape(self) -> str:
        """``layers x experts x top-k``."""
        return f"{self.moe_layers} x {self.num_experts} x top-{self.top_k or '?'}"

    @property
    def total_nbytes(self) -> int:
        return self.experts_nbytes + self.dense_nbytes + self.unused_nbytes

    @property
    def format(self) -> str:
        """The one word for how the weights are stored."""
        return self.quantization or next(iter(self.formats), "?").lower()


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``. Raises: DamagedFileError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read.",
            f"{error}.",
            "Remove the model and pull it again: a pull alone keeps a file that has its size.",
        ) from error
    if not isinstance(config, dict):
        raise DamagedFileError(
            f"{path} is not the config of a model.",
            hint="Remove the model and pull it again: a pull alone keeps a file that has its size.",
        )
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: multi-modal ones nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def expert_count(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer as the config says; 0 if it is no Mixture-of-Experts model."""
    return _first_int(config, _NUM_EXPERTS)


def expert_top_k(config: Mapping[str, Any]) -> int:
    """Routed experts for one token as the config says; 0 if unknown."""
    return _first_int(config, _TOP_K)


def _first_int(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    text = text_config(config)
    nested = text.get("ffn_config")  # DBRX
    for place in (text, nested if isinstance(nested, dict) else {}):
        for name in names:
            value = place.get(name)
            # Hunyuan gives one number for each layer.
            value = max(value, default=0) if isinstance(value, list) else value
            if isinstance(value, int) and value > 0:
                return value
    return 0


def read_tensors(folder: Path) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors of the index's files, of the single one, or of a GGUF file. Raises: DamagedFileError, MoeiError."""
    if is_gguf_folder(folder):
        yield from read_table(folder).items()
        return
    for name in weight_files(folder):
        yield from read_header(folder / name).items()


def summarize(folder: Path) -> ModelSummary:
    """Read config and headers, or a packed store's manifest. Raises: DamagedFileError, MoeiError."""
    config = read_config(folder)
    if is_packed(folder):
        return _summarize_packed(folder, config)
    text = text_config(config)
    num_layers = _first_int(config, _NUM_LAYERS)
    count, top_k = expert_count(config), expert_top_k(config)
    formats: Counter[str] = Counter()
    layers: dict[int, Counter[int]] = {}  # layer -> expert -> bytes
    fused: Counter[int] = Counter()  # layer -> bytes of all its experts
    dense = unused = embedding = row = 0
    has_head = False
    for name, tensor in read_tensors(folder):
        formats[tensor.dtype] += tensor.nbytes
        found = _LAYER.search(name)
        layer = int(found[1]) if found else -1
        if name.startswith("mtp.") or (num_layers and layer >= num_layers):
            unused += tensor.nbytes
        elif layer >= 0 and (one := _ONE_EXPERT.search(name)):
            layers.setdefault(layer, Counter())[int(one[1])] += tensor.nbytes
        elif layer >= 0 and _ALL_EXPERTS.search(name):
            fused[layer] += tensor.nbytes
        else:
            dense += tensor.nbytes
            has_head = has_head or _HEAD.search(name) is not None
            if _EMBEDDING.search(name) and tensor.shape:
                embedding, row = tensor.nbytes, tensor.nbytes // max(1, tensor.shape[0])
    for layer, nbytes in fused.items():
        if count:
            layers.setdefault(layer, Counter()).update(dict.fromkeys(range(count), nbytes // count))
        else:
            dense += nbytes
    active = dense - (embedding - row if has_head else 0)
    active += sum(max(experts.values()) * min(top_k, len(experts)) for experts in layers.values())
    return ModelSummary(
        model_type=str(config.get("model_type") or text.get("model_type") or "?"),
        num_hidden_layers=num_layers,
        moe_layers=len(layers),
        num_experts=max((len(experts) for experts in layers.values()), default=0),
        top_k=top_k,
        context=_first_int(config, _CONTEXT),
        expert_nbytes=max((max(experts.values()) for experts in layers.values()), default=0),
        experts_nbytes=sum(fused.values()) * bool(count)
        + sum(sum(experts.values()) for layer, experts in layers.items() if layer not in fused),
        dense_nbytes=dense,
        unused_nbytes=unused,
        active_nbytes=active,
        formats=dict(formats.most_common()),
        quantization=_quantization(config),
    )


def _summarize_packed(folder: Path, config: Mapping[str, Any]) -> ModelSummary:
    from moei_core.store.packed_manifest import read_manifest

    manifest, text, top_k = read_manifest(folder), text_config(config), expert_top_k(config)
    formats: Counter[str] = Counter()
    layers: dict[int, list[int]] = {}
    for key, expert in manifest.experts.items():
        parts = manifest.kinds[expert.kind]
        layers.setdefault(key.layer, []).append(sum(part.nbytes for part in parts))
        for part in parts:
            formats[part.format] += part.nbytes
    dense = embedding = row = 0
    has_head = False
    for name, tensor in manifest.dense.items():
        formats[tensor.format] += tensor.nbytes
        dense += tensor.nbytes
        has_head = has_head or _HEAD.search(name) is not None
        if _EMBEDDING.search(name):
            embedding, row = tensor.nbytes, tensor.nbytes // max(1, tensor.shape[0])
    active = dense - (embedding - row if has_head else 0)
    active += sum(max(experts) * min(top_k, len(experts)) for experts in layers.values())
    return ModelSummary(
        model_type=str(config.get("model_type") or text.get("model_type") or "?"),
        num_hidden_layers=_first_int(config, _NUM_LAYERS),
        moe_layers=len(layers),
        num_experts=max((len(experts) for experts in layers.values()), default=0),
        top_k=top_k,
        context=_first_int(config, _CONTEXT),
        expert_nbytes=max((max(experts) for experts in layers.values()), default=0),
        experts_nbytes=sum(sum(experts) for experts in layers.values()),
        dense_nbytes=dense,
        unused_nbytes=0,
        active_nbytes=active,
        formats=dict(formats.most_common()),
        quantization=manifest.format.lower(),
    )


def _quantization(config: Mapping[str, Any]) -> str:
    for place in (config, text_config(config)):
        method = place.get("quantization_config")
        if isinstance(method, dict):
            bits = method.get("bits")
            suffix = f"-{bits}bit" if isinstance(bits, int) and math.isfinite(bits) else ""
            return str(method.get("quant_method", "quantised")) + suffix
    return ""


def is_moe(folder: Path) -> bool:
    """Whether the config in ``folder`` names routed experts."""
    with suppress(DamagedFileError):
        return expert_count(read_config(folder)) > 1
    return False
