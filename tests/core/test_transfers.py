"""The transfer queue: demand before prefetch, nothing begun behind the engine's back, every fault by name."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from mmap import mmap
from pathlib import Path

import pytest

from moei_core.engine.loads import Load, Step
from moei_core.engine.transfers import TransferQueue
from moei_core.errors import ExpertReadError
from moei_core.store.base import PAGE, ExpertLayout, Extent, StoredTensor, chunks, lay_out
from moei_core.store.checksums import RunningChecksum, checksum
from moei_core.types import ExpertKey

NBYTES = 10 * PAGE
KEYS = [ExpertKey(0, expert) for expert in range(8)]


class ScriptedStore:
    """Experts whose bytes are their number; reads wait for ``gate`` and fail as ``fail`` says."""

    def __init__(self) -> None:
        self.layouts = {
            key: lay_out(
                [StoredTensor("down_proj", 0, Path("m"), PAGE * 100 * key.expert, NBYTES, "F16", (NBYTES,))]
            )
            for key in KEYS
        }
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[tuple[ExpertKey, int]] = []
        self.begun = threading.Semaphore(0)
        self.failures: dict[ExpertKey, int] = {}
        self.bad_sums: dict[ExpertKey, int] = {}
        self.closed = False

    def experts(self) -> Iterable[ExpertKey]:
        return self.layouts

    def layout(self, key: ExpertKey) -> ExpertLayout:
        return self.layouts[key]

    def read_extent(self, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        self.reads.append((key, extent.slot_offset))
        self.begun.release()
        self.gate.wait()
        if self.failures.get(key, 0) > 0:
            self.failures[key] -= 1
            raise ExpertReadError(f"Reading {key} failed.")
        slot[extent.slot_offset : extent.slot_offset + extent.nbytes] = (
            bytes([key.expert + 1]) * extent.nbytes
        )

    def complete(self, key: ExpertKey, slot: memoryview, running: RunningChecksum | None = None) -> None:
        extents = self.layouts[key].extents
        if running is not None:
            pieces = (slot[e.slot_offset : e.slot_offset + e.nbytes] for e in extents)
            assert running.hexdigest() == checksum(pieces)
        if self.bad_sums.get(key, 0) > 0:
            self.bad_sums[key] -= 1
            raise ExpertReadError(f"The bytes of {key} are not those read before.")

    def close(self) -> None:
        self.closed = True


class Bench:
    def __init__(self, readers: int = 2, chunk: int = 4 * PAGE, patience_s: float = 60.0) -> None:
        self.store = ScriptedStore()
        self.memory = memoryview(mmap(-1, 8 * NBYTES))
        self.queue = TransferQueue(
            self.store, self.view, readers=readers, chunk_nbytes=chunk, patience_s=patience_s
        )
        # What readers begin, in the order in which they are told to; they may come to the store in another one.
        self.order: list[ExpertKey] = []
        self.looked_in_vain = 0
        begin = self.queue._begin_chunk

        def noted() -> object:
            task = begin()
            if task is not None:
                self.order.append(task[0].key)
            else:
                self.looked_in_vain += 1
            return task

        self.queue._begin_chunk = noted  # type: ignore[method-assign, assignment]

    def view(self, slot: int) -> memoryview:
        return self.memory[slot * NBYTES : (slot + 1) * NBYTES]

    def wait_for_begun(self, count: int) -> None:
        for _ in range(count):
            assert self.store.begun.acquire(timeout=60)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.store.gate.set()
    bench.queue.close()
    assert bench.store.closed
    assert not any(thread.name.startswith("moei-reader") for thread in threading.enumerate())


def test_readers_are_woken_for_what_they_can_begin() -> None:
    """Others would take the interpreter's lock from whoever computes."""
    bench = Bench(readers=4, chunk=NBYTES)
    bench.wait_until(lambda: len(bench.queue._work._waiters) == 4)  # type: ignore[attr-defined]
    before = bench.looked_in_vain
    for number in range(40):
        key = KEYS[number % 4]
        bench.queue.demand(key, key.expert)
        bench.queue.next_ready()
    bench.queue.add_spare(5)
    bench.queue.prefetch([KEYS[5]])
    bench.wait_until(lambda: len(bench.order) == 41)
    bench.queue.close()
    # Who has read a chunk looks for another one, and may find that who was woken for it has come too late.
    assert bench.looked_in_vain - before < 1.5 * 41


