"""What recorded turns spent their time on."""

from __future__ import annotations

from moei_core.trace.format import Trace, TraceEvent

PARTS = (
    "dense",
    "framework",
    "experts",
    "disk",
    "decisions",
    "moving",
    "combining",
    "link",
    "gpu",
    "sampling",
    "unexplained",
)
"""The parts of a turn's time by their numbers in a trace, in the order in which they are written."""


def time_spent(trace: Trace) -> list[dict[str, float]]:
    """Seconds by part of each turn that the trace has them of, in order; parts that it did not have are left out.

    A turn that made no token is here too, though not among the requests.
    """
    turns: list[dict[str, float]] = []
    before = len(PARTS)
    for _, kind, part, nanoseconds in [] if trace.events is None else trace.events.tolist():
        if kind != TraceEvent.SPENT or not 0 <= part < len(PARTS):
            continue
        if part <= before:
            turns.append({})
        turns[-1][PARTS[part]] = nanoseconds / 1e9
        before = part
    return turns
