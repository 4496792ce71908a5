"""Dense weights: blocks stay blocks, tied ones share them, and single tokens compute what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Cache

from moei_core.adapters import kept_blocks
from moei_core.adapters.dense_linear import BlockEmbedding, BlockLinear, NativeLinear, use_native_linears
from moei_core.adapters.growing_layer import GrowingLayer
from moei_core.adapters.native_decode import NativeAttention, NativeNorm
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.forecast.shape import NATIVE_ATTENTION
from moei_core.quant import native
from moei_core.types import Phase
from tests.packed import pack_folder
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


@pytest.fixture(scope="module")
def packed(
    chat_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("packed") / "store"
            pack_folder(chat_folder(family, "bfloat16"), made[family])
        return made[family]

    return get


def load(folder: Path, dtype: torch.dtype | None = None) -> TransformersAdapter:
    adapter = TransformersAdapter(folder, dtype)
    adapter.load()
    return adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_matrix_stays_in_its_blocks(packed: Callable[[str], Path], family: str) -> None:
    adapter = load(packed(family))
    stored = [one for one in adapter.packed.dense.values() if one.format == "Q8_0"]
    kept = {
        module.get_buffer("blocks").data_ptr(): module
        for module in adapter.model.modules()
        if isinstance(module, (BlockLinear, BlockEmbedding))
    }
    assert sorted((m.matrix.rows, m.matrix.cols) for m in kept.values()) == sorted(
        one.shape for one in stored
    )
    assert not [m for m in adapter.model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    # The account before loading is that after, but for what is computed (rotary tables) and rows filled up to 16.
    assert adapter.dense_nbytes <= adapter.expected_dense_nbytes + 4096
    assert adapter.expected_dense_nbytes < 0.62 * sum(
        torch.Size(one.shape).numel() * 2 for one in adapter.packed.dense.values()
    )


def test_tied_weights_are_one_buffer(packed: Callable[[str], Path]) -> None:
    model = load(packed("qwen3_moe")).model
    assert model.config.tie_word_embeddings
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(embedding, BlockEmbedding) and isinstance(head, BlockLinear)
    assert embedding.blocks.data_ptr() == head.blocks.data_ptr()
    # 258 rows are no multiple of 16: the last group is filled up.
    tokens = torch.tensor([[0, 15, 16, 200, 257]])
    assert torch.equal(embedding(tokens)[0], head.weight[tokens[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_looked_up_rows_and_products_are_those_of_the_decoded_weights(
    packed: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a load that decodes: embeddings to the bit, layers within the quantisation of their inputs."""
    blocks = load(packed(family)).model
    monkeypatch.setattr(
        kept_blocks, "native", type("Missing", (), {"available": staticmethod(lambda: False)})
    )
    decoded = load(packed(family)).model
    assert not [m for m in decoded.modules() if isinstance(m, BlockLinear)]
    tokens = torch.arange(0, blocks.config.vocab_size, 7)[None]
    assert torch.equal(blocks.get_input_embeddings()(tokens), decoded.get_input_embeddings()(tokens))
    compared = 0
    for path, module in blocks.named_modules():
        if isinstance(module, BlockLinear):
            x = torch.randn((2, 3, module.in_features), generator=torch.Generator().manual_seed(0)).bfloat16()
            expected, found = decoded.get_submodule(path)(x).float(), module(x).float()
            assert (found - expected).square().mean() <= (0.02**2) * expected.square().mean()
            compared += 1
    assert compared > 8


class _ReadsWeight(nn.Module):
    def __init__(self, inner: BlockLinear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.weight)


def test_a_weight_that_model_code_reads_is_decoded_for_good(packed: Callable[[str], Path]) -> None:
    adapter = load(packed("mixtral"))
    layer = adapter.model.model.layers[0].self_attn.q_proj
    values = layer.weight
    assert layer.weight_reads == 1
    model = nn.Sequential(_ReadsWeight(layer), adapter.model.lm_head)
    model(torch.zeros((1, 64), dtype=torch.bfloat16))
    kept_blocks.give_up_read_ones(model)
    assert type(model[0].inner) is nn.Linear and torch.equal(model[0].inner.weight, values)
    assert isinstance(model[1], BlockLinear)


def test_only_plain_large_layers_are_replaced() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(512, 512), Special(512, 512), nn.Linear(16, 16), nn.Linear(512, 512).double()
    )
    model.requires_grad_(False)
    expected = model[0]
    use_native_linears(model)
    assert [type(one) for one in model] == [NativeLinear, Special, nn.Linear, nn.Linear]
    with pytest.raises(RuntimeError, match="moved"):
        model.double()
    for rows in (1, 4, 5):
        x = torch.randn(rows, 512)
        assert torch.allclose(model[0](x), expected(x), atol=1e-5)
    assert not torch.equal(model[0](x[:1]), torch.zeros(1, 512))


