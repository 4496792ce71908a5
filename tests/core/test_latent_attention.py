"""Attention over latents in real models: known by trial, transformers' results, caches that are cut and go on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache

from moei_core.adapters.growing_layer import GrowingLayer
from moei_core.adapters.latent_attention import NativeLatentAttention
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import PREFILL_CHUNK, ExpertBudget
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.forecast.shape import NATIVE_ATTENTION
from moei_core.quant import native
from moei_core.types import Phase
from tests.core.test_exactness import ours, reference
from tests.packed import pack_folder
from tests.tiny_models import LATENT_FAMILIES

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
EVERYTHING = ExpertBudget(fraction=1.0)


def attending(adapter: TransformersAdapter) -> list[NativeLatentAttention]:
    forwards = [vars(module).get("forward") for module in adapter.model.modules()]
    return [one for one in forwards if isinstance(one, NativeLatentAttention)]


@pytest.mark.parametrize("packed", [False, True], ids=["stored", "packed"])
@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_every_kind_is_known_by_trial(
    chat_folder: Callable[..., Path], family: str, packed: bool, tmp_path: Path
) -> None:
    folder = chat_folder(family, "bfloat16")
    if packed:
        pack_folder(folder, tmp_path / "store")
        folder = tmp_path / "store"
    for dtype in (None, torch.float32):
        adapter = TransformersAdapter(folder, dtype)
        adapter.load()
        assert len(attending(adapter)) == 3
    assert adapter.config.model_type in NATIVE_ATTENTION


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_e2_float32_is_transformers_eager(chat_folder: Callable[..., Path], family: str) -> None:
    folder = chat_folder(family, "bfloat16")
    expected, tokens = reference(folder, torch.float32, "eager")
    logits, found, _ = ours(folder, "float32", EVERYTHING)
    assert found == tokens
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_e2_bfloat16_is_no_worse_than_transformers(chat_folder: Callable[..., Path], family: str) -> None:
    """Each layer's attention of one token, over the same cache, against the module in float32."""
    folder = chat_folder(family, "bfloat16")
    adapter = TransformersAdapter(folder)
    adapter.load()
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    generator, count = torch.Generator().manual_seed(0), 90
    for found in attending(adapter):
        states = found.random_states(count, generator)
        given = torch.randn((1, 1, found.width), generator=generator).bfloat16()
        turns = exact.rotary_emb(given.float(), torch.tensor([[count]]))
        rounded = tuple(one.bfloat16() for one in turns) if isinstance(turns, tuple) else turns

        def run(
            forward: Callable[..., object],
            dtype: torch.dtype,
            turns: object,
            given: torch.Tensor = given,
            states: tuple[torch.Tensor, torch.Tensor] = states,
            number: int = found._layer,
        ) -> torch.Tensor:
            cache = Cache(layers=[GrowingLayer() for _ in range(number + 1)])
            cache.layers[number].update(*(one.to(dtype) for one in states))
            output, _ = forward(  # type: ignore[misc]
                hidden_states=given.to(dtype),
                position_embeddings=turns,
                attention_mask=None,
                past_key_values=cache,
            )
            return output.float()

        with torch.inference_mode():
            truth = run(exact.layers[found._layer].self_attn, torch.float32, turns)
            errors = [
                float((run(forward, torch.bfloat16, rounded) - truth).square().mean())
                for forward in (found, found._own)
            ]
        assert 0 < errors[0] <= errors[1]


