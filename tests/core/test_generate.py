"""Our generation loop: equal to transformers' ``generate``, reusing keys and values, rolling back failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.generate import GenerationTimes, Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.errors import ExpertReadError, InterruptedTurnError, UsageError
from tests.tiny_models import FAMILIES

GREEDY = GenerationSettings(max_new_tokens=24, temperature=0)


@pytest.fixture
def loaded(request: pytest.FixtureRequest, chat_folder: Callable[..., Path]) -> Iterator[LoadedModel]:
    folder = chat_folder(getattr(request, "param", "qwen3_moe"))
    with LoadedModel(folder, LoadOptions(experts=ExpertBudget(fraction=0.5))) as model:
        yield model


def run(
    loaded: LoadedModel,
    prompt: list[int],
    settings: GenerationSettings,
    end: frozenset[int] = frozenset(),
    chunk: int = 256,
) -> list[int]:
    generator = Generator(
        loaded.adapter.model, loaded.runtime, ConversationCache(loaded.adapter.config), lambda: False, chunk
    )
    return list(generator.tokens(prompt, settings, end, GenerationTimes(), context=512))


@pytest.mark.parametrize("loaded", FAMILIES, indirect=True)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers_generate(loaded: LoadedModel, penalty: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(loaded.folder, experts_implementation="eager")
    prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=penalty, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    settings = GenerationSettings(24, temperature=0, repetition_penalty=penalty)
    assert run(loaded, prompt, settings) == expected[0, len(prompt) :].tolist()


def test_ends_after_an_end_token_and_at_the_context(loaded: LoadedModel) -> None:
    prompt = [5, 6, 7]
    settings = GenerationSettings(24, temperature=1.0, seed=3)
    tokens = run(loaded, prompt, settings)
    cut = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 0)
    assert run(loaded, prompt, settings, frozenset({tokens[cut]})) == tokens[: cut + 1]
    generator = Generator(
        loaded.adapter.model, loaded.runtime, ConversationCache(loaded.adapter.config), lambda: False
    )
    assert list(generator.tokens(prompt, settings, frozenset(), GenerationTimes(), context=10)) == tokens[:7]


def ask(session: ChatSession, text: str) -> str:
    return "".join(piece.text for piece in session.reply(text))


@pytest.mark.parametrize("loaded", FAMILIES, indirect=True)
def test_a_later_turn_prefills_only_what_is_new(loaded: LoadedModel) -> None:
    """gpt_oss has sliding windows of 32 tokens: its cache is cut far behind them."""
    session = ChatSession(loaded, GREEDY)
    ask(session, "first question, long enough to pass any window")
    first = session.report
    ask(session, "second question")
    second = session.report
    assert first is not None and second is not None
    assert first.reused_tokens == 0
    assert second.reused_tokens >= first.prompt_tokens
    assert second.times.prefilled_tokens == second.prompt_tokens - second.reused_tokens
    continued = [message["content"] for message in session.messages]

    # The same words in a fresh session, everything prefilled: the same answer.
    fresh = ChatSession(loaded, GREEDY)
    fresh.messages = session.messages[:2]
    ask(fresh, "second question")
    assert [message["content"] for message in fresh.messages] == continued

    # Back to a shorter conversation: only the common beginning is kept.
    session.messages = []
    answer = ask(session, "first question, long enough to pass any window")
    assert answer.strip() == continued[1]
    assert session.report is not None and session.report.reused_tokens == session.report.prompt_tokens - 1


def test_prefill_in_chunks_gives_the_same_text(loaded: LoadedModel) -> None:
    prompt = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = run(loaded, prompt, GREEDY)
    assert run(loaded, prompt, GREEDY, chunk=16) == whole


def test_how_far_a_prompt_is_can_be_asked_while_it_is_read(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, seen = ChatSession(loaded, GREEDY), []
    store = loaded.runtime._store
    read = store.read_extent

    def reading(*arguments: object) -> None:
        # In a thread of the readers, as a screen would ask.
        seen.append(session.prompt_progress())
        read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "read_extent", reading)
    assert session.prompt_progress() is None
    ask(session, "a question that is read layer by layer")
    told = [one for one in seen if one is not None]
    assert session.report is not None and session.prompt_progress() is None
    assert {one.tokens for one in told} == {session.report.prompt_tokens}
    shares = [one.share for one in told]
    assert shares == sorted(shares) and shares[0] == 0.0 and 0 < shares[-1] < 1
    assert told[-1].nbytes > 0 and told[-1].seconds > told[-1].stall_s >= 0
    assert told[0].seconds_left is None and told[-1].seconds_left is not None


class Failing:
    """A store whose next reads fail on demand."""

    def __init__(self, store: object) -> None:
        self.store = store
        self.fail_after: int | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def read_extent(self, key: object, extent: object, slot: memoryview) -> None:
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise ExpertReadError(f"Reading {key} failed.")
            self.fail_after -= 1
        self.store.read_extent(key, extent, slot)  # type: ignore[attr-defined]


@pytest.mark.parametrize("after", [0, 3, 30])
def test_a_failed_turn_leaves_the_conversation_as_it_was(loaded: LoadedModel, after: int) -> None:
    store = Failing(loaded.runtime._store)
    loaded.runtime._transfers._store = store  # type: ignore[assignment]
    session = ChatSession(loaded, GREEDY)
    ask(session, "one")
    before = list(session.messages)
    store.fail_after = after
    with pytest.raises(ExpertReadError, match=r"layer . expert"):
        ask(session, "two, which needs many experts that are not here: !?xyz 0123456789")
    store.fail_after = None
    assert session.messages == before
    # What is resident is really there, and no slot is lost.
    assert set(loaded.scheduler.residents()) == set(loaded.runtime._held)
    assert loaded.runtime._pool.free == loaded.budget.slots - loaded.scheduler.resident_count
    assert loaded.scheduler.resident_count <= loaded.budget.resident
    answer = ask(session, "three")

    with LoadedModel(loaded.folder, LoadOptions()) as untouched:
        other = ChatSession(untouched, GREEDY)
        ask(other, "one")
        assert other.messages == before
        assert ask(other, "three") == answer


def test_stopping_keeps_what_was_said(loaded: LoadedModel) -> None:
    session = ChatSession(loaded, GREEDY)
    pieces = []
    for piece in session.reply("hello"):
        pieces.append(piece.text)
        if len(pieces) == 3:
            session.stop()
    assert session.report is not None and session.report.finish_reason == "interrupted"
    assert session.report.new_tokens < 24
    assert session.messages[-1]["content"] == "".join(pieces).strip()
    ask(session, "go on")
    assert session.report.finish_reason == "length"


def test_stopping_before_the_first_token_undoes_the_turn(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(loaded, GREEDY)
    ask(session, "hello")
    before, access = list(session.messages), loaded.scheduler.decide

    def stop_then_access(event: object) -> object:
        session.stop()
        return access(event)  # type: ignore[arg-type]

    monkeypatch.setattr(loaded.scheduler, "decide", stop_then_access)
    with pytest.raises(InterruptedTurnError):
        ask(session, "more")
    assert session.messages == before
    monkeypatch.undo()
    ask(session, "again")
    assert session.report is not None and session.report.new_tokens > 0


def test_a_conversation_longer_than_the_context_is_refused(loaded: LoadedModel) -> None:
    session = ChatSession(loaded, GREEDY)
    with pytest.raises(UsageError, match="longer than its context"):
        ask(session, "x" * 600)
    assert session.messages == []
    ask(session, "x" * (512 - 30))
    assert session.report is not None and session.report.finish_reason == "context"


def test_stop_strings_end_the_reply_and_are_not_part_of_it(loaded: LoadedModel) -> None:
    from dataclasses import replace

    session = ChatSession(loaded, GREEDY)
    text = ask(session, "hello")
    stop = text[6:9]
    session.clear()
    session.settings = replace(GREEDY, stop=(stop,))
    assert ask(session, "hello") == text[: text.index(stop)]
    assert session.report is not None and session.report.finish_reason == "stop-string"


LIVE = [name for name, policy in POLICIES.items() if not getattr(policy, "needs_future", False)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("policy", LIVE)
def test_every_live_policy_gives_the_same_text(chat_folder: Callable[..., Path], policy: str) -> None:
    texts = set()
    for share in (1.0, 0.4):
        options = LoadOptions(experts=ExpertBudget(fraction=share), policy=policy)
        with LoadedModel(chat_folder("qwen3_moe"), options) as model:
            session = ChatSession(model, GREEDY)
            texts.add(ask(session, "one question") + "|" + ask(session, "and another"))
            assert model.scheduler.resident_count <= model.budget.resident
            assert model.runtime._pool.free == model.budget.slots - model.scheduler.resident_count
    assert len(texts) == 1


def test_a_policy_that_needs_the_future_cannot_chat(chat_folder: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="only simulate"):
        LoadedModel(chat_folder("qwen3_moe"), LoadOptions(policy="layer-belady"))
