"""A tiny model as a GGUF file of mixed formats, written with ``gguf``, and the same weights as floats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import build, save_tokenizer

_DENSE = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "shared_expert_gate": "ffn_gate_inp_shexp",
    "shared_expert.gate_proj": "ffn_gate_shexp",
    "shared_expert.up_proj": "ffn_up_shexp",
    "shared_expert.down_proj": "ffn_down_shexp",
}
_FORMATS = {"ffn_down_exps": "Q6_K", "exps": "Q4_K", "token_embd": "Q6_K", "attn_v": "Q5_K", "shexp": "Q4_K"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
MERGED = ("he", "ll", "hell", "Ġw")
_BLOCKS = {"Q4_K": (144, slice(0, 4)), "Q5_K": (176, slice(0, 4)), "Q6_K": (210, slice(208, 210))}
"""Bytes of a block of 256 weights, and where its float16 scales are."""


def _blocks(form: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Any weights of a size that products with them stay near 1: uint8 [..., bytes of a row]."""
    nbytes, scales = _BLOCKS[form]
    rows = np.prod(shape[:-1], dtype=int)
    raw = rng.integers(0, 256, (rows * shape[-1] // 256, nbytes), dtype=np.uint8)
    values = rng.uniform(1e-5, 6e-5, (len(raw), (scales.stop - scales.start) // 2)).astype("<f2")
    raw[:, scales] = values.view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def _published_name(name: str) -> str:
    """Of a parameter's own name, the GGUF one."""
    parts = name.removeprefix("model.").split(".")
    if parts[0] != "layers":
        return f"{_DENSE[parts[0]]}.{parts[-1]}"
    module = ".".join(parts[2:-1]).removeprefix("self_attn.")
    module = module if module == "mlp.gate" else module.removeprefix("mlp.")
    return f"blk.{parts[1]}.{_DENSE[module]}.{parts[-1]}"


def save_gguf(folder: Path, family: str, parts: int = 1, experts: Sequence[str] = ()) -> Path:
    """Write the model in ``folder`` as ``model.gguf``, which is returned, or its first part, and as a checkpoint of the
    same values in ``folder / "floats"``. experts: their format by layer, instead of all alike."""
    model = build(family)
    config, rng = model.config, np.random.default_rng(3)
    published = folder / "floats"
    model.save_pretrained(published)
    save_tokenizer(published)
    floats = load_file(published / "model.safetensors")
    tensors: dict[str, tuple[np.ndarray, str]] = {}

    def add(name: str, shape: tuple[int, ...], values: np.ndarray) -> np.ndarray:
        form = "F32"
        if len(shape) > 1 and "gate_inp" not in name:
            form = next((form for part, form in _FORMATS.items() if part in name), "Q8_0")
        if experts and "_exps" in name:
            form = experts[int(name.split(".")[1])]
        raw = (
            values.astype(np.float32)
            if form == "F32"
            else gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        )
        if form in _BLOCKS:
            raw = _blocks(form, shape, rng)
        tensors[name] = raw, form
        kind = gguf.GGMLQuantizationType[form]
        return np.asarray(raw if form == "F32" else gguf.dequantize(raw, kind), np.float32).reshape(shape)

    for name in [name for name in floats if ".experts." not in name]:
        values, to = floats[name].float().numpy(), _published_name(name)
        squeezed = values[0] if "ffn_gate_inp_shexp" in to else values
        floats[name] = torch.from_numpy(add(to, squeezed.shape, squeezed).reshape(values.shape).copy())
    for layer in range(config.num_hidden_layers):
        for leaf in ("gate", "up", "down"):
            names = [
                f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj.weight"
                for expert in range(config.num_experts)
            ]
            stacked = np.stack([floats[name].float().numpy() for name in names])
            values = add(f"blk.{layer}.ffn_{leaf}_exps.weight", stacked.shape, stacked)
            floats.update(
                {name: torch.from_numpy(one.copy()) for name, one in zip(names, values, strict=True)}
            )
    save_file(floats, published / "model.safetensors", metadata={"format": "pt"})
    names = [f"model-{number:05d}-of-{parts:05d}.gguf" for number in range(1, parts + 1)]
    files = [folder / name for name in names] if parts > 1 else [folder / "model.gguf"]
    for number, file in enumerate(files):
        writer = gguf.GGUFWriter(file, config.model_type.replace("_", ""))
        if number == 0:
            _describe(writer, config, published)
        for name, (raw, form) in list(tensors.items())[number :: len(files)]:
            writer.add_tensor(name, raw, raw_dtype=None if form == "F32" else gguf.GGMLQuantizationType[form])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


def _describe(writer: gguf.GGUFWriter, config: object, published: Path) -> None:
    facts = config.to_dict()  # type: ignore[attr-defined]
    writer.add_block_count(facts["num_hidden_layers"])
    writer.add_context_length(facts["max_position_embeddings"])
    writer.add_embedding_length(facts["hidden_size"])
    writer.add_feed_forward_length(facts["intermediate_size"])
    writer.add_expert_feed_forward_length(facts["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in facts:
        writer.add_expert_shared_feed_forward_length(facts["shared_expert_intermediate_size"])
    writer.add_head_count(facts["num_attention_heads"])
    writer.add_head_count_kv(facts["num_key_value_heads"])
    if facts.get("head_dim"):
        writer.add_key_length(facts["head_dim"])
    writer.add_rope_freq_base(float(facts["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(facts["rms_norm_eps"])
    writer.add_expert_count(config.num_experts)  # type: ignore[attr-defined]
    writer.add_expert_used_count(facts["num_experts_per_tok"])
    vocabulary = json.loads((published / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.get), *MERGED, "<|im_end|>", "<|im_start|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    normal = [gguf.TokenType.NORMAL] * (len(tokens) - 2)
    writer.add_token_types([*normal, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL])
    writer.add_token_merges(["h e", "l l", "he ll", "Ġ w"])
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_chat_template(TEMPLATE)
