"""Single tokens on a device as recordings: what they give, when they are made anew, and what cannot be recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moei_core.adapters import growing_layer
from moei_core.adapters.early_router import EarlyRouters
from moei_core.adapters.growing_layer import GrowingLayer
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.decode_graphs import DecodeGraphs
from moei_core.engine.devices import CpuDevice, Device
from moei_core.engine.hints import RouterHints
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.recorded_operations import OperationRecording
from moei_core.engine.runtime import ExpertRuntime
from moei_core.errors import DoesNotFitError, ExpertReadError
from moei_core.hub.resolve import resolve_model
from moei_core.prefetch import PrefetchMode
from moei_core.store.safetensors_store import SafetensorsStore
from moei_core.types import ExpertKey
from tests.core.test_attention_families import family as family
from tests.core.test_tiers import COSTS, DEVICES, decoded, vram_for

ALL_RESIDENT = LoadOptions(experts=ExpertBudget(fraction=1.0), dtype="float32", misses="copy")

NOT_ON_CUDA = ("phimoe",)
"""Their code makes a tensor on the processor for each token and brings it to the GPU."""


def refuse(*_: object) -> None:
    raise RuntimeError("it cannot be recorded now")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make_device", DEVICES)
def test_every_family_decodes_as_it_does_by_its_own_code(
    family: tuple[str, Path], make_device: Callable[[], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is longer than the sliding windows. Recorded and launched one by one, the bits are the same."""
    name, folder = family
    with LoadedModel(folder, ALL_RESIDENT, make_device(), COSTS) as loaded:
        assert loaded.graphs is not None
        if name in NOT_ON_CUDA and loaded.adapter.model.device.type == "cuda":
            assert loaded.graphs.why_not is not None and "CPU" in loaded.graphs.why_not
            return
        assert loaded.graphs.why_not is None
        logits, tokens = decoded(loaded)
        assert loaded.graphs._pieces
        monkeypatch.setattr(DecodeGraphs, "_record", lambda self, cache: self._forget())
        launched, _ = decoded(loaded, tokens)
        assert not loaded.graphs._pieces
        loaded.graphs = None
        own, own_tokens = decoded(loaded)
    assert tokens == own_tokens
    assert (logits - own).abs().max() <= 1e-4
    assert torch.equal(logits, launched)


def ask(session: ChatSession, text: str) -> str:
    return "".join(piece.text for piece in session.reply(text))


