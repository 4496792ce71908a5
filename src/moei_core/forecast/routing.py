"""What routing does to a cache: hit rates and touched experts, from a small table of real recordings.

``routing.json`` is made by ``benchmarks/routing_table.py`` and names its sources. A model gets the average of all
recordings, the more alike in experts and top-k the heavier, and their spread as its range.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Range:
    """What is expected, and how low and high it may come out."""

    low: float
    value: float
    high: float


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded model. hit: (residency, hit rate) ascending; touched: (tokens, share of a layer's experts)."""

    model: str
    experts: int
    top_k: int
    hit: tuple[tuple[float, float], ...]
    touched: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """Routing of a model with ``experts`` experts a layer, ``top_k`` a token. recordings: none for random weights."""

    experts: int
    top_k: int
    recordings: tuple[tuple[float, Recording], ...] = ()

    def hit(self, residency: float) -> Range:
        """Share of decode lookups that hit when so large a share of each layer's experts stays.

        Uniform routing hits exactly as often as an expert is resident. Of recordings, what counts is how much of
        the rest they hit: (rate - residency) / (1 - residency), which carries over between models.
        """
        residency = min(max(residency, 0.0), 1.0)
        if residency >= 1.0 or not self.recordings:
            return Range(residency, residency, residency)

        def gain(recording: Recording) -> float:
            points = [(at, (rate - at) / (1 - at)) for at, rate in recording.hit]
            return _between(points, residency)

        return self._weighed(gain, lambda share: residency + share * (1 - residency))

    def touched(self, tokens: int) -> Range:
        """Share of a layer's experts that ``tokens`` consecutive tokens use.

        Of recordings, what counts is the share compared with uniform routing of the same top-k.
        """
        uniform = _uniform_touched(self.experts, self.top_k, tokens)
        if not self.recordings or tokens <= 1:
            return Range(uniform, uniform, uniform)

        def ratio(recording: Recording) -> float:
            points = [
                (math.log(at), share / _uniform_touched(recording.experts, recording.top_k, at))
                for at, share in recording.touched
            ]
            return _between(points, math.log(tokens))

        return self._weighed(ratio, lambda share: min(1.0, share * uniform))

    def _weighed(self, of: Callable[[Recording], float], result: Callable[[float], float]) -> Range:
        values = [(weight, of(recording)) for weight, recording in self.recordings]
        total = sum(weight for weight, _ in values)
        mean = sum(weight * value for weight, value in values) / total
        # The spread among the recordings that count, so that a far one does not widen it.
        spread = math.sqrt(sum(weight * (value - mean) ** 2 for weight, value in values) / total)
        return Range(result(mean - spread), result(mean), result(mean + spread))


def _uniform_touched(experts: int, top_k: int, tokens: float) -> float:
    return 1 - math.pow(1 - top_k / experts, tokens)


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between the points, level beyond their ends."""
    places = [place for place, _ in points]
    right = bisect_left(places, at)
    if right == 0:
        return points[0][1]
    if right == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


@cache
def recordings() -> tuple[Recording, ...]:
    """The shipped table."""
    content = json.loads(resources.files(__package__).joinpath("routing.json").read_text(encoding="utf-8"))
    return tuple(
        Recording(
            row["model"],
            row["experts"],
            row["top_k"],
            tuple((float(at), float(rate)) for at, rate in row["hit"].items()),
            tuple((float(at), float(share)) for at, share in row["touched"].items()),
        )
        for row in content["traces"]
    )


def routing_of(experts: int, top_k: int, *, uniform: bool = False) -> Routing:
    """The routing to expect of a model of this shape. uniform: it has random weights."""
    if uniform:
        return Routing(experts, top_k)
    weighed = []
    for recording in recordings():
        distance = abs(math.log(recording.experts / experts)) + abs(
            math.log(recording.top_k / recording.experts * experts / top_k)
        )
        weighed.append((1 / (0.1 + distance) ** 2, recording))
    return Routing(experts, top_k, tuple(weighed))
