"""``Load``: one expert on its way from the store to a slot."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from moei_core.store.base import Extent
from moei_core.store.checksums import RunningChecksum
from moei_core.types import ExpertKey


class Step(Enum):
    """What can happen to a prefetch."""

    STARTED = 0
    FINISHED = 1
    FAILED = 2


@dataclass(eq=False, slots=True)
class Load:
    """One expert on its way to ``slot``. waiting: chunks that no thread has begun. missing: not read yet.

    borrowed: into a slot that goes back when it is not demanded. So are streamed ones, whose start and end are no
        events. excused: begun in a turn that failed; if it fails too, that is not to be raised any more.
    """

    key: ExpertKey
    slot: int
    view: memoryview
    nbytes: int
    demand: bool
    waiting: deque[Extent]
    missing: int
    running: RunningChecksum
    borrowed: bool = False
    readers: int = 0
    abandoned: bool = False
    settled: bool = False
    excused: bool = False
    failure: Exception | None = None
