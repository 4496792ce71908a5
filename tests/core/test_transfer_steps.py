"""The transfer queue one step at a time: no reader threads, and a clock that moves when the test says so."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from mmap import mmap
from pathlib import Path

import pytest

from moei_core.engine import transfers
from moei_core.engine.loads import Load, Step
from moei_core.engine.transfers import TransferQueue
from moei_core.errors import ExpertReadError
from moei_core.store.base import PAGE, Extent, StoredTensor, lay_out
from moei_core.types import ExpertKey
from tests.core.test_transfers import KEYS, NBYTES, ScriptedStore

CHUNK = 4 * PAGE
"""Three of them are an expert."""
A, B, C, D = KEYS[:4]


class Stepped:
    """A queue without threads. ``begin`` and ``finish`` are what a reader does at the two ends of a read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: int = 8, patience_s: float = 60.0) -> None:
        self.now, self.store = 1000.0, ScriptedStore()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        memory = memoryview(mmap(-1, slots * NBYTES))
        self.queue = TransferQueue(
            self.store,
            lambda slot: memory[slot * NBYTES : (slot + 1) * NBYTES],
            readers=0,
            chunk_nbytes=CHUNK,
            patience_s=patience_s,
        )
        self.reading: list[tuple[Load, Extent]] = []
        # What happens while the engine waits, one after the other; each returns how long it took.
        self.meanwhile: Iterator[float] = iter(())
        monkeypatch.setattr(self.queue, "_news", self)

    def begin(self) -> tuple[ExpertKey, int] | None:
        """A free reader looks for work: (expert, number of its chunk), or None."""
        with self.queue._lock:
            task = self.queue._begin_chunk()
        if task is None:
            return None
        self.reading.append(task)
        return task[0].key, task[1].slot_offset // CHUNK

    def finish(self, at: int = 0) -> None:
        """The bytes of a read that has begun are there."""
        self.queue._read(*self.reading.pop(at))

    def begin_all(self) -> list[tuple[ExpertKey, int]]:
        found = []
        while (one := self.begin()) is not None:
            found.append(one)
            self.finish()
        return found

    def wait(self, timeout: float) -> None:
        """In place of waiting for news, with the queue's lock held."""
        assert timeout > 0
        self.queue._lock.release()
        try:
            took = next(self.meanwhile, None)
        finally:
            self.queue._lock.acquire()
        self.now += timeout if took is None else took

    def notify_all(self) -> None:
        """Nobody waits."""


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> Stepped:
    return Stepped(monkeypatch)


def test_a_queue_without_readers_has_no_thread(stepped: Stepped) -> None:
    assert not any(thread.name.startswith("moei-reader") for thread in threading.enumerate())
    stepped.queue.close()
    assert stepped.store.closed


def test_demand_overtakes_a_prefetch_at_each_chunk(stepped: Stepped) -> None:
    queue = stepped.queue
    queue.add_spare(0)
    queue.prefetch([A])
    assert [stepped.begin() for _ in range(3)] == [(A, 0), (A, 1), None], "two chunks in flight"
    queue.demand(B, 1)
    assert [stepped.begin() for _ in range(2)] == [(B, 0), (B, 1)]
    stepped.finish()
    assert stepped.begin() == (B, 2), "the prefetch may go on, but demand is first"
    assert stepped.begin() is None, "and nothing else while two or more are read"
    stepped.finish()
    stepped.finish()
    assert stepped.begin() is None
    stepped.finish()
    assert stepped.begin() == (A, 2), "beside the end of a demand"
    queue.demand(C, 2)
    assert stepped.begin() == (C, 0)
    stepped.finish()
    assert queue.has_ready and queue.next_ready().key == B
    assert stepped.begin_all() == [(C, 1), (C, 2)]
    assert [step for step, _ in queue.take_events()] == [Step.STARTED, Step.FINISHED]


def test_without_preemption_a_prefetch_that_has_begun_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stepped = Stepped(monkeypatch)
    stepped.queue._preempt = False
    stepped.queue.add_spare(0)
    stepped.queue.prefetch([A])
    assert stepped.begin() == (A, 0)
    stepped.queue.demand(B, 1)
    stepped.finish()
    assert stepped.begin_all() == [(A, 1), (A, 2), (B, 0), (B, 1), (B, 2)]


def test_a_prefetch_that_is_demanded_goes_on_where_it_was_before_other_demands(stepped: Stepped) -> None:
    queue = stepped.queue
    queue.add_spare(5)
    queue.prefetch([A])
    stepped.begin()
    queue.demand(B, 1)
    load = queue.promote(A)
    assert load is not None and load.slot == 5
    assert [stepped.begin() for _ in range(3)] == [(A, 1), (A, 2), (B, 0)]
    assert [step for step, _ in queue.take_events()] == [Step.STARTED]
    assert queue.promote(A) is None


def test_no_prefetch_begins_for_a_turn_that_has_failed(stepped: Stepped) -> None:
    """It could fail as well, and the next turn would pay."""
    queue = stepped.queue
    queue.add_spare(0)
    queue.add_spare(1)
    queue.prefetch([A, B])
    assert stepped.begin() == (A, 0)
    queue.abandon_demand()
    stepped.finish()
    assert stepped.begin_all() == [(A, 1), (A, 2)]
    assert [(step, load.excused) for step, load in queue.take_events()] == [
        (Step.STARTED, True),
        (Step.FINISHED, True),
    ]


def test_a_cancelled_prefetch_frees_its_slot_at_once_unless_a_reader_writes_to_it(stepped: Stepped) -> None:
    queue = stepped.queue
    queue.add_spare(3)
    queue.prefetch([A, B])
    assert stepped.begin() == (A, 0)
    stepped.finish()
    assert queue.cancel(A) == CHUNK and queue._spares == [3]
    assert stepped.begin() == (B, 0), "the same slot, in the next moment"
    assert queue.cancel(B) == CHUNK and queue._spares == []
    queue.prefetch([C])
    assert stepped.begin() is None
    stepped.finish()
    assert queue._spares == [3] and stepped.begin() == (C, 0)
    stepped.finish()
    assert stepped.begin_all() == [(C, 1), (C, 2)]
    ((_, started), (step, load)) = queue.take_events()[-2:]
    assert step is Step.FINISHED and load is started and load.slot == 3
    assert bytes(load.view) == bytes([C.expert + 1]) * NBYTES


def test_neighbours_in_a_file_are_read_as_one(stepped: Stepped) -> None:
    """Each byte once, in the order of the file, in pieces that know nothing of the tensors' borders."""
    there = Path("m"), Path("other")
    sizes, at = (3 * PAGE + 100, 5 * PAGE, 700), 12 * PAGE + 424
    tensors = []
    for number, nbytes in enumerate(sizes):
        tensors.append(StoredTensor("up_proj", number, there[0], at, nbytes, "F16", (nbytes // 2,)))
        at += nbytes
    tensors.append(StoredTensor("down_proj", 0, there[1], 0, PAGE, "F16", (PAGE // 2,)))
    layout = lay_out(tensors)
    assert [(extent.file, extent.nbytes) for extent in layout.extents] == [
        (there[0], sum(sizes)),
        (there[1], PAGE),
    ]
    stepped.store.layouts[A] = layout
    reads: list[Extent] = []
    stepped.store.read_extent = lambda key, extent, slot: reads.append(extent)  # type: ignore[method-assign]
    stepped.queue.demand(A, 0)
    stepped.begin_all()
    assert stepped.queue.next_ready().key == A
    first = [extent for extent in reads if extent.file == there[0]]
    assert len(first) == 3 and first[0].offset == tensors[0].offset
    for one, after in pairwise(first):
        assert one.offset + one.nbytes == after.offset and after.offset % PAGE == 0
        assert one.slot_offset + one.nbytes == after.slot_offset
    assert sum(extent.nbytes for extent in first) == sum(sizes)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_read_is_tried_twice(stepped: Stepped, failures: int) -> None:
    queue, store = stepped.queue, stepped.store
    queue.demand(A, 0)
    queue.demand(B, 1)
    stepped.begin()
    stepped.finish()
    store.failures[A] = failures
    assert stepped.begin() == (A, 1)
    stepped.finish()
    assert store.failures[A] == 0
    rest = stepped.begin_all()
    assert rest == ([(A, 2)] if failures == 1 else []) + [(B, 0), (B, 1), (B, 2)], (
        "nothing more of what failed"
    )
    found = [queue.next_ready(), queue.next_ready()]
    assert [load.key for load in found] == [A, B]
    assert isinstance(found[0].failure, ExpertReadError) == (failures == 2) and found[1].failure is None
    if failures == 1:
        assert bytes(found[0].view) == bytes([A.expert + 1]) * NBYTES


@pytest.mark.parametrize("bad", [1, 2])
def test_bytes_that_are_not_those_of_before_are_read_again_once(stepped: Stepped, bad: int) -> None:
    stepped.store.bad_sums[A] = bad
    stepped.queue.demand(A, 0)
    assert len(stepped.begin_all()) == 3
    load = stepped.queue.next_ready()
    assert isinstance(load.failure, ExpertReadError) == (bad == 2)
    assert len(stepped.store.reads) == 4, "the second time in one piece"


def test_waiting_is_patient_with_a_slow_disk(stepped: Stepped) -> None:
    """Three chunks of fifty seconds each: as long as there is progress nothing hangs."""

    def slowly() -> Iterator[float]:
        for _ in range(3):
            stepped.now += 50.0
            stepped.begin()
            stepped.finish()
            yield 0.0

    stepped.meanwhile = slowly()
    stepped.queue.demand(A, 0)
    assert stepped.queue.next_ready().key == A and stepped.now == 1150.0


def test_no_progress_for_a_minute_is_hanging_and_later_progress_is_none_of_its_business(
    stepped: Stepped,
) -> None:
    queue = stepped.queue
    queue.demand(A, 0)
    stepped.begin()
    with pytest.raises(ExpertReadError, match="layer 0 expert 0 hangs"):
        queue.next_ready()
    assert stepped.now == 1060.0
    queue.abandon_demand()
    assert stepped.now == 1060.0 + transfers._CLOSING_S, "it is not waited for for long"
    assert queue.take_returned() == []
    queue.demand(B, 1)
    stepped.finish()
    assert queue.take_returned() == [0], "its slot comes back when it is over"
    assert stepped.begin_all() == [(B, 0), (B, 1), (B, 2)] and queue.next_ready().key == B


def test_a_streamed_expert_uses_every_reader_and_demand_goes_before_it(stepped: Stepped) -> None:
    queue = stepped.queue
    queue.lend(6)
    queue.stream([A, B])
    queue.add_spare(0)
    queue.prefetch([D])
    assert [stepped.begin() for _ in range(2)] == [(A, 0), (A, 1)]
    queue.demand(C, 1)
    assert [stepped.begin() for _ in range(5)] == [(C, 0), (C, 1), (C, 2), (A, 2), None], "B has no slot"
    while stepped.reading:
        stepped.finish()
    queue.lend(7)
    assert stepped.begin() == (B, 0), "before any prefetch"
    queue.end_stream()
    assert [stepped.begin() for _ in range(2)] == [(B, 1), (B, 2)], "what has begun is read to its end"


def test_every_interleaving_keeps_the_order_and_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 steps of up to three readers: who may begin, and that nobody writes where somebody else does."""
    rng, stepped = random.Random(5), Stepped(monkeypatch)
    queue, free = stepped.queue, [3, 4, 5, 6, 7]
    for slot in range(3):
        queue.add_spare(slot)
    overtaken = 0
    actions = ["demand", "wish", "stream", "cancel", *["begin"] * 5, *["finish"] * 5]

    def writers() -> list[Load]:
        return list(dict.fromkeys(load for load, _ in stepped.reading))

    def coming() -> set[ExpertKey]:
        """What is demanded."""
        return {load.key for load in queue._active if load.demand}

    def settle() -> None:
        """As before each access: nothing more begins, and what became of prefetches is heard."""
        queue.end_stream()
        free.extend(queue.take_returned())
        for step, load in queue.take_events():
            if step is Step.FINISHED:
                assert bytes(load.view) == bytes([load.key.expert + 1]) * NBYTES
                queue.add_spare(load.slot)

    for _ in range(20_000):
        free += queue.take_returned()
        action, key = rng.choice(actions), rng.choice(KEYS)
        if action == "begin" and len(stepped.reading) < 3:
            before, demanded, busy = writers(), bool(queue._demand), len(stepped.reading)
            found = stepped.begin()
            if found is None:
                assert not demanded, "a reader was idle beside a demand"
                continue
            load = stepped.reading[-1][0]
            assert load.demand or not demanded, "something went before a demand"
            overtaken += load.demand and any(not other.demand for other in before)
            assert load.demand or load.borrowed or busy < 2, "a prefetch on a busy link"
            assert all(load is other or load.slot != other.slot for other in before), "two write to one slot"
            assert load.slot not in (*free, *queue._spares, *queue._lent, *queue._returned)
        elif action == "finish" and stepped.reading:
            stepped.finish(rng.randrange(len(stepped.reading)))
        elif action == "demand" and free and key not in coming():
            settle()
            promoted = queue.promote(key)
            if promoted is None:
                queue.demand(key, free.pop())
            elif not promoted.borrowed:
                queue.add_spare(free.pop())
        elif action == "wish":
            settle()
            queue.prefetch([one for one in rng.sample(KEYS, 3) if one not in {*coming(), *queue._prefetches}])
        elif action == "stream" and free:
            settle()
            queue.lend(free.pop())
            queue.stream([one for one in rng.sample(KEYS, 3) if one not in {*coming(), *queue._prefetches}])
        elif action == "cancel":
            queue.cancel(key)
        while queue.has_ready:
            load = queue.next_ready()
            assert bytes(load.view) == bytes([load.key.expert + 1]) * NBYTES
            free.append(load.slot)
        active = [load.slot for load in queue._active]
        settled = [load.slot for load in queue._prefetches.values() if load.settled]
        owned = [*free, *active, *settled, *queue._spares, *queue._lent, *queue._returned]
        assert sorted(owned) == list(range(8)), "a slot is lost, or has two owners"
    assert overtaken > 100
