"""Small checkpoints in the published layouts, made of bytes alone."""

from __future__ import annotations

import json
import random
import struct
from math import prod
from pathlib import Path

_ITEM = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]], seed: int = 0) -> bytes:
    """A safetensors file with random content. tensors: name -> (dtype, shape)."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = _ITEM[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + random.Random(seed).randbytes(end)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write ``files`` below ``folder``."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def mixtral_tensors(
    layers: int, experts: int, hidden: int, ffn: int, vocab: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a Mixtral checkpoint, in the order of the layers."""
    tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}self_attn.{name}.weight"] = ("BF16", (hidden, hidden))
        tensors[f"{at}block_sparse_moe.gate.weight"] = ("BF16", (experts, hidden))
        for expert in range(experts):
            for name, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
                tensors[f"{at}block_sparse_moe.experts.{expert}.{name}.weight"] = ("BF16", shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = ("BF16", (hidden,))
    tensors["model.norm.weight"] = ("BF16", (hidden,))
    tensors["lm_head.weight"] = ("BF16", (vocab, hidden))
    return tensors


def mixtral(
    layers: int = 2,
    experts: int = 4,
    hidden: int = 32,
    ffn: int = 64,
    vocab: int = 64,
    shards: int = 2,
    seed: int = 0,
) -> dict[str, bytes]:
    """The files of a repository: what a pull needs, and some that it must leave alone."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": b'{"eos_token_id": 2}',
        "tokenizer_config.json": b'{"model_max_length": 128}',
        "tokenizer.json": b'{"version": "1.0"}',
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# Tiny Mixtral\n",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "consolidated.safetensors": safetensors_bytes({"second_copy": ("BF16", (64, 64))}, seed + 900),
        "original/model.safetensors": safetensors_bytes({"third_copy": ("BF16", (64, 64))}, seed + 901),
    }
    tensors = mixtral_tensors(layers, experts, hidden, ffn, vocab)
    if shards == 1:
        files["model.safetensors"] = safetensors_bytes(tensors, seed)
        return files
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        weight_map |= dict.fromkeys(mine, file)
        files[file] = safetensors_bytes({name: tensors[name] for name in mine}, seed + shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files
