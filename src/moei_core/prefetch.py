"""Whether prefetching earns its place: measured in alternating windows, off until proven.

Accurate prefetches can still be slower, since they take the link from demand loads; so what counts is the
time of a pass, measured, with and without. The controller is part of the brain and is told times as events,
so that a replay decides as the live run did.
"""

from __future__ import annotations

from enum import IntEnum


class PrefetchMode(IntEnum):
    """What a person may ask for. The values are those of the trace event ``PREFETCH_MODE``."""

    OFF = 0
    ON = 1
    AUTO = 2


class PrefetchController:
    """Trials prefetching in windows of decode passes and keeps what wins.

    Off for ``evidence`` passes: predictors know nothing before. Then a trial: windows off, on, off, on ...;
    a window on is compared with the mean of its neighbours off, since texts drift. After ``PAIRS`` pairs the
    mean gain decides: on if it exceeds ``MARGIN``, off if it is below -``MARGIN``, else as before
    (hysteresis). One window on that is far slower ends the trial at once. After each trial without a change
    the wait for the next doubles, so a useless predictor costs less and less.
    """

    EVIDENCE = 1000
    WINDOW = 16
    PAIRS = 4
    MARGIN = 0.02
    ABORT = -0.05
    WAIT = 1024

    def __init__(self, mode: PrefetchMode = PrefetchMode.AUTO) -> None:
        self.mode = mode
        self.kept = False
        self.trials = 0
        self._passes = 0
        self._next_trial = self.EVIDENCE
        self._wait = self.WAIT
        # Total duration of each window of the trial that runs, off and on in turn, starting with off.
        self._windows: list[float] | None = None
        self._left = 0

    @property
    def active(self) -> bool:
        """Whether the next plan should prefetch."""
        if self.mode is not PrefetchMode.AUTO:
            return self.mode is PrefetchMode.ON
        if self._windows is None:
            return self.kept
        return len(self._windows) % 2 == 0

    def on_pass(self, duration: float) -> None:
        """A decode pass took ``duration``, in any unit."""
        self._passes += 1
        if self.mode is not PrefetchMode.AUTO:
            return
        if self._windows is None:
            if self._passes >= self._next_trial:
                self._windows, self._left = [0.0], self.WINDOW
            return
        self._windows[-1] += duration
        self._left -= 1
        if not self._left:
            self._close_window(self._windows)

    def _close_window(self, windows: list[float]) -> None:
        gains = [
            1 - windows[i] / ((windows[i - 1] + windows[i + 1]) / 2)
            for i in range(1, len(windows) - 1, 2)
            if windows[i - 1] + windows[i + 1] > 0
        ]
        # The window after one on is needed to judge it, so an abort comes a window late but fairly.
        hopeless = not self.kept and bool(gains) and gains[-1] < self.ABORT
        if len(windows) == 2 * self.PAIRS + 1 or hopeless:
            self._decide(gains)
        else:
            windows.append(0.0)
            self._left = self.WINDOW

    def _decide(self, gains: list[float]) -> None:
        gain = sum(gains) / len(gains) if gains else 0.0
        before = self.kept
        if gain > self.MARGIN:
            self.kept = True
        elif gain < -self.MARGIN:
            self.kept = False
        self.trials += 1
        self._windows = None
        self._wait = self.WAIT if self.kept != before else 2 * self._wait
        self._next_trial = self._passes + self._wait