def test_chunks_cover_an_expert_at_page_boundaries() -> None:
    rng = random.Random(1)
    for _ in range(200):
        tensors = [
            StoredTensor(
                "down_proj", i, Path(f"{i}"), rng.randrange(10**7), rng.randrange(1, 10**5), "F16", (1,)
            )
            for i in range(rng.randrange(1, 4))
        ]
        layout = lay_out(tensors)
        size = rng.choice((1, PAGE, 3 * PAGE, 10**6))
        pieces = chunks(layout, size)
        assert sum(piece.nbytes for piece in pieces) == sum(extent.nbytes for extent in layout.extents)
        covered = {(piece.file, piece.offset, piece.slot_offset) for piece in pieces}
        assert len(covered) == len(pieces)
        for piece in pieces:
            assert piece.nbytes <= max(size, PAGE) and piece.slot_offset % PAGE == piece.offset % PAGE
            home = next(extent for extent in layout.extents if extent.file == piece.file)
            assert piece.slot_offset - home.slot_offset == piece.offset - home.offset


def test_demand_loads_arrive_whole(bench: Bench) -> None:
    for slot, key in enumerate(KEYS[:4]):
        bench.queue.demand(key, slot)
    for _ in range(4):
        load = bench.queue.next_ready()
        assert load.failure is None and load.nbytes == NBYTES
        assert bytes(load.view) == bytes([load.key.expert + 1]) * NBYTES


