"""FP8 checkpoints: packed, they are what their dequantised weights would be packed to, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.errors import DamagedFileError, UnsupportedModelError
from moei_core.quant import fp8
from moei_core.store.packed_manifest import read_manifest
from tests.fp8_checkpoint import dequantised, save_fp8
from tests.packed import pack_folder


def test_every_byte_has_torchs_value() -> None:
    raw = np.arange(256, dtype=np.uint8)
    ours = fp8.decode(raw, np.ones((1, 1), np.float32), (16, 16), (128, 128)).reshape(-1)
    theirs = torch.from_numpy(raw).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(ours[~np.isnan(ours)]), np.signbit(theirs[~np.isnan(theirs)]))


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize(("family", "dtype"), [("deepseek_v3", torch.float32), ("qwen3_moe", torch.bfloat16)])
def test_it_is_packed_as_its_values_would_be(
    form: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_fp8(tmp_path / "fp8", family, dtype)
    pack_folder(source, tmp_path / "packed", form, "rows16")
    pack_folder(dequantised(source, tmp_path / "plain"), tmp_path / "expected", form, "rows16")
    for name in ("experts-00001.bin", "dense.bin"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    dense = read_manifest(tmp_path / "packed").dense
    assert not [name for name in dense if "scale_inv" in name]
    # Rows of 24 weights are no whole blocks: they are kept as what they are with their scales.
    assert {tensor.format for tensor in dense.values()} >= {"Q8_0", "BF16"}


def test_dense_weights_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_fp8(tmp_path / "fp8")
    pack_folder(source, tmp_path / "expected")
    monkeypatch.setattr("moei_core.store.packing.CHUNK", 4096)
    pack_folder(source, tmp_path / "packed")
    assert (tmp_path / "packed" / "dense.bin").read_bytes() == (
        tmp_path / "expected" / "dense.bin"
    ).read_bytes()


Tensors = dict[str, torch.Tensor]


def _no_scales(tensors: Tensors, name: str) -> None:
    del tensors[f"{name}_scale_inv"]


def _too_few_scales(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:1]


def _no_number(tensors: Tensors, name: str) -> None:
    tensors[name].view(torch.uint8)[0, 0] = 0x7F


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (_no_scales, UnsupportedModelError, "has no scales for squares"),
        (_too_few_scales, DamagedFileError, "and its scales have shapes"),
        (_no_number, DamagedFileError, "not finite numbers"),
    ],
)
@pytest.mark.parametrize("leaf", ["mlp.experts.3.down_proj.weight", "self_attn.o_proj.weight"])
def test_damaged_ones_are_refused(
    spoil: Callable[[Tensors, str], None], error: type[Exception], sentence: str, leaf: str, tmp_path: Path
) -> None:
    source = save_fp8(tmp_path / "fp8")
    tensors = load_file(source / "model.safetensors")
    spoil(tensors, f"model.layers.1.{leaf}")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=sentence):
        pack_folder(source, tmp_path / "packed")


def test_another_kind_of_fp8_is_refused(tmp_path: Path) -> None:
    source = save_fp8(tmp_path / "fp8")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="a kind of FP8 that moei does not read"):
        TransformersAdapter(source)
