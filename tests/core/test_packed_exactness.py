"""E1 and E3 of the architecture for packed models."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget
from moei_core.engine.expert_compute import expert_forward, weights_in_slot
from moei_core.hub.resolve import resolve_model
from moei_core.quant.formats import decode
from moei_core.quant.layouts import from_layout
from moei_core.store.base import read_expert
from moei_core.types import ExpertKey
from tests.core.test_exactness import MODELS, budgets, check_every_way_of_arriving, ours, smallest
from tests.packed import pack_folder

FORMATS = ("Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def packed(
    chat_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Path]:
    """packed(model, format, layout): a packed store, made once."""
    made: dict[tuple[str, str, str], Path] = {}

    def get(name: str, form: str, layout: str = "plain") -> Path:
        if (name, form, layout) not in made:
            source = resolve_model(name).folder if name == "moei-demo" else chat_folder(name, "bfloat16")
            target = tmp_path_factory.mktemp("packed") / "store"
            pack_folder(source, target, form, layout)
            made[name, form, layout] = target
        return made[name, form, layout]

    return get


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_e1_logits_are_bit_identical_whatever_is_resident(
    packed: Callable[..., Path], name: str, form: str
) -> None:
    folder = packed(name, form)
    everything, tokens, loaded = ours(folder, "bfloat16", ExpertBudget(fraction=1.0))
    assert {
        part.format for kind in loaded.adapter.packed.kinds for part in kind if "bias" not in part.param
    } == {form}
    assert torch.isfinite(everything).all()
    for budget in budgets(folder)[1:]:
        logits, _, loaded = ours(folder, "bfloat16", budget, forced=tokens)
        assert loaded.runtime.statistics.loads > loaded.budget.slots, "the smaller budget never had to reload"
        assert torch.equal(logits, everything)


@pytest.mark.parametrize(
    ("name", "form"), [("moei-demo", "Q4_0"), ("gpt_oss", "Q8_0"), ("deepseek_v2", "Q4_0")]
)
def test_e1_however_packed_experts_arrive(
    packed: Callable[..., Path], name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_every_way_of_arriving(packed(name, form, "rows16"), monkeypatch)


@pytest.mark.parametrize("form", FORMATS)
def test_layouts_give_the_same_bits(packed: Callable[..., Path], form: str) -> None:
    plain, tokens, _ = ours(packed("mixtral", form), "float32", ExpertBudget(fraction=1.0))
    folder = packed("mixtral", form, "rows16")
    interleaved, _, loaded = ours(folder, "float32", ExpertBudget(fraction=1.0), forced=tokens)
    assert {part.layout for kind in loaded.adapter.packed.kinds for part in kind} == {"rows16"}
    assert torch.equal(plain, interleaved)


def stored_matrices(folder: Path, key: ExpertKey) -> dict[str, np.ndarray]:
    """The exact values of an expert's parameters in float64, as [out, in], concatenated pieces joined."""
    adapter = TransformersAdapter(folder)
    store = adapter.open_store()
    layout = store.layout(key)
    slot = memoryview(mmap(-1, layout.slot_nbytes))
    read_expert(store, key, slot)
    pieces: dict[str, list[np.ndarray]] = {}
    for part in sorted(layout.parts, key=lambda part: part.tensor.index):
        tensor = part.tensor
        raw = np.frombuffer(slot, np.uint8, tensor.nbytes, part.slot_offset)
        values = decode(
            tensor.format, from_layout(tensor.layout, tensor.format, raw, tensor.shape), tensor.shape
        )
        pieces.setdefault(tensor.param, []).append(values.astype(np.float64))
    return {name: np.concatenate(matrices) for name, matrices in pieces.items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_e3_products_are_those_of_the_stored_values(
    packed: Callable[..., Path], name: str, form: str
) -> None:
    """A projection computed in float32 from exact values: |error| <= (n + 1) u (|x| |W|), u = 2^-24, n its terms
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); then the activation, and the second one."""
    folder = packed(name, form)
    adapter = TransformersAdapter(folder, torch.float32)
    adapter.load()
    _, layer, module = next(experts_modules(adapter.model))
    key = ExpertKey(layer, 1)
    exact = stored_matrices(folder, key)
    store = adapter.open_store()
    slot = memoryview(mmap(-1, store.layout(key).slot_nbytes))
    read_expert(store, key, slot)
    weights = weights_in_slot(store.layout(key), slot)
    hidden = adapter.config.get_text_config().hidden_size
    inputs = torch.randn(5, hidden, generator=torch.Generator().manual_seed(3))
    found = expert_forward(module, weights, inputs)

    unit = 2.0**-24
    x = inputs.numpy().astype(np.float64)
    gate_up = exact["gate_up_proj"]
    before = x @ gate_up.T + exact.get("gate_up_proj_bias", 0)
    error = (hidden + 2) * unit * (np.abs(x) @ np.abs(gate_up.T) + np.abs(exact.get("gate_up_proj_bias", 0)))
    # The activation in float64, and how far it can be off when its inputs are, by the bound of its slope (below
    # 1.2 for silu(g), times the other factor) and of its own roundings.
    middle = module._apply_gate(torch.from_numpy(before)).numpy()
    if name == "gpt_oss":
        gate, up = np.clip(before[:, ::2], None, 7), np.clip(before[:, 1::2], -7, 7) + 1
        wrong = 1.7 * error[:, ::2] * np.abs(up) + error[:, 1::2] * np.abs(gate)
    else:
        half = before.shape[1] // 2
        gate, up = before[:, :half], before[:, half:]
        wrong = 1.2 * error[:, :half] * np.abs(up) + error[:, half:] * np.abs(gate)
    wrong = wrong + 8 * unit * np.abs(gate) * np.abs(up)
    down = exact["down_proj"]
    expected = middle @ down.T + exact.get("down_proj_bias", 0)
    bound = wrong @ np.abs(down.T) + (down.shape[1] + 2) * unit * (
        (np.abs(middle) + wrong) @ np.abs(down.T) + np.abs(exact.get("down_proj_bias", 0))
    )
    assert (np.abs(found.numpy() - expected) <= bound).all()
    # The bound is tight enough to tell the formats' values from the original ones.
    assert bound.max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_q8_0_is_near_the_original(
    packed: Callable[..., Path], chat_folder: Callable[..., Path], name: str
) -> None:
    """Transposed, interleaved and concatenated parts end in their places: logits move by percents, not by all."""
    source = resolve_model(name).folder if name == "moei-demo" else chat_folder(name, "bfloat16")
    original, tokens, _ = ours(source, "float32", ExpertBudget(fraction=1.0))
    logits, _, _ = ours(packed(name, "Q8_0"), "float32", smallest(source), forced=tokens)
    difference = (logits - original).abs().median() / original.std()
    assert 0 < difference < 0.05  # the native kernels quantise activations too


def test_what_stays_in_full_precision(packed: Callable[..., Path]) -> None:
    """Norms, routers and biases; all other matrices are blocks."""
    for name in ("mixtral", "deepseek_v2", "gpt_oss", "qwen3_moe"):
        dense = TransformersAdapter(packed(name, "Q4_0")).packed.dense
        full = {key for key, one in dense.items() if one.format == "BF16"}
        assert {one.format for one in dense.values()} == {"BF16", "Q8_0"}
        matrices = {key for key in full if len(dense[key].shape) == 2}
        assert matrices and all(key.endswith(("gate.weight", "router.weight")) for key in matrices)
        assert any("shared_experts" in key for key in dense if key not in full) or name != "deepseek_v2"
        assert all(len(dense[key].shape) == 2 for key in dense if key not in full)