def natively(adapter: TransformersAdapter) -> tuple[int, int]:
    """How many norms and attentions have the native forward."""
    forwards = [module.forward for module in adapter.model.modules()]
    return (
        sum(isinstance(one, NativeNorm) for one in forwards),
        sum(isinstance(one, NativeAttention) for one in forwards),
    )


def test_which_families_are_computed_natively(chat_folder: Callable[..., Path]) -> None:
    found = {family: natively(load(chat_folder(family, "bfloat16"))) for family in FAMILIES}
    # Two norms a layer and the last one, qwen3_moe's heads, deepseek_v2's latent.
    assert found == {"mixtral": (7, 3), "qwen3_moe": (13, 3), "deepseek_v2": (10, 3), "gpt_oss": (9, 4)}
    # Forecasts have no model to try, so they know it by name.
    assert {family for family, (_, attention) in found.items() if attention} == NATIVE_ATTENTION & set(
        FAMILIES
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("change", ["scaling", "rotation", "norm", "attribute"])
def test_another_attention_is_left_alone(
    chat_folder: Callable[..., Path], family: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variants that the kernel does not compute are noticed by trial, or by an attribute."""
    import sys

    adapter = TransformersAdapter(chat_folder(family, "bfloat16"))
    attention = type(adapter.model.model.layers[0].self_attn)
    code = sys.modules[attention.__module__]
    own, rotate = attention.forward, code.apply_rotary_pos_emb
    if change == "scaling":
        monkeypatch.setattr(
            attention, "forward", lambda self, hidden_states, **a: own(self, hidden_states * 1.1, **a)
        )
    elif change == "rotation":
        monkeypatch.setattr(
            code, "apply_rotary_pos_emb", lambda q, k, cos, sin, *a: rotate(q, k, cos, -sin, *a)
        )
    elif change == "norm":

        def normed(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> object:
            return rotate(nn.functional.normalize(q, dim=-1) * 8, k, cos, sin)

        monkeypatch.setattr(code, "apply_rotary_pos_emb", normed)
    else:
        for layer in adapter.model.model.layers:
            layer.self_attn.softcap = 30.0
    adapter.load()
    assert natively(adapter)[1] == 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_token_that_failed_half_way_can_be_taken_back(
    chat_folder: Callable[..., Path], family: str
) -> None:
    with LoadedModel(chat_folder(family), LoadOptions(experts=ExpertBudget(fraction=1.0))) as loaded:
        model, cache = loaded.adapter.model, ConversationCache(loaded.adapter.config)

        def step(token: int) -> torch.Tensor:
            loaded.runtime.forward_pass(Phase.DECODE, 1)
            with torch.inference_mode():
                return model(torch.tensor([[token]]), past_key_values=cache.cache, use_cache=True).logits

        for token in (1, 2, 3):
            step(token)
            cache.commit([token])
        expected = step(4)
        cache.roll_back()

        def fail() -> None:
            if cache.cache.layers[1].get_seq_length() == 4:
                raise InterruptedError

        loaded.runtime.before_access = fail
        with pytest.raises(InterruptedError):
            step(9)
        loaded.runtime.before_access = None
        cache.roll_back()
        assert torch.equal(step(4), expected)


@pytest.mark.parametrize("tokens", [1, 512])
def test_a_cache_takes_no_more_than_its_context_ahead(tokens: int) -> None:
    """A budget counts on so much; growing by half would exceed it by up to a half."""
    layer, context = GrowingLayer(5000), 5000
    for end in range(tokens, context + 1, tokens):
        layer.update(torch.ones(1, 1, tokens, 2), torch.ones(1, 1, tokens, 2))
        assert end <= layer.capacity <= context + 255
    layer.update(torch.ones(1, 1, 600, 2), torch.ones(1, 1, 600, 2))
    assert bool((layer.keys[..., : layer.get_seq_length(), :] == 1).all())


def test_the_cache_grows_token_by_token_as_in_larger_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((2, 1, 2, 600, 8), generator=generator)
    at_once, one_by_one = GrowingLayer(), GrowingLayer()
    keys, values = at_once.update(states[0], states[1])
    for t in range(600):
        place = one_by_one.place_for_token(2, 8, states[0])
        assert place is not None and place[3] == t < place[2]
        one_by_one.keys[:, :, t], one_by_one.values[:, :, t] = states[0, :, :, t], states[1, :, :, t]
        one_by_one.wrote_token()
    assert torch.equal(one_by_one.keys[..., :600, :], keys) and torch.equal(
        one_by_one.values[..., :600, :], values
    )
    assert one_by_one.place_for_token(4, 8, states[0]) is None
    assert one_by_one.place_for_token(2, 8, states[0].double()) is None
    assert one_by_one.place_for_token(2, 8, states[0], 9) is None
    assert Cache(layers=[one_by_one]).get_seq_length() == 600
