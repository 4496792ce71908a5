"""Write a moei model folder as one GGUF file with the same bits, so that a peer computes with what moei computes with.

Blocks are copied, never encoded again: a packed store's Q8_0 and Q4_0 blocks, or a checkpoint's bf16. Norms and routers
become float32, which holds them exactly. The vocabulary is made up: the file is for measuring speed on token ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moei_core.adapters.checkpoint import read_tensors
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.quant.formats import decode
from moei_core.quant.layouts import from_layout
from moei_core.store.base import PAGE, StoredTensor
from moei_core.store.safetensors_header import TensorEntry
from moei_core.types import ExpertKey

ARCHITECTURES = {"mixtral": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}
_DENSE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERTS = (
    ("ffn_gate_exps", "gate_up_proj", 0),
    ("ffn_up_exps", "gate_up_proj", 1),
    ("ffn_down_exps", "down_proj", 0),
)
_EXACT_IN_FLOAT32 = ("norm", "gate_inp")

Tensor = tuple[str, np.ndarray, gguf.GGMLQuantizationType]


def export(folder: Path, target: Path) -> None:
    """Write the model in ``folder`` to ``target``. KeyError for a family that is not in ``ARCHITECTURES``."""
    adapter = TransformersAdapter(folder)
    config = adapter.config.to_dict()
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]])
    _describe(writer, config)
    # Twice over the tensors: GGUF wants all names and shapes first, and memory holds one layer of experts.
    for name, data, kind in _tensors(adapter, config, read=False):
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in _tensors(adapter, config, read=True):
        writer.write_tensor_data(data)
    writer.close()
    # Whole sectors, or a loop device over the file would lack the last bytes.
    os.truncate(target, -(-target.stat().st_size // PAGE) * PAGE)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.get("rope_theta") or rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>" for token in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])


def _tensors(adapter: TransformersAdapter, config: dict[str, Any], read: bool) -> Iterator[Tensor]:
    """All tensors in the order of the file. Without ``read`` the arrays have their shape and no memory."""
    for name, entry in _dense(adapter).items():
        to = _gguf_name(name)
        data = _bytes(entry.file, entry.offset, entry.nbytes, read)
        if any(word in to for word in _EXACT_IN_FLOAT32):
            values = (
                decode(entry.dtype, data, entry.shape)
                if read
                else np.broadcast_to(np.float32(0), entry.shape)
            )
            yield to, values, gguf.GGMLQuantizationType.F32
            continue
        rows = data.reshape(*entry.shape[:-1], -1)
        if config["model_type"] == "mixtral" and ("attn_q." in to or "attn_k." in to):
            rows = _interleave_halves(
                rows, config["num_attention_heads" if "attn_q." in to else "num_key_value_heads"]
            )
        yield to, rows, gguf.GGMLQuantizationType[entry.dtype]
    for layer in adapter.spec().moe_layers:
        for to, param, index in _EXPERTS:
            experts = [
                next(
                    one
                    for one in adapter.experts[ExpertKey(layer, expert)]
                    if (one.param, one.index) == (param, index)
                )
                for expert in range(adapter.spec().num_experts[layer])
            ]
            yield (
                f"blk.{layer}.{to}.weight",
                _stack(experts, read),
                gguf.GGMLQuantizationType[experts[0].format],
            )


def _dense(adapter: TransformersAdapter) -> dict[str, TensorEntry]:
    if adapter.packed is not None:
        return adapter.packed.dense_entries(adapter.folder)
    return {name: entry for name, entry in read_tensors(adapter.folder).items() if ".experts." not in name}


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{_DENSE[module]}.weight"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_DENSE[rest]}.weight"


def _stack(experts: list[StoredTensor], read: bool) -> np.ndarray:
    """uint8 [experts, rows, bytes of a row]"""
    first = experts[0]
    rows = first.shape[0]
    out = np.empty((len(experts), rows, first.nbytes // rows), np.uint8)
    if read:
        for place, one in zip(out, experts, strict=True):
            plain = from_layout(
                one.layout, one.format, _bytes(one.file, one.offset, one.nbytes, read), one.shape
            )
            place[:] = plain.reshape(rows, -1)
    return out


def _interleave_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a rotary projection as the llama architecture wants them: a head's two halves alternate."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _bytes(file: Path, offset: int, nbytes: int, read: bool) -> np.ndarray:
    return (
        np.fromfile(file, np.uint8, nbytes, offset=offset) if read else np.broadcast_to(np.uint8(0), nbytes)
    )
