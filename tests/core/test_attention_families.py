"""A token's attention as one native call against transformers, for every family that forecasts believe to have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moei_core.adapters.native_decode import NativeAttention
from moei_core.adapters.native_layer import NativeLayer
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget
from moei_core.forecast.shape import NATIVE_ATTENTION
from moei_core.quant import native
from tests.core.test_exactness import ours, reference
from tests.tiny_models import VOCABULARY, save_tokenizer

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())

_ALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "kv_lora_rank": 32, "q_lora_rank": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _LATENT),
    "dots1": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2},
    "exaone_moe": {"sliding_window": 24},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True},
    "gpt_oss": {"sliding_window": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    # Nearly a third of all values of q and k lie outside.
    "olmoe": {"clip_qkv": 1.0},
}
_WHOLE_LAYERS = {"gpt_oss": 3, "mixtral": 3, "olmoe": 3, "qwen3_moe": 3, "deepseek_v2": 2}
"""Of three layers, the first of which has no experts in DeepSeek's."""


@pytest.fixture(scope="module", params=sorted(NATIVE_ATTENTION))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(family, folder of a random float32 model of it)."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    config = CONFIG_MAPPING[name](**{**_ALL, **_OWN.get(name, {}), "dtype": torch.float32})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif "norm" not in path.rsplit(".", 2)[-2]:
                # Biases and sinks.
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return name, folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layer_attends_natively(family: tuple[str, Path], dtype: str) -> None:
    name, folder = family
    adapter = TransformersAdapter(folder, getattr(torch, dtype))
    adapter.load()
    forwards = [vars(module).get("forward") for module in adapter.model.modules()]
    layers = adapter.config.num_hidden_layers
    assert sum(isinstance(one, NativeAttention) for one in forwards) == layers
    assert sum(isinstance(one, NativeLayer) for one in forwards) == _WHOLE_LAYERS.get(name, 0)


@pytest.mark.sampled(2)
def test_it_decodes_as_transformers_does(family: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is longer than the sliding windows."""
    _, folder = family
    natively = []
    prepare = NativeAttention.prepare

    def noted(self: NativeAttention, *given: Any) -> Any:
        found = prepare(self, *given)
        natively.append(found is not None)
        return found

    monkeypatch.setattr(NativeAttention, "prepare", noted)
    expected, expected_tokens = reference(folder, torch.float32, "eager")
    logits, tokens, loaded = ours(folder, "float32", ExpertBudget(fraction=1.0))
    assert tokens == expected_tokens
    assert (logits - expected).abs().max() <= 1e-4
    steps = 16 * loaded.adapter.config.num_hidden_layers
    assert len(natively) > steps and all(natively[-steps:])


@pytest.mark.sampled(3)
def test_its_routers_can_be_watched_while_it_decodes(family: tuple[str, Path]) -> None:
    """They are applied early, or left alone; the answer is the same."""
    _, folder = family
    half = ExpertBudget(fraction=0.5)
    expected, tokens, _ = ours(folder, "float32", half)
    logits, found, loaded = ours(folder, "float32", half, tokens, "mixed")
    assert found == tokens and torch.equal(logits, expected)
    assert loaded.runtime.hinter is not None


@pytest.mark.sampled(3)
def test_bfloat16_is_near_float32(family: tuple[str, Path]) -> None:
    """As near as transformers in bfloat16, by the median over all logits of what is decoded."""
    _, folder = family
    exact, tokens = reference(folder, torch.float32, "eager")
    theirs, _ = reference(folder, torch.bfloat16, "eager", forced=tokens)
    found, _, _ = ours(folder, "bfloat16", ExpertBudget(fraction=1.0), forced=tokens)
    error, their_error = ((one - exact)[-16:].abs().median() for one in (found, theirs))
    assert error <= 1.5 * their_error
