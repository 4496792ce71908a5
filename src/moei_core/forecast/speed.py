"""How long products and reads take on the measured machine: interpolated between what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from moei_core.forecast.formats import FORMATS, StorageFormat
from moei_core.forecast.routing import Range
from moei_core.hardware.profile import DiskProfile, Figure, FrameworkCost, HardwareProfile, LayerCost

ASSUMED_FRAMEWORK = FrameworkCost(
    (LayerCost(0, 0.7e-3, 0.9e-3),), 1.5e-3, 60e-6, 1.2e-3, 150e-6, 1.5e-8, 0.2, 400 << 20, "assumed"
)
"""Where no small model could be run: what was measured on a laptop-class processor."""
ASSUMED_DISK_BANDWIDTH = 0.5e9
"""Where no disk could be measured: a SATA solid-state disk, in a range from a spinning to a fast one."""
_ASSUMED_FLOPS = 50e9
_BURST = 0.7
_WIDEST = 2.5

Point = tuple[float, float]
Table = dict[int, list[Point]]
"""By number of rows: (logarithm of bytes, logarithm of seconds a byte), ascending."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """The times that a forecast adds up. disk: where the model is or would be, None if none was measured.

    Formats that were not timed are reckoned from the memory's bandwidth.
    """

    memory_bandwidth: float
    framework: FrameworkCost
    disk: DiskProfile | None
    _products: dict[str, Table] = field(default_factory=dict)
    _resident: dict[str, Table] = field(default_factory=dict)
    _arriving: dict[str, Table] = field(default_factory=dict)
    _handling: dict[str, Table] = field(default_factory=dict)
    cores: int = 1

    @classmethod
    def of(cls, profile: HardwareProfile, disk: DiskProfile | None) -> Speeds:
        """The speeds of ``profile`` for a model on ``disk``."""
        return cls(
            profile.best_memory_bandwidth.value,
            profile.framework or ASSUMED_FRAMEWORK,
            disk,
            _tables((one.format, one.rows, one.nbytes, one.seconds.value) for one in profile.kernels),
            _tables((one.format, one.tokens, one.nbytes, one.resident) for one in profile.experts),
            _tables((one.format, one.tokens, one.nbytes, one.arriving) for one in profile.experts),
            _tables(
                (one.format, one.tokens, one.nbytes, one.handling) for one in profile.experts if one.handling
            ),
            max((one.threads for one in profile.kernels), default=1),
        )

    def with_disk_bandwidth(self, bandwidth: float) -> Speeds:
        """The same machine with a disk that reads so many bytes a second at every size."""
        if self.disk is None:
            return self
        even = Figure(bandwidth, bandwidth, bandwidth)
        experts = tuple(replace(read, bandwidth=even) for read in self.disk.experts)
        return replace(self, disk=replace(self.disk, experts=experts, sustained=None, fresh=None))

    def is_measured(self, form: StorageFormat) -> bool:
        """Whether experts in ``form`` were timed on this machine."""
        return form.name in self._resident or form.name in self._products

    def expert(self, form: StorageFormat, weights: float, tokens: float, *, arriving: bool) -> float:
        """Seconds of an expert of so many weights with so many tokens.

        arriving: while others are read, and by itself; otherwise among others that are resident.
        """
        nbytes = weights * form.bits / 8
        table = (self._arriving if arriving else self._resident).get(form.name)
        call = self.framework.expert if tokens <= 1 else self.framework.prefill_expert
        if table is not None:
            return max(call, nbytes * math.exp(_surface(table, nbytes, tokens)))
        return 3 * self.product(form, weights / 3, tokens) + call

    def handling(self, form: StorageFormat, weights: float, tokens: float) -> float:
        """Seconds that the engine spends on an expert that arrives, beside waiting for it and computing it."""
        table = self._handling.get(form.name) or next(iter(self._handling.values()), None)
        if table is None:
            return 0.0
        nbytes = weights * form.bits / 8
        return nbytes * math.exp(_surface(table, nbytes, tokens))

    def product(self, form: StorageFormat, weights: float, rows: float) -> float:
        """Seconds of ``rows`` inputs times one matrix of so many weights."""
        if not weights or not rows:
            return 0.0
        nbytes = weights * form.bits / 8
        table = self._products.get(form.name)
        if table is not None:
            return nbytes * math.exp(_surface(table, nbytes, rows))
        reading = nbytes / (self.memory_bandwidth * form.share)
        return max(reading, self._arithmetic(weights, rows))

    def _arithmetic(self, weights: float, rows: float) -> float:
        """Seconds of the multiplications alone, as fast as in bf16."""
        table = self._products.get("bf16")
        if table is None:
            return 2 * weights * rows / _ASSUMED_FLOPS
        if rows <= min(table):
            return 0.0
        nbytes = weights * FORMATS["bf16"].bits / 8
        return nbytes * math.exp(_surface(table, nbytes, rows))

    def arithmetic_rate(self) -> float:
        """Operations a second of the largest measured product in bf16."""
        table = self._products.get("bf16")
        if table is None:
            return _ASSUMED_FLOPS
        rows = max(table)
        _, per_byte = table[rows][-1]
        return 2 * rows / 2 / math.exp(per_byte)

    def read(self, nbytes: int, count: float, *, fresh: bool = False) -> Range:
        """Seconds (fewest, expected, most) of reading ``count`` experts of ``nbytes`` that are missing at once.

        fresh: into memory that was never used.
        """
        if not count:
            return Range(0.0, 0.0, 0.0)
        if self.disk is None:
            seconds = nbytes * count / ASSUMED_DISK_BANDWIDTH
            return Range(seconds / 4, seconds, seconds * 4)
        figure = self.disk.expert_bandwidth(nbytes)
        steady = _steady(self.disk)
        total, value = nbytes * count, figure.value * steady
        if fresh and (slow := self.disk.fresh) is not None:
            value *= min(1.0, slow.bandwidth.value / self.disk.expert_bandwidth(slow.nbytes).value)
        # What the disk gave at other moments, less what is no reading at all: pauses of a second or two.
        least = max(figure.low / figure.value, 1 / _WIDEST) * value
        most = min(figure.high / figure.value, _WIDEST) * value
        return Range(total / most, total / value, total / least)


def _steady(disk: DiskProfile) -> float:
    """Which share of its speed a disk keeps up: a burst is over after the first seconds.

    The best of many settings is partly luck, so the others of its size are what the sustained run is compared with,
    and a little less is only what disks vary by.
    """
    if disk.sustained is None:
        return 1.0
    best = max(disk.reads, key=lambda read: read.bandwidth.value)
    usual = statistics.median(read.bandwidth.value for read in disk.reads if read.nbytes == best.nbytes)
    share = disk.sustained.value / usual
    return share if share < _BURST else 1.0


def _tables(cells: Iterable[tuple[str, int, int, float]]) -> dict[str, Table]:
    """Tables by format, of (format, rows, bytes, seconds)."""
    found: dict[str, Table] = {}
    for name, rows, nbytes, seconds in sorted(cells):
        points = found.setdefault(name, {}).setdefault(rows, [])
        points.append((math.log(nbytes), math.log(seconds / nbytes)))
    return found


def _surface(table: Table, nbytes: float, rows: float) -> float:
    """Logarithm of seconds a byte, between the measured sizes and numbers of rows, on logarithmic axes."""
    known = sorted(table)
    values = [(math.log(one), _line(table[one], math.log(nbytes))) for one in known]
    if rows > known[-1]:
        # Beyond the largest, arithmetic decides: time grows with the rows.
        return values[-1][1] + math.log(rows / known[-1])
    return _line(values, math.log(max(rows, 1.0)))


def _line(points: Sequence[Point], at: float) -> float:
    """Linear between the points, level beyond their ends."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return points[-1][1]
