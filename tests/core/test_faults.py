"""Everything that a disk can do to a turn: it fails, stops short, hangs, gives other bytes; once, or for good.

The faults are injected below all of our code, in the call that reads a file.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine import loaded_model, runtime, transfers
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.device_slots import LinkedSlotPool
from moei_core.engine.devices import CpuDevice
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.tiered_runtime import TieredRuntime
from moei_core.engine.transfers import TransferQueue
from moei_core.errors import DoesNotFitError, ExpertReadError, InterruptedTurnError
from moei_core.prefetch import PrefetchMode
from moei_core.store.base import PAGE, read_expert
from moei_core.tiers import LinkCosts
from moei_core.types import FetchPlan, LayerAccess
from tests.packed import pack_folder

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0)
LASTING = 1 << 30
PATIENCE_S = 0.3


class Disk:
    """Reads of the queue's threads: ``after`` of them are well, then ``left`` are not, as ``kind`` says."""

    def __init__(self) -> None:
        self.kind, self.after, self.left, self.spoilt = "", 0, 0, 0
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.hung: Callable[[], None] = lambda: None
        self.queues: list[TransferQueue] = []
        self.read = os.preadv

    def fault(self, kind: str, after: int, left: int) -> None:
        self.gate.clear()
        # Nobody is impatient but with what never ends: a busy machine may be slow.
        self.be_patient(PATIENCE_S if kind == "hangs" else transfers.PATIENCE_S)
        self.kind, self.after, self.left, self.spoilt = kind, after, left, 0

    def heal(self) -> None:
        self.left = 0
        self.gate.set()
        self.be_patient(transfers.PATIENCE_S)

    def be_patient(self, seconds: float) -> None:
        for queue in self.queues:
            queue._patience_s = seconds

    def make_queue(self, *arguments: Any, **named: Any) -> TransferQueue:
        self.queues.append(TransferQueue(*arguments, **named))
        return self.queues[-1]

    def preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if not threading.current_thread().name.startswith("moei-reader"):
            return self.read(descriptor, buffers, offset)
        with self.lock:
            self.after -= 1
            bad = self.after < 0 and self.left > 0
            self.left -= bad
            self.spoilt += bad
        if not bad:
            return self.read(descriptor, buffers, offset)
        if self.kind == "fails":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.kind == "ends too early":
            return 0
        if self.kind == "is late":
            time.sleep(PATIENCE_S / 3)
        if self.kind == "hangs":
            self.hung()
            self.gate.wait()
        if self.kind == "takes two calls":
            return self.read(descriptor, [buffers[0][:PAGE]], offset)
        count = self.read(descriptor, buffers, offset)
        if self.kind == "gives other bytes":
            # In the middle, where the expert's own bytes are for certain.
            buffers[0][count // 2] ^= 1
        return count


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moei-reader")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    until = time.monotonic() + 60
    while readers():
        assert time.monotonic() < until, "a model was closed and its threads still run"
        time.sleep(0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(os, "preadv", disk.preadv)
    monkeypatch.setattr(runtime, "TransferQueue", disk.make_queue)
    monkeypatch.setattr(transfers, "_CLOSING_S", 0.2)
    yield disk
    disk.heal()


@pytest.fixture(params=["in place", "packed"])
def folder(request: pytest.FixtureRequest, chat_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose checksums are known, as they are once every expert has been read."""
    folder = chat_folder("qwen3_moe")
    if request.param == "packed":
        pack_folder(folder, tmp_path / "store", "Q8_0")
        return tmp_path / "store"
    store = TransformersAdapter(folder).open_store()
    for key in store.experts():
        read_expert(store, key, memoryview(mmap(-1, store.layout(key).slot_nbytes)))
    store.close()
    return folder


def ask(session: ChatSession, text: str) -> str:
    return "".join(piece.text for piece in session.reply(text))


def options(predictor: str | None = None, share: float = 0.4) -> LoadOptions:
    return LoadOptions(
        experts=ExpertBudget(fraction=share), predictor=predictor, prefetch=PrefetchMode.ON, context=512
    )


def untouched(folder: Path) -> list[str]:
    """What a machine without faults answers."""
    with LoadedModel(folder, options()) as model:
        session = ChatSession(model, GREEDY)
        return [ask(session, "one"), ask(session, "three, at last")]


def nothing_is_lost(model: LoadedModel) -> None:
    """Cache and slots agree, and every slot is free, held, or with the queue."""
    engine = model.runtime
    assert set(model.scheduler.residents()) == set(engine._held) == set(engine._slots)
    until = time.monotonic() + 60
    while True:
        engine._take_returned()
        queue = engine._transfers
        with queue._lock:
            busy = {load.slot for load in queue._active} | {load.slot for load in queue._prefetches.values()}
            others = busy | {*queue._spares}
        if engine._pool.free + len(engine._slots) + len(others) == engine._pool.count:
            return
        assert time.monotonic() < until, "a slot is lost"
        time.sleep(0.01)


def our_threads() -> list[str]:
    """Those that run, but for the one that watches over tqdm's progress bars from the first bar on."""
    return sorted(one.name for one in threading.enumerate() if type(one).__name__ != "TMonitor")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("predictor", [None, "noise"])
@pytest.mark.parametrize("after", [0, 25])
@pytest.mark.parametrize("kind", ["fails", "ends too early", "gives other bytes", "hangs"])
def test_a_fault_that_lasts_costs_the_turn_and_nothing_else(
    disk: Disk, folder: Path, kind: str, after: int, predictor: str | None
) -> None:
    first, last = untouched(folder)
    with LoadedModel(folder, options(predictor)) as model:
        session = ChatSession(model, GREEDY)
        assert ask(session, "one") == first
        before = list(session.messages)
        disk.fault(kind, after, LASTING)
        with pytest.raises(ExpertReadError, match=r"layer \d+ expert \d+") as caught:
            ask(session, "two, which needs many experts that are not here: !?xyz 0123456789")
        assert disk.spoilt >= (1 if kind == "hangs" else 2), "everything is tried twice"
        assert 1 <= len(caught.value.lines()) <= 3
        assert session.messages == before
        disk.heal()
        nothing_is_lost(model)
        assert ask(session, "three, at last") == last
        nothing_is_lost(model)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("predictor", [None, "noise"])
@pytest.mark.parametrize(
    "kind", ["fails", "ends too early", "gives other bytes", "is late", "takes two calls"]
)
def test_a_fault_that_passes_is_not_noticed(
    disk: Disk, folder: Path, kind: str, predictor: str | None
) -> None:
    first, last = untouched(folder)
    with LoadedModel(folder, options(predictor)) as model:
        session = ChatSession(model, GREEDY)
        disk.fault(kind, 5, LASTING if kind in ("takes two calls", "is late") else 1)
        if kind == "is late":
            disk.left = 3
        assert [ask(session, "one"), ask(session, "three, at last")] == [first, last]
        assert disk.spoilt > 0
        nothing_is_lost(model)


@pytest.mark.parametrize("kind", ["fails", "gives other bytes", "hangs"])
def test_with_a_device_in_front_it_is_the_same(
    disk: Disk, chat_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    pack_folder(chat_folder("qwen3_moe"), tmp_path / "store", "Q8_0")
    costs = LinkCosts(20e9, 1e-6, 40e9)
    with LoadedModel(tmp_path / "store", options(), CpuDevice(), costs) as model:
        session = ChatSession(model, GREEDY)
        expected = ask(session, "one")
        assert model.device_budget is not None
    with LoadedModel(tmp_path / "store", options(), CpuDevice(), costs) as model:
        session = ChatSession(model, GREEDY)
        disk.fault(kind, 9, LASTING)
        with pytest.raises(ExpertReadError, match=r"layer \d+ expert \d+"):
            ask(session, "one")
        disk.heal()
        assert session.messages == []
        assert ask(session, "one") == expected


def test_ctrl_c_in_the_middle_of_a_read_leaves_the_conversation_as_it_was(
    disk: Disk, chat_folder: Callable[..., Path]
) -> None:
    """A second Ctrl-C raises wherever the program is: here it waits for a disk that does not answer."""
    folder = chat_folder("qwen3_moe")
    first, last = untouched(folder)
    with LoadedModel(folder, options()) as model:
        session = ChatSession(model, GREEDY)
        assert ask(session, "one") == first
        before = list(session.messages)
        disk.fault("hangs", 3, LASTING)
        disk.be_patient(transfers.PATIENCE_S)
        sent: list[int] = []

        def interrupt() -> None:
            if not sent:
                sent.append(signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        disk.hung = interrupt
        with pytest.raises(KeyboardInterrupt):
            ask(session, "two, which needs many experts that are not here: !?xyz 0123456789")
        assert session.messages == before
        disk.heal()
        nothing_is_lost(model)
        assert ask(session, "three, at last") == last


def test_what_is_pressed_while_a_prompt_becomes_tokens_counts(folder: Path) -> None:
    """Of a long text that takes a second."""
    with LoadedModel(folder, options()) as model:
        session = ChatSession(model, GREEDY)
        ask(session, "one")
        make, before = session._prompt, list(session.messages)

        def pressed(messages: list[dict[str, str]]) -> list[int]:
            session.stop()
            return make(messages)

        session._prompt = pressed  # type: ignore[method-assign]
        with pytest.raises(InterruptedTurnError):
            ask(session, "two")
        assert session.messages == before
        session._prompt = make  # type: ignore[method-assign]
        assert ask(session, "two")


def test_an_interrupt_while_the_brain_decides_leaves_it_right(folder: Path) -> None:
    """For those who catch it and go on, as in a notebook."""
    with LoadedModel(folder, options()) as model:
        session, decide, calls = ChatSession(model, GREEDY), model.scheduler.decide, 0

        def interrupted(access: LayerAccess, routed: LayerAccess | None = None) -> FetchPlan:
            nonlocal calls
            plan = decide(access, routed)
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return plan

        model.scheduler.decide = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            ask(session, "hello")
        nothing_is_lost(model)
        assert ask(session, "one") == untouched(folder)[0]


def test_every_prefetch_is_accounted_for_after_turns_that_failed(folder: Path, disk: Disk) -> None:
    with LoadedModel(folder, options("router")) as model:
        failed = 0
        for number in range(12):
            session = ChatSession(model, GREEDY)
            reply = session.reply(f"two {number}")
            next(reply, None)
            disk.fault("fails", 0, LASTING)
            try:
                for _ in reply:
                    pass
            except ExpertReadError:
                failed += 1
            disk.heal()
            nothing_is_lost(model)
            brain, count = model.scheduler, model.scheduler.prefetch_statistics
            settled = count.useful + count.late + count.wasted + count.cancelled
            assert count.started == settled + len(brain._waiting) + len(brain._in_flight)
        assert failed


def open_files(folder: Path) -> list[str]:
    return [one.path for one in psutil.Process().open_files() if one.path.startswith(str(folder))]


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_closing_in_the_middle_of_a_reply_leaves_no_thread_no_file_and_no_slot(
    folder: Path, share: float
) -> None:
    """Also with prefetches on their way."""
    threads = our_threads()
    model = LoadedModel(folder, options("noise", share))
    session = ChatSession(model, GREEDY)
    reply = session.reply("one")
    for _ in range(3):
        next(reply)
    slots = weakref.ref(model.runtime._pool)
    assert readers() and open_files(folder)
    reply.close()
    model.close()
    assert not readers() and not open_files(folder)
    del model, session, reply
    gc.collect()
    assert slots() is None, "something still holds the memory of the slots"
    assert our_threads() == threads


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("predictor", [None, "mixed"])
def test_the_last_reference_takes_all_weights_with_it(
    family: str, predictor: str | None, chat_folder: Callable[..., Path]
) -> None:
    """At once: the garbage collector may come by when another model has begun to run."""
    model = LoadedModel(chat_folder(family), options(predictor, 0.4))
    list(ChatSession(model, GREEDY).reply("one"))
    weights = [weakref.ref(tensor) for tensor in model.adapter.model.parameters()]
    slots = weakref.ref(model.runtime._pool)
    assert len(weights) > 10
    gc.collect()
    gc.disable()
    try:
        model.close()
        del model
        assert slots() is None
        assert not [one for one in weights if one() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["measure_costs", "warm_up"])
def test_a_device_that_fails_at_the_end_of_loading_leaves_nothing(
    where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> object:
        for pool in given:
            if isinstance(pool, LinkedSlotPool):
                pool.take()
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "warm_up":
        monkeypatch.setattr(TieredRuntime, "_compute_there", refuse)
    else:
        monkeypatch.setattr(loaded_model, "measure_costs", refuse)
    threads, device = our_threads(), CpuDevice()
    costs = LinkCosts(20e9, 1e-6, 40e9) if where == "warm_up" else None
    with pytest.raises(DoesNotFitError, match="not enough to load"):
        LoadedModel(folder, options(), device, costs)
    assert our_threads() == threads and not open_files(folder) and not device.registered


def test_what_cannot_be_loaded_leaves_no_thread_and_no_file(folder: Path) -> None:
    threads = our_threads()
    for vram in (None, 1 << 20):
        # Too few slots for one token, and a device that is too small: found out when files and queues are open.
        with pytest.raises(DoesNotFitError):
            LoadedModel(
                folder, LoadOptions(experts=ExpertBudget(fraction=0.01), vram=vram), CpuDevice(1 << 20)
            )
        assert our_threads() == threads and not open_files(folder)
    with LoadedModel(folder, options(), CpuDevice(1 << 20)) as model:
        assert model.device_budget is None
        assert our_threads() == sorted(threads + [one.name for one in readers()]), (
            "the queues of a device that is not used"
        )
