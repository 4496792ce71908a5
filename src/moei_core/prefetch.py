"""When to read ahead of the router: certain in a long prompt, otherwise only where it is measured to pay.

Of a pass over many tokens nearly every expert of the next layer is needed, whatever its router will say
(``PrefillStream``). For single tokens a predictor must earn its place (``PrefetchController``): accurate
prefetches can still be slower, since they take the link from demand loads; so what counts is the time of a pass,
measured, with and without, in alternating windows; off until proven. Both are parts of the brain; the controller is
told times as events, so that a replay decides as the live run did.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moei_core.types import LayerAccess


class PrefetchMode(IntEnum):
    """What a person may ask for. The values are those of the trace event ``PREFETCH_MODE``."""

    OFF = 0
    ON = 1
    AUTO = 2


class PrefillStream:
    """Names the experts that a pass over many tokens needs of its next layer so surely that reading need not wait.

    A token chooses an expert with a probability p: the share of tokens that did so in earlier passes over many
    tokens, beside the uniform share with the weight of ``PRIOR`` tokens. A pass over n tokens then needs it with
    1 - (1 - p)^n. The link would be idle otherwise, but what it reads in vain is in the way for a moment; so
    only experts of at least ``CERTAIN`` are named, and a few tokens have none. In a pass over ``LONG`` tokens attention
    takes so long that residents lend slots to what can be read meanwhile.
    """

    CERTAIN = 0.75
    PRIOR = 32.0
    LONG = 128

    def __init__(self, num_experts: Mapping[int, int], num_experts_per_tok: int) -> None:
        """num_experts: routed experts by layer, in the order in which the layers run."""
        self._next = dict(pairwise(num_experts))
        self._chosen = {
            layer: np.full(count, self.PRIOR * min(1.0, num_experts_per_tok / count))
            for layer, count in num_experts.items()
        }
        self._tokens = dict.fromkeys(num_experts, self.PRIOR)

    @classmethod
    def lent(cls, tokens: int, capacity: int, whole: int, layers: int) -> int:
        """Of ``capacity``, where all experts of ``layers`` would take ``whole``: half of what a layer lacks on average,
        at most an eighth. In the unit of these."""
        lacking = max(0, whole - capacity) // max(1, layers)
        return min(lacking // 2, capacity // 8) if tokens >= cls.LONG else 0

    def after(self, access: LayerAccess, tokens: int) -> tuple[int, NDArray[np.intp]]:
        """Learn from ``access``, of a pass over ``tokens`` tokens. (next layer, its expected experts, ascending);
        none after the last layer."""
        self._chosen[access.layer][list(access.experts)] += access.token_counts
        self._tokens[access.layer] += tokens
        layer = self._next.get(access.layer)
        if layer is None:
            return access.layer, np.empty(0, np.intp)
        unused = np.maximum(0.0, 1 - self._chosen[layer] / self._tokens[layer])
        return layer, np.flatnonzero(_power(unused, tokens) <= 1 - self.CERTAIN)


def _power(base: NDArray[np.float64], exponent: int) -> NDArray[np.float64]:
    """By multiplying: ``pow`` rounds differently between machines."""
    result = np.ones_like(base)
    while exponent:
        if exponent & 1:
            result *= base
        base = base * base
        exponent >>= 1
    return result


class PrefetchController:
    """Trials predictors in windows of decode passes and keeps the one that wins; nothing is one of them.

    What counts is how long passes take: waiting, predicting, and what reading takes from computing are all in it. What
    prefetching can save is the waiting for experts, so while that is below ``LEAST_WAITING`` of a pass nobody is tried.
    A predictor that is not being tried or kept does not even observe.

    A trial goes in windows: kept (at first: no prefetching), challenger, kept, ...; a window of the challenger is
    compared with the mean of its neighbours, since texts drift. While what is kept is nothing, its windows compute no
    predictions. First the challenger only observes in its windows: until it has seen ``EVIDENCE`` passes, if it knows
    nothing before, and ``LEARN`` since its last trial, else for one window; it has lost already if that takes so long
    that ``SAVED`` of the waiting, which the best hints save, would not make it good. Then it prefetches.

    A trial is lost as soon as, after ``FEW_PAIRS``, the mean gain plus ``DOUBT`` standard errors is below ``MARGIN``,
    or at once if the pairs lose more than ``ABORT``; it is won from ``LEAST_PAIRS`` pairs on when the mean gain less
    ``CERTAINTY`` standard errors exceeds ``MARGIN``, and lost after ``MOST_PAIRS``. That is the hysteresis: what is
    kept stays unless something is clearly better. So a trial takes at most ``MOST_PAIRS`` windows of the challenger,
    and one that harms few. Who has lost waits twice as long before its next trial. What was kept must soon, and ever
    again, beat no prefetching. Predictors that must learn wait after the first trial of one that need not: the
    model's own routers foresee best, whether that pays or not.
    """

    WARM_UP = 32
    LEAST_WAITING = 0.06
    SAVED = 0.75
    RECENT = 32
    EVIDENCE = 128
    LEARN = 32
    WINDOW = 8
    FEW_PAIRS = 4
    LEAST_PAIRS = 6
    MOST_PAIRS = 40
    MARGIN = 0.02
    CERTAINTY = 3.0
    DOUBT = 2.0
    ABORT = 0.25
    WAIT = 4096
    RECHECK = 256
    LONGEST_WAIT = 1 << 16

    def __init__(self, mode: PrefetchMode = PrefetchMode.AUTO, learning: Sequence[bool] = (True,)) -> None:
        """learning: for each predictor to choose from, whether it must have observed before it knows anything. Who need
        not is tried first. They are numbered from 0, which observes for all others."""
        self.mode = mode
        self._learning, predictors = tuple(learning), len(learning)
        self.kept: int | None = None
        self.trials = 0
        self._passes = 0
        # None, too, is a challenger: what was kept once must still beat no prefetching later.
        options: list[int | None] = [*range(predictors), None]
        self._next_trial = dict.fromkeys(options, self.WARM_UP)
        self._wait = {option: self.RECHECK if option is None else self.WAIT for option in options}
        self._challenger: int | None = None
        # Those that need not learn and had a trial.
        self._tried: set[int] = set()
        # Passes that each has observed; how many the challenger must have before it prefetches, if it does not yet.
        self._observed = dict.fromkeys(range(predictors), 0)
        self._evidence: int | None = None
        # Total duration of each window of the trial that runs, kept and challenger in turn.
        self._windows: list[float] = []
        self._left = 0
        # The share of a pass that waits for experts, lately.
        self._waiting = 0.0

    @property
    def active(self) -> int | None:
        """The predictor that the next plan should prefetch by; None: do not prefetch."""
        if self.mode is not PrefetchMode.AUTO:
            return 0 if self.mode is PrefetchMode.ON else None
        return self._challenger if self._challenging and self._evidence is None else self.kept

    @property
    def watching(self) -> tuple[int, ...]:
        """The predictors that must observe the next pass: what is active, and what learns for its trial."""
        wanted = {self.active}
        if self.mode is PrefetchMode.AUTO and self._challenging:
            wanted.add(self._challenger)
        found = sorted(option for option in wanted if option is not None)
        return (0,) if 0 in found else tuple(found)

    @property
    def _challenging(self) -> bool:
        return bool(self._windows) and len(self._windows) % 2 == 0

    def on_pass(self, duration: float, waited: float) -> None:
        """A decode pass took ``duration``, of which it ``waited`` for what prefetching might have brought in time; in
        any unit."""
        self._passes += 1
        if self.mode is not PrefetchMode.AUTO:
            return
        if duration > 0:
            self._waiting += (waited / duration - self._waiting) / self.RECENT
        if not self._windows:
            self._begin_trial()
            return
        watching = self.watching
        for option in self._observed if 0 in watching else watching:
            self._observed[option] += 1
        self._windows[-1] += duration
        self._left -= 1
        if not self._left:
            self._close_window(self._windows)

    def _begin_trial(self) -> None:
        due = [
            option
            for option, start in self._next_trial.items()
            if option != self.kept
            and start <= self._passes
            and (option is None or self._waiting >= self.LEAST_WAITING)
        ]
        if due:
            challenger = self._challenger = min(due, key=lambda one: one is not None and self._learning[one])
            self._evidence = None
            if challenger is not None and self._learning[challenger]:
                self._evidence = max(self.EVIDENCE, self._observed[challenger] + self.LEARN)
            elif challenger is not None:
                self._evidence = self._observed[challenger] + self.WINDOW
            self._open_window([])

    def _open_window(self, windows: list[float]) -> None:
        self._windows, self._left = [*windows, 0.0], self.WINDOW

    def _close_window(self, windows: list[float]) -> None:
        if len(windows) % 2 == 0:
            self._open_window(windows)
            return
        if self._evidence is not None and self._waiting < self.LEAST_WAITING:
            # Nothing is left to be saved. That is no verdict.
            self._windows = []
            return
        # The window after the challenger's is needed to judge it, so a decision comes a window late but fairly.
        gains = [
            1 - windows[i] / ((windows[i - 1] + windows[i + 1]) / 2)
            for i in range(1, len(windows) - 1, 2)
            if windows[i - 1] + windows[i + 1] > 0
        ]
        won = self._verdict(gains)
        if won is not None:
            self._decide(won)
        elif self._evidence is not None and self._observed[self._challenger or 0] >= self._evidence:
            self._evidence = None
            self._open_window(windows[-1:])
        else:
            self._open_window(windows)

    def _verdict(self, gains: list[float]) -> bool | None:
        """Whether the challenger has won; None: not known yet."""
        if not gains:
            return None
        gain = statistics.fmean(gains)
        if gain < -self.ABORT:
            return False
        if len(gains) < self.FEW_PAIRS:
            return None
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        to_save = 0.0 if self._evidence is None else self.SAVED * self._waiting
        if gain + to_save + self.DOUBT * error < self.MARGIN:
            return False
        if self._evidence is not None:
            return None
        if len(gains) >= self.LEAST_PAIRS and gain - self.CERTAINTY * error > self.MARGIN:
            return True
        return False if len(gains) == self.MOST_PAIRS else None

    def _decide(self, won: bool) -> None:
        self.trials += 1
        self._windows = []
        challenger = self._challenger
        if won:
            self.kept = challenger
            self._wait = {option: self.RECHECK if option is None else self.WAIT for option in self._wait}
            self._next_trial = dict.fromkeys(self._wait, self._passes + self.RECHECK)
        else:
            self._next_trial[challenger] = self._passes + self._wait[challenger]
            self._wait[challenger] = min(2 * self._wait[challenger], self.LONGEST_WAIT)
        if challenger is not None and not self._learning[challenger] and challenger not in self._tried:
            # It foresees best: the others have little to add to it, and less to save where it does not pay.
            self._tried.add(challenger)
            for option, learns in enumerate(self._learning):
                if learns:
                    self._next_trial[option] = self._passes + self._wait[option]
