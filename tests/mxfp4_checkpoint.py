"""A tiny gpt-oss in MXFP4, stored as openai/gpt-oss-20b is published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny_models import build, save_tokenizer

_FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def published(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, in, out], as transformers' parameters are, to (blocks [experts, out, in / 32, 16], scales)."""
    blocks = matrices.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    scaled = torch.ldexp(blocks, -exponents.int()[..., None])
    codes = (scaled.abs()[..., None] - _FP4).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8), (exponents + 127).to(torch.uint8)


def save_mxfp4(folder: Path, split: bool = False) -> Path:
    """Write the model and a tokenizer to ``folder``, which is returned. split: scales in files of their own."""
    model = build("gpt_oss", torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = published(tensor)
        else:
            tensors[name] = tensor.contiguous()
    config = model.config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_tokenizer(folder)
    if not split:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {
        name: f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors" for name in sorted(tensors)
    }
    for file in set(places.values()):
        own = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def dequantised(source: Path, folder: Path) -> Path:
    """The same model with transformers' own values of its experts, in float32, which transformers can load."""
    from safetensors import safe_open
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        values = convert_moe_packed_tensors(
            tensors.pop(name), tensors.pop(f"{stem}_scales"), dtype=torch.float32
        )
        tensors[stem] = values.contiguous()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder
