"""What carrying plans out has cost, counted by the runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler, PrefetchStatistics


@dataclass(slots=True)
class RuntimeStatistics:
    """What carrying plans out has cost. Times in seconds of the engine's thread.

    bytes_read: of experts, also what was read in vain. bytes_prefetched: of them by complete prefetches. stall_s:
    waiting for experts. move_s: asking for experts, giving slots out and taking them back. combine_s: gathering rows
    and summing outputs. decide_s: what the brain does in forward passes; turn_s: between them. dense_s: computing
    what is no expert, in RAM (``DENSE_CLOCK``). copies, bytes_copied: of experts to a device, those for the next time
    (promotions) and those that no router had asked for (copies_ahead) included; copies_late: of the latter, those that
    were chosen before they were there. link_s: until copies were queued, and done where nothing else held the device
    up. device_wait_s: until a device had computed what the host needed, and with it everything before.
    """

    loads: int = 0
    bytes_read: int = 0
    bytes_prefetched: int = 0
    stall_s: float = 0.0
    expert_compute_s: float = 0.0
    decide_s: float = 0.0
    move_s: float = 0.0
    combine_s: float = 0.0
    turn_s: float = 0.0
    dense_s: float = 0.0
    copies: int = 0
    promotions: int = 0
    copies_ahead: int = 0
    copies_late: int = 0
    bytes_copied: int = 0
    link_s: float = 0.0
    device_wait_s: float = 0.0

    @property
    def waited_s(self) -> float:
        """All waiting."""
        return self.stall_s + self.link_s + self.device_wait_s

    def minus(self, earlier: RuntimeStatistics) -> RuntimeStatistics:
        """What happened since ``earlier`` was copied."""
        return RuntimeStatistics(
            *(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self))
        )


class LayerClock:
    """Shares the time that the experts of one layer take out among the parts of ``RuntimeStatistics``."""

    def __init__(self, spent: RuntimeStatistics) -> None:
        self._spent, self.beside_s = spent, 0.0
        self._at, self._known = time.perf_counter(), self._counted()

    def add_to(self, part: str) -> None:
        """What passed since the last call belongs to ``part``, but for what is counted where it happens.

        That is computing experts, waiting, looking ahead, and what was computed beside the experts (``beside_s``).
        """
        now, known = time.perf_counter(), self._counted()
        setattr(self._spent, part, getattr(self._spent, part) + (now - self._at) - (known - self._known))
        self._at, self._known = now, self._counted()

    def _counted(self) -> float:
        spent = self._spent
        return spent.expert_compute_s + spent.waited_s + spent.decide_s + self.beside_s


def prefetch_shares(done: PrefetchStatistics, misses: int) -> dict[str, float]:
    """What prefetching was good for, as shares, 0 of nothing. misses: lookups in RAM that found no resident expert.

    coverage: of the experts that would have been missing, those that had been begun before. waste: of those begun,
    those that were not chosen. lateness: of those begun rightly, those that were not complete in time.
    """
    right = done.useful + done.late

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    return {
        "coverage": share(right, done.useful + misses),
        "waste": share(done.wasted + done.cancelled, done.started),
        "lateness": share(done.late, right),
    }


def prefetch_verdict(scheduler: ExpertScheduler) -> str:
    """What the controller holds of prefetching by now, in words."""
    controller = scheduler.controller
    if controller.mode is PrefetchMode.OFF:
        return "off"
    if controller.mode is PrefetchMode.ON:
        return "on, as asked"
    if not controller.trials:
        return "off: no trial has ended yet"
    trials = "1 trial" if controller.trials == 1 else f"{controller.trials} trials"
    if controller.kept is None:
        return f"off: not faster in {trials}"
    return f"on by {scheduler.prefetching_by}, which was faster; {trials}"
