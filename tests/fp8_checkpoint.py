"""A tiny model in FP8, stored as DeepSeek-V3 is published: E4M3 weights with a scale for each square of a matrix."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import save_chat

SQUARE = (24, 40)
"""Neither side divides most matrices, so the last squares are smaller."""
_KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "bias")


def _grid(matrix: torch.Tensor) -> tuple[int, int]:
    return math.ceil(matrix.shape[0] / SQUARE[0]), math.ceil(matrix.shape[1] / SQUARE[1])


def _spread(scales: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Each scale over its square."""
    wide = scales.float().repeat_interleave(SQUARE[0], 0).repeat_interleave(SQUARE[1], 1)
    return wide[: matrix.shape[0], : matrix.shape[1]]


def save_fp8(folder: Path, family: str = "deepseek_v3", scale_dtype: torch.dtype = torch.float32) -> Path:
    """Write the model and a tokenizer to ``folder``, which is returned."""
    save_chat(family, folder, torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in list(tensors.items()):
        if tensor.dim() != 2 or any(part in name for part in _KEPT):
            continue
        # Powers of two, so that bfloat16 holds them, too.
        exponents = torch.randint(-12, -8, _grid(tensor), generator=torch.Generator().manual_seed(len(name)))
        scales = torch.exp2(exponents.float()).to(scale_dtype)
        tensors[name] = (tensor.float() / _spread(scales, tensor)).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(SQUARE),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dequantised(source: Path, folder: Path) -> Path:
    """The same model in float32, with torch's own values of its weights."""
    folder.mkdir(parents=True)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weights = name.removesuffix("_scale_inv")
        tensors[weights] = tensors[weights].float() * _spread(tensors.pop(name), tensors[weights])
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
