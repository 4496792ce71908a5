"""Where the time of a turn went: each second is put where it was spent, and prefetching is told as shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from moei_core.adapters.dense_clock import Timed
from moei_core.adapters.growing_layer import GrowingLayer
from moei_core.adapters.native_decode import NativeAttention
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.devices import CpuDevice, Device
from moei_core.engine.layer_work import LayerWork, TokenWork
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.measure import measure_requests
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.sampling import Sampler
from moei_core.engine.statistics import prefetch_shares, prefetch_verdict
from moei_core.engine.text_stream import TextStream
from moei_core.engine.transfers import TransferQueue
from moei_core.hub.resolve import resolve_model
from moei_core.prefetch import PrefetchMode
from moei_core.quant import native, native_layer
from moei_core.scheduler import ExpertScheduler, PrefetchStatistics
from moei_core.trace.format import read_trace
from moei_core.trace.time_spent import PARTS, time_spent
from tests.core.stepped import SteppedClock, SteppedDevice
from tests.core.test_tiers import COSTS, DEVICES, vram_for

NAP_S = 0.25
"""A power of two, so that sums of it are exact."""
PLACES: list[tuple[str, Any, str]] = [
    ("decisions", ExpertScheduler, "decide"),
    ("decisions", ExpertScheduler, "look_ahead"),
    ("decisions", ExpertScheduler, "forward_pass"),
    ("decisions", ExpertScheduler, "pass_end"),
    ("decisions", ExpertScheduler, "request_start"),
    ("decisions", ExpertScheduler, "request_end"),
    ("experts", LayerWork, "compute"),
    ("moving", ExpertRuntime, "_ask"),
    ("moving", ExpertRuntime, "_forget"),
    ("combining", LayerWork, "total"),
    ("combining", ExpertRuntime, "_gather"),
    ("sampling", Sampler, "next_token"),
    ("disk", TransferQueue, "next_ready"),
    ("dense", nn.functional, "embedding"),
    ("dense", nn.functional, "scaled_dot_product_attention"),
    ("framework", MixtralModel, "forward"),
    ("framework", GrowingLayer, "update"),
    ("unexplained", TextStream, "feed"),
]
NATIVE_PLACES: list[tuple[str, Any, str]] = [
    ("dense", native_layer.Layer, "route"),
    ("dense", native.RmsNorm, "__call__"),
    ("framework", NativeAttention, "prepare"),
    ("experts", TokenWork, "compute"),
]
ON_CPU = {*PARTS} - {"link", "gpu"}


def _named(place: tuple[str, Any, str]) -> str:
    return f"{place[0]}-{getattr(place[1], '__name__', place[1])}.{place[2]}"


@pytest.fixture(scope="module")
def mixtral(chat_folder: Callable[..., Path]) -> Iterator[LoadedModel]:
    options = LoadOptions(experts=ExpertBudget(fraction=0.3), context=512)
    with LoadedModel(chat_folder("mixtral"), options) as model:
        yield model


def reply(model: LoadedModel, tokens: int = 5) -> dict[str, float]:
    """The time split of a turn."""
    session = ChatSession(model, GenerationSettings(max_new_tokens=tokens, temperature=0))
    list(session.reply("hello again, and more"))
    assert session.report is not None
    return session.report.time_split


def only(split: dict[str, float], **expected: float) -> None:
    """The parts have these seconds, and all others none."""
    assert {name: seconds for name, seconds in split.items() if abs(seconds) > 1e-9} == pytest.approx(
        expected
    )


@pytest.mark.parametrize("place", PLACES, ids=_named)
def test_what_takes_longer_shows_in_its_own_part(
    place: tuple[str, Any, str], mixtral: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still otherwise: all of it, and nothing anywhere else."""
    part, owner, name = place
    calls = SteppedClock(monkeypatch).slow(owner, name, NAP_S)
    split = reply(mixtral)
    assert calls[0] > 0 and set(split) == ON_CPU
    only(split, **{part: calls[0] * NAP_S})