@pytest.mark.parametrize("make_device", DEVICES)
def test_a_conversation_outgrows_its_buffers_and_starts_again(
    make_device: Callable[[], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    record = DecodeGraphs._record

    def noted(self: DecodeGraphs, cache: Any) -> None:
        made.append(cache.buffers()[0].shape[-2])
        record(self, cache)

    monkeypatch.setattr(growing_layer, "_STEP", 32)
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions(), make_device(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=60, temperature=0))
        monkeypatch.setattr(DecodeGraphs, "_record", noted)
        questions = [
            "Tell me a story.",
            "What is a cache?",
            "Count from one to twenty.",
            "Tell me another story.",
        ]
        first = [ask(session, question) for question in questions]
        assert len(made) >= 3 and made == sorted(set(made)), made
        session.clear()
        assert [ask(session, question) for question in questions] == first
        loaded.graphs = None
        session.clear()
        assert ask(session, questions[0]) == first[0]


def test_what_asks_the_device_for_a_value_is_left_to_its_own_code(
    chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = GrowingLayer.update

    def asking(self: GrowingLayer, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> Any:
        assert float(keys.sum()) < 1e9
        return update(self, keys, values, *rest)

    monkeypatch.setattr(GrowingLayer, "update", asking)
    with LoadedModel(chat_folder("mixtral"), ALL_RESIDENT, CpuDevice(), COSTS) as loaded:
        assert loaded.graphs is not None and loaded.graphs.why_not is not None
        assert "asks for a value" in loaded.graphs.why_not
        assert any("asks for a value" in note for note in loaded.notes)
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=4, temperature=0))
        answer = ask(session, "Hello")
        session.clear()
        assert ask(session, "Hello") == answer


def test_what_keeps_a_number_of_its_own_is_found_by_trying(
    chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something that counts in Python is right while it is recorded, and wrong for ever after."""
    update, count = GrowingLayer.update, [0]

    def counting(self: GrowingLayer, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> Any:
        count[0] += 1
        return update(self, keys, values + (count[0] // 3) % 5, *rest)

    monkeypatch.setattr(GrowingLayer, "update", counting)
    with LoadedModel(chat_folder("mixtral"), ALL_RESIDENT, CpuDevice(), COSTS) as loaded:
        assert loaded.graphs is not None
        assert loaded.graphs.why_not is not None and "differ" in loaded.graphs.why_not


def test_a_token_that_fails_leaves_the_conversation_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoadOptions(experts=ExpertBudget(fraction=0.1), vram=None)
    with LoadedModel(resolve_model("moei-demo").folder, options, CpuDevice(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=30, temperature=0))
        expected = [ask(session, "What is a cache?"), ask(session, "Why?")]
        session.clear()
        assert ask(session, "What is a cache?") == expected[0]
        run_layer, left = ExpertRuntime.run_layer, [40]

        def failing(*given: Any) -> torch.Tensor:
            left[0] -= 1
            if left[0] == 0:
                raise ExpertReadError("The disk is gone.")
            return run_layer(*given)

        monkeypatch.setattr(ExpertRuntime, "run_layer", failing)
        with pytest.raises(ExpertReadError):
            ask(session, "Why?")
        assert left[0] == 0
        assert ask(session, "Why?") == expected[1]


@pytest.mark.parametrize("make_device", DEVICES)
def test_what_a_forgotten_turn_left_behind_is_not_seen(make_device: Callable[[], Device]) -> None:
    """Values that overflowed, too: behind a mask they would still be multiplied by nothing, which is no number."""
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions(), make_device(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=20, temperature=0))
        expected = ask(session, "What is a cache?")
        layers = session._cache.cache.layers
        length = layers[0].get_seq_length()
        with torch.inference_mode():
            for layer in layers:
                assert isinstance(layer, GrowingLayer) and length < layer.capacity
                # And one that was written in a pass that failed.
                layer.values[..., length - 5 : length + 1, :] = torch.inf
        session._cache.roll_back()
        session.messages = []
        assert ask(session, "What is a cache?") == expected


@pytest.mark.parametrize("grown", [1, 2, 3, 4])
def test_buffers_that_cannot_grow_leave_the_conversation_as_it_was(
    grown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's memory ends when some layers have grown, or the keys of one and not its values."""
    monkeypatch.setattr(growing_layer, "_STEP", 32)
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions(), CpuDevice(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=60, temperature=0))
        expected = ask(session, "What is a cache?")
        session.clear()
        larger, left = growing_layer._larger, [1 << 30]

        def failing(buffer: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
            left[0] -= used > 0
            if left[0] == 0:
                raise torch.OutOfMemoryError("no more")
            return larger(buffer, used, capacity)

        monkeypatch.setattr(growing_layer, "_larger", failing)
        left[0] = grown
        with pytest.raises(DoesNotFitError):
            ask(session, "What is a cache?")
        assert left[0] == 0
        assert all(layer.place is None for layer in session._cache.cache.layers)
        # What was read of the prompt stays, and so do its buffers.
        assert ask(session, "What is a cache?") == expected


def test_a_trial_without_memory_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: DecodeGraphs) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(DecodeGraphs, "_try", refused)
    before, device = threading.active_count(), CpuDevice()
    with pytest.raises(DoesNotFitError, match="not enough to load"):
        LoadedModel(resolve_model("moei-demo").folder, LoadOptions(), device, COSTS)
    assert threading.active_count() <= before and not device.registered


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no more"), RuntimeError("CUDA error: out of memory")]
)
def test_a_recording_without_memory_is_made_when_there_is_room(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never launched instead: what is computed where must not depend on memory."""
    rooms: list[int] = []
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions(), CpuDevice(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=30, temperature=0))
        expected = ask(session, "What is a cache?")
        session.clear()
        begin = OperationRecording.begin

        def failing(self: OperationRecording) -> None:
            if not rooms:
                raise error
            begin(self)

        monkeypatch.setattr(OperationRecording, "begin", failing)
        monkeypatch.setattr(type(loaded.runtime), "make_room", lambda self: rooms.append(1) or True)
        assert ask(session, "What is a cache?") == expected
        assert rooms == [1] and loaded.graphs is not None and loaded.graphs._pieces


def test_a_recording_that_fails_later_is_launched_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions(), CpuDevice(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=30, temperature=0))
        expected = ask(session, "What is a cache?")
        session.clear()
        monkeypatch.setattr(OperationRecording, "begin", refuse)
        assert ask(session, "What is a cache?") == expected
        assert loaded.graphs is not None and not loaded.graphs._pieces


def test_routers_applied_early_see_the_same_residual_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("moei-demo").folder
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.25),
        vram=vram_for(folder, 0.4, None),
        predictor="router",
        prefetch=PrefetchMode.ON,
        misses="copy",
    )
    found: list[list[tuple[ExpertKey, ...]]] = []
    early, was_recorded = [], EarlyRouters.recorded

    def asked(self: EarlyRouters, source: int, norm: bool) -> Any:
        chosen = was_recorded(self, source, norm)
        early.append(chosen is not None)
        return chosen

    monkeypatch.setattr(EarlyRouters, "recorded", asked)
    with LoadedModel(folder, options, CpuDevice(), COSTS) as loaded:
        hints = RouterHints.hints

        def noted(self: RouterHints, *given: Any) -> Any:
            result = hints(self, *given)
            found[-1].append(tuple(hint.key for hint in result))
            return result

        monkeypatch.setattr(RouterHints, "hints", noted)
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=30, temperature=0))
        for recorded in (True, False):
            if not recorded:
                monkeypatch.setattr(DecodeGraphs, "_record", lambda self, cache: self._forget())
            assert isinstance(loaded.runtime.hinter, RouterHints)
            loaded.runtime.hinter = RouterHints(loaded.runtime.hinter.routers)
            session.clear()
            found.append([])
            ask(session, "What is a cache?")
        recorded_asks = early[: len(early) // 2]
    assert found[0] == found[1] and sum(map(len, found[0])) > 100
    # All but the first token's, what is only asked for to compare, and the layers of a prompt.
    assert sum(recorded_asks) > 0.7 * len(recorded_asks), (sum(recorded_asks), len(recorded_asks))
    assert not any(early[len(early) // 2 :])


def test_what_a_piece_has_not_computed_yet_is_no_number() -> None:
    recording, given = OperationRecording(), torch.ones(3)
    recording.begin()
    doubled = given * 2
    kept = torch.empty(3)
    recording.end()
    repeat_second = _recorded(recording, lambda: kept.copy_(doubled + 1))
    assert doubled.isnan().all()
    repeat_second()
    assert kept.isnan().all()


def test_a_piece_sees_what_its_tensors_hold_when_it_is_done_again() -> None:
    recording, given, counter = OperationRecording(), torch.ones(3), torch.zeros(2)
    results: list[torch.Tensor] = []

    def work() -> None:
        counter[1:].add_(1)
        results.append((given * 2).view(3, 1).expand(3, 2).sum())

    repeat = _recorded(recording, work)
    before = counter.clone()
    for value in (1.0, 5.0):
        given.fill_(value)
        repeat()
        assert results[0] == 12 * value
    assert (counter - before).tolist() == [0, 2]


def _recorded(recording: OperationRecording, work: Callable[[], object]) -> Callable[[], None]:
    recording.begin()
    work()
    return recording.end()


def test_the_store_is_read_as_without_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording itself asks for no expert."""
    reads: list[ExpertKey] = []
    read = SafetensorsStore.read_extent

    def noted(self: SafetensorsStore, key: ExpertKey, *given: Any) -> None:
        reads.append(key)
        read(self, key, *given)

    monkeypatch.setattr(SafetensorsStore, "read_extent", noted)
    options = LoadOptions(experts=ExpertBudget(fraction=0.1))
    found = []
    for graphs in (True, False):
        with LoadedModel(resolve_model("moei-demo").folder, options, CpuDevice(), COSTS) as loaded:
            if not graphs:
                loaded.graphs = None
            session = ChatSession(loaded, GenerationSettings(max_new_tokens=30, temperature=0))
            reads.clear()
            ask(session, "What is a cache?")
            found.append(sorted(reads))
    assert found[0] == found[1]