class Conversation:
    """Passes through a loaded model, and the cache that they share."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.cache = loaded, ConversationCache(loaded.adapter.config)

    def read(self, tokens: list[int]) -> torch.Tensor:
        """Logits of the last of ``tokens``, which go through in chunks as a prompt does."""
        for start in range(0, len(tokens), PREFILL_CHUNK):
            logits = self._pass(tokens[start : start + PREFILL_CHUNK])
        return logits

    def step(self, token: int) -> torch.Tensor:
        return self._pass([token])

    def _pass(self, tokens: list[int]) -> torch.Tensor:
        self.loaded.runtime.forward_pass(Phase.DECODE if len(tokens) == 1 else Phase.PREFILL, len(tokens))
        with torch.inference_mode():
            logits = self.loaded.adapter.model(
                torch.tensor([tokens]), past_key_values=self.cache.cache, use_cache=True
            ).logits[0, -1]
        self.loaded.runtime.end_pass()
        self.cache.commit(tokens)
        return logits.float()


@pytest.mark.parametrize("family", ["deepseek_v2_low", "deepseek_v3"])
def test_a_long_cache_that_is_cut_goes_on(chat_folder: Callable[..., Path], family: str) -> None:
    """Prompts by transformers' forward and tokens by ours share one cache of latents, of any length."""
    folder = chat_folder(family, "bfloat16")
    prompt = torch.randint(0, 258, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    with LoadedModel(folder, LoadOptions(experts=EVERYTHING, dtype="float32", context=1500)) as loaded:
        torch.set_num_threads(1)
        chat = Conversation(loaded)
        chat.read(prompt)
        # One latent and one turned key for all heads, and that is what the account of memory says.
        held = [
            layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3])
            for layer in chat.cache.cache.layers
        ]
        assert held == [32 + 8] * 3 and loaded.kv_nbytes_per_token == sum(held) * 4
        steps = [chat.step(token) for token in (5, 6, 7)]
        # A token of a turn that is taken back, then another end of the prompt, then the first one again.
        chat.cache.reuse_prefix([*prompt[:600], 1])
        chat.read([9, 9, 9])
        chat.step(3)
        assert chat.cache.reuse_prefix(prompt) == 600
        chat.read(prompt[600:])
        again = [chat.step(token) for token in (5, 6, 7)]
        for one, other in zip(steps, again, strict=True):
            assert (one - other).abs().max() <= 1e-4
        # The same by prompts alone.
        for count in (1, 2, 3):
            assert chat.cache.reuse_prefix([*prompt, 5, 6, 7][: 1000 + count]) == 999 + count
            chat.cache._cut_to(990)
            logits = chat.read([*prompt[990:], *(5, 6, 7)[:count]])
            assert (logits - steps[count - 1]).abs().max() <= 1e-4


@pytest.mark.parametrize("packed", [False, True], ids=["stored", "packed"])
def test_e1_no_thread_count_and_no_residency_changes_a_bit(
    chat_folder: Callable[..., Path], packed: bool, tmp_path: Path
) -> None:
    folder = chat_folder("deepseek_v3", "bfloat16")
    if packed:
        pack_folder(folder, tmp_path / "store")
        folder = tmp_path / "store"
    expected, tokens, _ = ours(folder, "bfloat16", EVERYTHING)
    before = native.num_threads()
    try:
        for threads, share in ((3, 1.0), (1, 0.5)):
            native.set_num_threads(threads)
            assert torch.equal(
                ours(folder, "bfloat16", ExpertBudget(fraction=share), forced=tokens)[0], expected
            )
    finally:
        native.set_num_threads(before)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("change", ["scaling", "rotation", "latent", "attribute", "child"])
def test_another_attention_is_left_alone(
    chat_folder: Callable[..., Path], family: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = TransformersAdapter(chat_folder(family, "bfloat16"))
    attention = type(adapter.model.model.layers[0].self_attn)
    code = sys.modules[attention.__module__]
    if change == "scaling":
        own = attention.forward
        monkeypatch.setattr(
            attention, "forward", lambda self, hidden_states, **a: own(self, hidden_states * 1.1, **a)
        )
    elif change == "rotation":
        name = "apply_rotary_emb" if family == "deepseek_v2" else "apply_rotary_pos_emb_interleave"
        rotate = getattr(code, name)
        monkeypatch.setattr(code, name, lambda q, k, *turn: rotate(k.expand_as(q) * 0.5 + q, k, *turn))
    elif change == "latent":
        expand = attention.expand_kv
        monkeypatch.setattr(
            attention, "expand_kv", lambda self, latents, turned: expand(self, latents.roll(1, -1), turned)
        )
    elif change == "attribute":
        for layer in adapter.model.model.layers:
            layer.self_attn.softcap = 30.0
    else:
        for layer in adapter.model.model.layers:
            layer.self_attn.indexer = nn.Identity()
    adapter.load()
    assert not attending(adapter)


def test_a_token_that_failed_half_way_can_be_taken_back(chat_folder: Callable[..., Path]) -> None:
    with LoadedModel(chat_folder("deepseek_v2"), LoadOptions(experts=EVERYTHING)) as loaded:
        chat = Conversation(loaded)
        for token in (1, 2, 3):
            chat.step(token)
        expected = chat.step(4)
        chat.cache._cut_to(3)

        def fail() -> None:
            if chat.cache.cache.layers[1].get_seq_length() == 4:
                raise InterruptedError

        loaded.runtime.before_access = fail
        with pytest.raises(InterruptedError):
            chat.step(9)
        loaded.runtime.before_access = None
        chat.cache.roll_back()
        assert torch.equal(chat.step(4), expected)