def test_nothing_in_a_layer_of_experts_is_dense(
    mixtral: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever modules and functions experts use."""
    calls = SteppedClock(monkeypatch).slow(LayerWork, "compute", NAP_S)
    timed = Timed(LayerWork.compute)
    monkeypatch.setattr(LayerWork, "compute", lambda *arguments: timed(*arguments))
    split = reply(mixtral)
    assert calls[0] > 0
    only(split, experts=calls[0] * NAP_S)


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
@pytest.mark.parametrize("place", NATIVE_PLACES, ids=_named)
def test_native_calls_have_their_parts(
    place: tuple[str, Any, str], mixtral: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_what_takes_longer_shows_in_its_own_part(place, mixtral, monkeypatch)


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
@pytest.mark.parametrize(
    "owner", [native.Attention, native.Linear, native_layer.Router], ids=lambda owner: owner.__name__
)
def test_native_attention_heads_and_routers_are_dense(
    owner: Any, chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model whose layers somebody watches, so that their modules run one by one."""
    monkeypatch.setattr("moei_core.adapters.dense_linear.WORTH_SHARING", 1)
    with LoadedModel(chat_folder("mixtral"), LoadOptions(context=512)) as model:
        for module in model.adapter.model.modules():
            if isinstance(module.forward, NativeAttention):
                module.register_forward_hook(lambda *_: None)
        calls = SteppedClock(monkeypatch).slow(owner, "__call__", NAP_S)
        split = reply(model)
    assert calls[0] > 0
    only(split, dense=calls[0] * NAP_S)


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_of_a_whole_layer_in_one_call_the_experts_are_told_apart(
    chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    run = native_layer.Layer.run

    def slowly(self: native_layer.Layer, *arguments: Any) -> int:
        calls[0] += 1
        run(self, *arguments)
        clock.nap(NAP_S)
        return round(NAP_S / 4 * 1e9)

    with LoadedModel(chat_folder("mixtral"), LoadOptions(context=512)) as model:
        # Every expert comes in by prompts, so that layers are one call.
        session = ChatSession(model, GenerationSettings(max_new_tokens=2, temperature=0))
        for letter in "xyz":
            session.clear()
            list(session.reply(letter * 99))
        assert model.scheduler.resident_count == model.spec.total_experts
        clock = SteppedClock(monkeypatch)
        monkeypatch.setattr(native_layer.Layer, "run", slowly)
        split = reply(model)
    assert calls[0] == 3 * 4
    only(split, dense=calls[0] * NAP_S * 3 / 4, experts=calls[0] * NAP_S / 4)


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_shared_experts_are_dense(chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with LoadedModel(chat_folder("deepseek_v2"), LoadOptions(experts=ExpertBudget(fraction=0.5))) as model:
        clock = SteppedClock(monkeypatch)
        token, calls = native.ExpertFfn.token, [0, 0]

        def slowly(self: native.ExpertFfn, experts: list[Any], *rest: Any) -> None:
            # Routed experts come several at once.
            calls[len(experts) > 1] += 1
            clock.nap(NAP_S)
            token(self, experts, *rest)

        monkeypatch.setattr(native.ExpertFfn, "token", slowly)
        split = reply(model)
    assert min(calls) > 0
    only(split, dense=calls[0] * NAP_S, experts=calls[1] * NAP_S)


def test_hints_are_decisions(chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.4), predictor="router", prefetch=PrefetchMode.ON, context=512
    )
    with LoadedModel(chat_folder("mixtral"), options) as model:
        assert model.runtime.hinter is not None
        calls = SteppedClock(monkeypatch).slow(type(model.runtime.hinter), "hints", NAP_S)
        split = reply(model)
    assert calls[0] > 0
    only(split, decisions=calls[0] * NAP_S)


@pytest.fixture
def on_device(chat_folder: Callable[..., Path]) -> Iterator[tuple[LoadedModel, SteppedDevice]]:
    folder, device = chat_folder("mixtral"), SteppedDevice()
    options = LoadOptions(
        experts=ExpertBudget(fraction=1.0), vram=vram_for(folder, 0.3, None), misses="copy", context=512
    )
    with LoadedModel(folder, options, device, COSTS) as model:
        yield model, device


@pytest.mark.parametrize("which", ["link", "gpu"])
def test_waiting_for_copies_and_for_computing_is_told_apart(
    which: str, on_device: tuple[LoadedModel, SteppedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = on_device
    device.clock = SteppedClock(monkeypatch)
    device.copy_s, device.compute_s = (NAP_S, 0.0) if which == "link" else (0.0, NAP_S)
    device.copied = device.computed = 0
    split = reply(model)
    assert device.copied > 10 and device.computed > 10
    # A part that took no time at all of a still clock is no part.
    only(split, **{which: (device.copied if which == "link" else device.computed) * NAP_S})


@pytest.mark.parametrize(
    ("part", "owner", "name"),
    [
        ("link", SteppedDevice, "copy_in"),
        ("gpu", SteppedDevice, "read_back"),
        ("experts", SteppedDevice, "compute_after"),
        ("disk", TransferQueue, "next_ready"),
        ("dense", nn.functional, "embedding"),
        ("framework", MixtralModel, "forward"),
        ("decisions", ExpertScheduler, "decide"),
    ],
)
def test_parts_with_a_device(
    part: str,
    owner: Any,
    name: str,
    on_device: tuple[LoadedModel, SteppedDevice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = on_device
    calls = SteppedClock(monkeypatch).slow(owner, name, NAP_S)
    split = reply(model)
    assert calls[0] > 0
    if part == "gpu":
        # In each of five passes once a layer, and for the logits.
        assert calls[0] == 5 * (3 + 1)
    only(split, **{part: calls[0] * NAP_S})


@pytest.mark.parametrize("name", ["moei-demo", "mixtral"])
@pytest.mark.parametrize("make_device", [pytest.param(None, id="none"), *DEVICES])
def test_the_parts_are_the_whole_turn(
    name: str, make_device: Callable[[], Device] | None, chat_folder: Callable[..., Path]
) -> None:
    folder = resolve_model(name).folder if name == "moei-demo" else chat_folder(name)
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.3),
        vram=vram_for(folder, 0.3, None) if make_device else None,
        context=512,
    )
    device = make_device() if make_device else None
    with LoadedModel(folder, options, device, COSTS) as model:
        session = ChatSession(model, GenerationSettings(max_new_tokens=24, temperature=0))
        unexplained = []
        for _ in range(4):
            started = time.perf_counter()
            list(session.reply("What does moei do?"))
            wall = time.perf_counter() - started
            report = session.report
            assert report is not None
            split = report.time_split
            assert set(split) == ({*PARTS} if device else ON_CPU)
            assert report.total_s <= wall and sum(split.values()) == pytest.approx(report.total_s)
            unexplained.append(split["unexplained"] / wall)
            # The framework is what is left: below zero if anything were counted twice.
            assert all(seconds >= -1e-9 for seconds in split.values()), split
            assert min(split["framework"], split["experts"]) > 0
            # A GPU computes the dense part behind the engine's back.
            assert (split["dense"] > 0) == (device is None or isinstance(device, CpuDevice))
        # Of some turns: a busy machine may take the processor away anywhere.
        assert min(unexplained) < 0.05


def test_a_reader_who_leaves_has_not_cost_the_turn_anything(
    mixtral: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SteppedClock(monkeypatch)
    session = ChatSession(mixtral, GenerationSettings(max_new_tokens=24, temperature=0))
    pieces = session.reply("hello")
    next(pieces)
    clock.nap(5.0)
    pieces.close()  # type: ignore[attr-defined]
    assert session.report is not None
    only(session.report.time_split)


def test_a_trace_keeps_the_split_of_every_turn(
    mixtral: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SteppedClock(monkeypatch)
    clock.slow(Sampler, "next_token", NAP_S)
    clock.slow(ExpertScheduler, "decide", NAP_S / 2)
    writer = mixtral.record(tmp_path / "t.safetensors", "mixtral")
    try:
        writer.begin_sequence()
        splits = []
        for _ in range(3):
            writer.begin_request()
            splits.append(reply(mixtral))
    finally:
        mixtral.runtime.recorder = None
    assert splits[0]["sampling"] == 5 * NAP_S and splits[0]["decisions"] > 0
    assert writer.close()
    found = time_spent(read_trace(tmp_path / "t.safetensors"))
    assert found == [{name: pytest.approx(s, abs=1e-9) for name, s in split.items()} for split in splits]
    assert list(found[0]) == [part for part in PARTS if part in found[0]]


def test_shares_of_prefetching() -> None:
    done = PrefetchStatistics(started=20, useful=6, late=2, wasted=5, cancelled=4)
    # 6 hits came by prefetching, and of 10 misses 2 were on their way: 8 of 16.
    assert prefetch_shares(done, misses=10) == {"coverage": 0.5, "waste": 0.45, "lateness": 0.25}
    assert prefetch_shares(PrefetchStatistics(), 0) == {"coverage": 0.0, "waste": 0.0, "lateness": 0.0}


def test_the_verdict_in_words() -> None:
    def said(mode: PrefetchMode, trials: int = 0, kept: int | None = None, by: str | None = None) -> str:
        controller = SimpleNamespace(mode=mode, trials=trials, kept=kept)
        return prefetch_verdict(SimpleNamespace(controller=controller, prefetching_by=by))  # type: ignore[arg-type]

    assert said(PrefetchMode.OFF) == "off"
    assert said(PrefetchMode.ON) == "on, as asked"
    assert said(PrefetchMode.AUTO) == "off: no trial has ended yet"
    assert said(PrefetchMode.AUTO, 3) == "off: not faster in 3 trials"
    assert said(PrefetchMode.AUTO, 3, 0, "Markov") == "on by Markov, which was faster; 3 trials"


def test_every_report_has_them(chat_folder: Callable[..., Path]) -> None:
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.4), predictor="markov", prefetch=PrefetchMode.ON, context=512
    )
    with LoadedModel(chat_folder("qwen3_moe"), options) as model:
        session = ChatSession(model, GenerationSettings(max_new_tokens=24, temperature=0))
        list(session.reply("a question that needs experts"))
        assert session.report is not None
        told = session.report.as_dict()["prefetch"]
        assert told["started"] >= told["useful"] + told["late"] + told["wasted"] + told["cancelled"] > 0
        assert told["verdict"] == "on, as asked"
        assert told["waste"] == round((told["wasted"] + told["cancelled"]) / told["started"], 4) > 0
        assert 0 < told["coverage"] < 1
        (cold,) = measure_requests(model, 8, 16, 1)["changing"]
        assert 0 < cold.prefetch_coverage < 1 and 0 < cold.prefetch_waste <= 1