def test_demand_overtakes_a_prefetch_at_the_next_chunk(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.queue.add_spare(0)
    bench.queue.prefetch([KEYS[0]])
    bench.wait_for_begun(2)
    bench.queue.demand(KEYS[1], 1)
    bench.store.gate.set()
    assert bench.queue.next_ready().key == KEYS[1]
    bench.wait_until(lambda: len(bench.store.reads) == 6)
    # The prefetch had two chunks on their way; the demanded expert's three come before its last one.
    assert bench.order == [KEYS[0]] * 2 + [KEYS[1]] * 3 + [KEYS[0]]


def test_a_prefetch_has_two_chunks_in_flight_and_needs_a_spare(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.queue.prefetch(KEYS[:2])
    time.sleep(0.02)
    assert not bench.store.reads
    bench.queue.add_spare(3)
    bench.wait_for_begun(2)
    time.sleep(0.02)
    assert len(bench.store.reads) == 2
    bench.store.gate.set()
    bench.wait_until(lambda: len(bench.store.reads) == 3)
    (started, first), (finished, second) = _until_finished(bench)
    assert (started, finished) == (Step.STARTED, Step.FINISHED) and first is second
    assert first.slot == 3 and bytes(first.view) == bytes([1]) * NBYTES


def _until_finished(bench: Bench) -> list[tuple[Step, Load]]:
    """The events up to the end of the one prefetch; asking earlier would end the wishes."""
    bench.wait_until(lambda: len(bench.queue._events) == 2)
    return bench.queue.take_events()


def test_nothing_begins_between_the_events_and_the_next_wishes(bench: Bench) -> None:
    bench.queue.prefetch([KEYS[0]])
    assert bench.queue.take_events() == []
    bench.queue.add_spare(0)
    time.sleep(0.02)
    assert bench.queue.take_events() == [] and not bench.store.reads


@pytest.mark.parametrize("finished", [False, True])
def test_a_prefetch_that_the_gate_wants_is_not_read_twice(bench: Bench, finished: bool) -> None:
    bench.queue.add_spare(5)
    if not finished:
        bench.store.gate.clear()
    bench.queue.prefetch([KEYS[2]])
    bench.wait_for_begun(3 if finished else 1)
    if finished:
        bench.wait_until(lambda: len(bench.queue._events) == 2)
    assert bench.queue._events[0][0] is Step.STARTED
    load = bench.queue.promote(KEYS[2])
    assert load is not None and load.slot == 5 and not load.borrowed
    bench.store.gate.set()
    load = bench.queue.next_ready()
    assert load.key == KEYS[2] and bytes(load.view) == bytes([3]) * NBYTES
    assert len(bench.store.reads) == 3
    assert not [step for step, _ in bench.queue.take_events() if step is Step.FINISHED]
    assert bench.queue.promote(KEYS[2]) is None


def test_a_cancelled_prefetch_frees_its_slot_only_when_nothing_writes_to_it(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.queue.add_spare(0)
    bench.queue.prefetch([KEYS[0]])
    bench.wait_for_begun(2)
    bench.queue.cancel(KEYS[0])
    bench.queue.prefetch([KEYS[1]])
    time.sleep(0.02)
    assert [key for key, _ in bench.store.reads] == [KEYS[0]] * 2
    bench.store.gate.set()
    bench.wait_until(lambda: len(bench.store.reads) == 5)
    assert [key for key, _ in bench.store.reads[2:]] == [KEYS[1]] * 3


def test_slots_of_prefetches_come_back_when_no_thread_writes_to_them(bench: Bench) -> None:
    bench.store.gate.clear()
    for slot in (0, 1):
        bench.queue.add_spare(slot)
    bench.queue.prefetch([KEYS[0]])
    bench.wait_for_begun(2)
    bench.queue.take_events()
    bench.queue.cancel(KEYS[0])
    bench.queue.end_prefetching()
    assert bench.queue.take_returned() == [0]
    # Prefetching goes on before that: the slot that is still being written is nobody's until then.
    bench.queue.add_spare(2)
    bench.store.gate.set()
    assert bench.queue.take_returned(wait=True) == [1]
    bench.queue.prefetch([KEYS[1]])
    (_, load) = _until_finished(bench)[-1]
    assert (load.key, load.slot) == (KEYS[1], 2)


def test_a_transient_failure_is_retried_once(bench: Bench) -> None:
    bench.store.failures[KEYS[0]] = 1
    bench.queue.demand(KEYS[0], 0)
    load = bench.queue.next_ready()
    assert load.failure is None and bytes(load.view) == bytes([1]) * NBYTES
    bench.store.bad_sums[KEYS[1]] = 1
    bench.queue.demand(KEYS[1], 1)
    assert bench.queue.next_ready().failure is None


@pytest.mark.parametrize("kind", ["failures", "bad_sums"])
def test_a_lasting_failure_is_handed_out_with_its_name(bench: Bench, kind: str) -> None:
    getattr(bench.store, kind)[KEYS[3]] = 100
    bench.queue.demand(KEYS[3], 0)
    bench.queue.demand(KEYS[4], 1)
    loads = {load.key: load for load in (bench.queue.next_ready(), bench.queue.next_ready())}
    assert "layer 0 expert 3" in str(loads[KEYS[3]].failure)
    assert loads[KEYS[4]].failure is None


def test_what_ends_a_check_is_handed_out_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(bench.store, "complete", no_memory)
    for key in KEYS[:3]:
        bench.queue.demand(key, key.expert)
    assert all(isinstance(bench.queue.next_ready().failure, MemoryError) for _ in KEYS[:3])
    assert all(thread.is_alive() for thread in bench.queue._threads)


def test_a_prefetch_that_fails_is_an_event(bench: Bench) -> None:
    bench.store.failures[KEYS[3]] = 100
    bench.queue.add_spare(0)
    bench.queue.prefetch([KEYS[3]])
    events = _until_finished(bench)
    assert [step for step, _ in events] == [Step.STARTED, Step.FAILED]
    bench.store.failures.clear()
    bench.queue.prefetch([KEYS[3]])
    assert [step for step, _ in _until_finished(bench)] == [Step.STARTED, Step.FINISHED]


def _fail_in_a_turn_that_fails(bench: Bench) -> None:
    """A prefetch of ``KEYS[3]``, whose reads fail from now on."""
    bench.store.failures[KEYS[3]] = 100
    bench.queue.add_spare(0)
    bench.queue.prefetch([KEYS[3]])
    bench.wait_until(lambda: len(bench.queue._events) == 2)
    assert bench.queue._events[1][0] is Step.FAILED
    bench.queue.abandon_demand()


def test_a_turn_that_failed_has_paid_for_its_prefetches(bench: Bench) -> None:
    """For one that failed before it ended and for one that fails behind it; not for one of the next turn."""
    _fail_in_a_turn_that_fails(bench)
    assert [load.excused for _, load in _until_finished(bench)] == [True, True]
    bench.store.gate.clear()
    bench.queue.prefetch([KEYS[3]])
    bench.wait_until(lambda: len(bench.queue._events) == 1)
    bench.queue.abandon_demand()
    bench.store.gate.set()
    assert [load.excused for _, load in _until_finished(bench)] == [True, True]
    bench.queue.prefetch([KEYS[3]])
    assert [(step, load.excused) for step, load in _until_finished(bench)][1] == (Step.FAILED, False)


def test_what_failed_in_a_turn_that_failed_is_read_anew(bench: Bench) -> None:
    _fail_in_a_turn_that_fails(bench)
    bench.store.failures.clear()
    assert bench.queue.promote(KEYS[3]) is None and bench.queue._spares == [0]
    bench.queue.demand(KEYS[3], 1)
    assert bench.queue.next_ready().failure is None


def test_abandoned_loads_give_their_slots_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moei_core.engine.transfers._CLOSING_S", 60.0)
    bench.store.gate.clear()
    for slot, key in enumerate(KEYS[:3]):
        bench.queue.demand(key, slot)
    bench.wait_for_begun(2)
    # While it waits, and not before.
    wait = bench.queue._news.wait

    def answered(timeout: float) -> bool:
        bench.store.gate.set()
        return wait(timeout)

    monkeypatch.setattr(bench.queue._news, "wait", answered)
    bench.queue.abandon_demand()
    assert sorted(bench.queue.take_returned()) == [0, 1, 2]
    assert {key for key, _ in bench.store.reads} == {KEYS[0]}
    bench.queue.demand(KEYS[5], 0)
    assert bench.queue.next_ready().key == KEYS[5]


def test_a_read_that_hangs_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moei_core.engine.transfers._CLOSING_S", 0.05)
    bench = Bench(readers=1, patience_s=0.1)
    bench.store.gate.clear()
    bench.queue.demand(KEYS[6], 0)
    with pytest.raises(ExpertReadError, match="layer 0 expert 6 hangs"):
        bench.queue.next_ready()
    bench.queue.abandon_demand()
    assert bench.queue.take_returned() == []
    started = time.monotonic()
    bench.queue.close()
    assert time.monotonic() - started < 5 and not bench.store.closed
    bench.store.gate.set()
    bench.wait_until(lambda: bench.queue.take_returned() == [0])
    # Whoever read last closes the files.
    bench.wait_until(lambda: bench.store.closed)


def test_what_is_streamed_uses_every_reader_and_waits_in_its_slot(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.queue.lend(4)
    bench.queue.lend(5)
    bench.queue.stream(KEYS[:3])
    bench.wait_for_begun(2)
    bench.queue.demand(KEYS[7], 0)
    bench.store.gate.set()
    assert bench.queue.next_ready().key == KEYS[7]
    bench.wait_until(lambda: not bench.queue._active)
    # The demanded expert overtakes at the next chunk; the third has no slot.
    assert bench.order == [KEYS[0]] * 2 + [KEYS[7]] * 3 + [KEYS[0]] + [KEYS[1]] * 3
    assert bench.queue.take_events() == []
    bench.queue.end_stream()
    load = bench.queue.promote(KEYS[0])
    assert load is not None and load.borrowed and load.slot == 5
    assert bench.queue.next_ready() is load
    assert bytes(load.view) == bytes([1]) * NBYTES
    assert bench.queue.cancel(KEYS[1]) == NBYTES
    assert bench.queue.cancel(KEYS[2]) == 0
    assert bench.queue.take_returned() == [4]


def test_a_streamed_expert_that_is_not_chosen_gives_its_slot_back_when_nothing_writes_to_it(
    bench: Bench,
) -> None:
    bench.store.gate.clear()
    bench.queue.lend(4)
    bench.queue.stream([KEYS[0]])
    bench.wait_for_begun(2)
    bench.queue.end_stream()
    assert bench.queue.cancel(KEYS[0]) == 8 * PAGE
    assert bench.queue.take_returned() == []
    threading.Timer(0.05, bench.store.gate.set).start()
    assert bench.queue.take_returned(wait=True) == [4]


def test_a_streamed_expert_that_fails_is_an_error_only_if_it_is_chosen(bench: Bench) -> None:
    bench.store.failures[KEYS[0]] = bench.store.failures[KEYS[1]] = 6
    for slot in (4, 5):
        bench.queue.lend(slot)
    bench.queue.stream(KEYS[:3])
    bench.wait_until(lambda: len(bench.queue._prefetches) == 2 and not bench.queue._active)
    bench.queue.end_stream()
    bench.queue.cancel(KEYS[0])
    load = bench.queue.promote(KEYS[1])
    assert load is not None and bench.queue.next_ready() is load
    assert isinstance(load.failure, ExpertReadError)


def test_any_order_of_calls_keeps_every_slot(bench: Bench) -> None:
    """10,000 random steps: no slot is lost, or handed out twice, and every expert that arrives is whole."""
    rng = random.Random(3)
    free = [4, 5, 6, 7]
    for slot in range(3):
        bench.queue.add_spare(slot)
    waiting: set[ExpertKey] = set()

    def settle() -> None:
        for step, load in bench.queue.take_events():
            if step is Step.FINISHED:
                assert bytes(load.view) == bytes([load.key.expert + 1]) * NBYTES
                bench.queue.add_spare(load.slot)

    def collect() -> None:
        load = bench.queue.next_ready()
        waiting.discard(load.key)
        assert bytes(load.view) == bytes([load.key.expert + 1]) * NBYTES
        free.append(load.slot)

    for _ in range(10_000):
        action, key = (
            rng.choice(("demand", "collect", "wish", "stream", "settle", "cancel", "abandon")),
            rng.choice(KEYS),
        )
        free += bench.queue.take_returned()
        if action == "demand" and free and key not in waiting:
            settle()
            waiting.add(key)
            load = bench.queue.promote(key)
            if load is None:
                bench.queue.demand(key, free.pop())
            elif not load.borrowed:
                bench.queue.add_spare(free.pop())
        elif action == "collect" and waiting:
            collect()
        elif action == "wish":
            bench.queue.end_stream()
            coming = {*waiting, *bench.queue._prefetches}
            bench.queue.prefetch([key for key in rng.sample(KEYS, 3) if key not in coming])
        elif action == "stream" and free:
            settle()
            bench.queue.end_stream()
            bench.queue.lend(free.pop())
            coming = {*waiting, *bench.queue._prefetches}
            bench.queue.stream([key for key in rng.sample(KEYS, 3) if key not in coming])
        elif action == "settle":
            settle()
        elif action == "cancel":
            bench.queue.cancel(key)
        elif action == "abandon" and rng.random() < 0.1:
            bench.queue.abandon_demand()
            waiting.clear()
        assert len(free) + len(waiting) <= 4
    while waiting:
        collect()
    bench.queue.end_stream()
    for key in KEYS:
        bench.queue.cancel(key)
    bench.wait_until(lambda: not bench.queue._active)
    settle()
    free += bench.queue.take_returned()
    assert sorted(free + bench.queue._spares) == [0, 1, 2, 4, 5, 6, 7]
