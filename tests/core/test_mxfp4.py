"""gpt-oss in MXFP4 as it is published: read in place and packed, against transformers' own values of the weights."""

from __future__ import annotations

import json
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moei_core.adapters.skeleton import experts_modules
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget
from moei_core.engine.expert_compute import HeldExpert
from moei_core.engine.native_compute import native_experts
from moei_core.errors import DamagedFileError, ExpertReadError, UnsupportedModelError
from moei_core.quant import mxfp4, native
from moei_core.quant.layouts import LAYOUTS, from_layout
from moei_core.store.base import read_expert
from moei_core.store.memory_store import MemoryStore
from moei_core.store.packed_manifest import read_manifest
from moei_core.types import ExpertKey
from tests.core.test_exactness import budgets, check_every_way_of_arriving, ours, reference
from tests.core.test_packed_exactness import stored_matrices
from tests.mxfp4_checkpoint import dequantised, published, save_mxfp4
from tests.native.test_expert_ffn import Expert
from tests.native.test_expert_ffn import reference as exact_and_bound
from tests.packed import pack_folder, plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mxfp4(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as transformers decodes them, in float32."""
    return dequantised(folder, tmp_path_factory.mktemp("dequantised"))


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "store"
    pack_folder(folder, target, "MXFP4", "rows16")
    return target


def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_reason", "Switched off by a test.")


def parameters(theirs: Path, key: ExpertKey) -> dict[str, np.ndarray]:
    """An expert of transformers' own, matrices as [out, in]."""
    found = {}
    with safe_open(theirs / "model.safetensors", "pt") as reader:
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            one = reader.get_tensor(f"model.layers.{key.layer}.mlp.experts.{name}")[key.expert]
            found[name] = (one.T if one.dim() == 2 else one).double().numpy()
    return found


@pytest.mark.parametrize("kind", ["in place", "in two files", "without kernels", "packed", "from memory"])
def test_every_value_is_transformers(
    kind: str, folder: Path, theirs: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "without kernels":
        no_native(monkeypatch)
    if kind == "from memory":
        open_store = TransformersAdapter.open_store
        monkeypatch.setattr(
            TransformersAdapter, "open_store", lambda self: MemoryStore.copy_of(open_store(self))
        )
    used = save_mxfp4(tmp_path / "split", split=True) if kind == "in two files" else folder
    used = packed if kind == "packed" else used
    for key in (ExpertKey(0, 0), ExpertKey(1, 7), ExpertKey(3, 15)):
        expected = parameters(theirs, key)
        found = stored_matrices(used, key)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert np.array_equal(found[name], values), (key, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [16, 48, 64])
@pytest.mark.parametrize("gap", [0, 1, 77])
def test_joining_in_place(layout: str, rows: int, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the least room that joining may have, by both ways of joining; against transformers' values."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shape = (rows, 96)
    blocks, scales = published(torch.randn((1, 96, rows), generator=torch.Generator().manual_seed(rows)))
    start, count = 5 + gap, rows * 3
    memory = np.zeros(start + count + gap + 16 * count + 3, np.uint8)
    memory[start : start + count] = scales.reshape(-1).numpy()
    blocks_at = start + count + gap
    memory[blocks_at : blocks_at + 16 * count] = blocks.reshape(-1).numpy()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T.numpy()
    results = []
    for with_kernels in (native.available(), False):
        if not with_kernels:
            no_native(monkeypatch)
        slot = memory.copy()
        mxfp4.join(slot, shape, layout, start, blocks_at, blocks_at - count)
        stored = slot[blocks_at - count : blocks_at + 16 * count]
        from moei_core.quant.formats import decode

        assert np.array_equal(decode("MXFP4", from_layout(layout, "MXFP4", stored, shape), shape), expected)
        results.append(slot.tobytes())
    assert results[0][blocks_at - count :] == results[1][blocks_at - count :]


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_joining_refuses_places_that_do_not_suit() -> None:
    memory = np.zeros(17 * 16, np.uint8)
    for places in ((0, 16, 1), (0, 17, 1), (-1, 16, 0), (0, 16, -1), (17 * 16 - 15, 16, 0)):
        with pytest.raises(ValueError):
            mxfp4.join(memory, (16, 32), "rows16", *places)
    mxfp4.join(memory, (16, 32), "rows16", 0, 16, 0)


def test_e1_logits_are_bit_identical_whatever_is_resident_or_packed(folder: Path, packed: Path) -> None:
    everything, tokens, _ = ours(folder, "bfloat16", ExpertBudget(fraction=1.0))
    assert torch.isfinite(everything).all()
    for budget in budgets(folder)[1:]:
        logits, _, loaded = ours(folder, "bfloat16", budget, forced=tokens)
        assert loaded.runtime.statistics.loads > loaded.budget.slots, "the smaller budget never had to reload"
        assert torch.equal(logits, everything)
    for budget in budgets(packed):
        logits, _, _ = ours(packed, "bfloat16", budget, forced=tokens)
        assert torch.equal(logits, everything), "packing changed a bit"


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_e1_however_experts_arrive(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place an expert is joined from two places once its last chunk is there."""
    check_every_way_of_arriving(request.getfixturevalue(kind), monkeypatch)


def test_e2_without_kernels_it_is_transformers_model(
    folder: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_tokens = reference(theirs, torch.float32, "eager")
    no_native(monkeypatch)
    logits, tokens, _ = ours(folder, "float32", ExpertBudget(fraction=0.5))
    assert tokens == expected_tokens
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_e3_the_kernels_are_within_their_bound_of_transformers_values(folder: Path, theirs: Path) -> None:
    adapter = TransformersAdapter(folder, torch.float32)
    store, key = adapter.open_store(), ExpertKey(2, 5)
    layout = store.layout(key)
    assert {part.tensor.layout for part in layout.parts if part.tensor.format == "MXFP4"} == {"rows16"}
    view = memoryview(mmap(-1, layout.slot_nbytes))
    read_expert(store, key, view)
    held = HeldExpert(key, layout, view, np.frombuffer(view, np.uint8).ctypes.data, 0)
    adapter.load()
    module = next(module for _, layer, module in experts_modules(adapter.model) if layer == key.layer)
    kernel = native_experts(module, layout)
    assert kernel is not None and kernel.blocks
    inputs = torch.randn((5, adapter.spec().hidden_size), generator=torch.Generator().manual_seed(1))
    found = kernel([held], [[0, 1, 2, 3, 4]], 1, inputs).numpy()

    values = parameters(theirs, key)
    halves = {
        "gate": values["gate_up_proj"][0::2], "up": values["gate_up_proj"][1::2], "down": values["down_proj"],
        "gate_bias": values["gate_up_proj_bias"][0::2], "up_bias": values["gate_up_proj_bias"][1::2],
        "down_bias": values["down_proj_bias"],
    }  # fmt: skip
    exact, bound = exact_and_bound(kernel.ffn.layout, Expert(values=halves), inputs.numpy())
    assert kernel.ffn.layout.activation == "clamped_swiglu"
    assert (np.abs(found - exact) <= bound).all()


def test_packing_drops_nothing(folder: Path, packed: Path) -> None:
    manifest = read_manifest(packed)
    assert (manifest.format, manifest.dense_format) == ("MXFP4", "none")
    tensors = load_file(folder / "model.safetensors")
    assert {key: one.format for key, one in manifest.dense.items()} == {
        name: "BF16" for name in tensors if ".experts." not in name
    }
    for name, one in manifest.dense.items():
        with (packed / one.file).open("rb") as file:
            file.seek(one.offset)
            assert file.read(one.nbytes) == tensors[name].view(torch.uint8).numpy().tobytes()
    assert {part.layout for kind in manifest.kinds for part in kind if part.format == "MXFP4"} == {"rows16"}


def changed(folder: Path, target: Path, name: str, tensor: torch.Tensor) -> Path:
    """A copy of the model with one tensor replaced."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, target / "model.safetensors")
    return target


def test_what_is_damaged_or_not_supported_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    scales = tensors[name].clone()
    scales[3, 0, 0] = 255
    store = TransformersAdapter(changed(folder, tmp_path / "nan", name, scales)).open_store()
    slot = memoryview(mmap(-1, max(store.layout(key).slot_nbytes for key in store.experts())))
    read_expert(store, ExpertKey(1, 2), slot)
    with pytest.raises(ExpertReadError, match="not finite"):
        read_expert(store, ExpertKey(1, 3), slot)

    short = tensors[name][:, :-1].contiguous()
    with pytest.raises(DamagedFileError) as damaged:
        TransformersAdapter(changed(folder, tmp_path / "short", name, short))
    assert "down_proj_blocks" in damaged.value.why

    dense = tmp_path / "dense"
    changed(
        folder,
        dense,
        "model.layers.0.self_attn.q_proj.weight_blocks",
        torch.zeros((64, 2, 16), dtype=torch.uint8),
    )
    everything = load_file(dense / "model.safetensors")
    everything["model.layers.0.self_attn.q_proj.weight_scales"] = torch.zeros((64, 2), dtype=torch.uint8)
    del everything["model.layers.0.self_attn.q_proj.weight"]
    save_file(everything, dense / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="Dense"):
        TransformersAdapter(dense)

    for method in ("gptq", "awq"):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quant_method"] = method
        (dense / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModelError, match=method):
            TransformersAdapter(dense)


def test_it_is_not_rounded_a_second_time(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        plan(folder, "Q4_0")
    assert "mxfp4" in str(refused.value.lines())
