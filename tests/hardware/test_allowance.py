"""Measuring ends in time on a slow machine and still has its figures: by a clock that the test moves."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from moei_core.engine import expert_probe
from moei_core.engine.expert_probe import Geometry, ProbeEffort, measure_experts
from moei_core.hardware.machine import read_machine
from moei_core.hardware.probe import Effort, measure, reads
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.profile import ExpertSpeed, FrameworkCost
from tests.hardware.fakes import FakeNvml, made_profile

MIB = 1 << 20
LIMIT_S = 55.0


class SlowWorld:
    """A clock that a disk moves, by a millisecond an operation and by the bytes; and whoever looks at it, a little."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth, self._now = bandwidth, 0.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.move(1e-4)

    def move(self, seconds: float) -> float:
        with self._lock:
            self._now += seconds
            return self._now

    def bytes_pass(self, nbytes: int) -> int:
        self.move(1e-3 + nbytes / self._bandwidth)
        return nbytes


def test_a_part_is_a_share_of_what_is_left() -> None:
    now = [0.0]
    whole = Allowance(10.0, lambda: now[0])
    first = whole.part(0.5)
    assert (whole.left, first.left, whole.part(0.5, most=2.0).left) == (10.0, 5.0, 2.0)
    now[0] = 8.0  # it took too long
    assert first.over and first.left == 0.0 and first.spent == 8.0
    assert whole.part(0.5).left == 1.0
    now[0] = 11.0
    assert whole.over and whole.part(0.5).over


@pytest.mark.parametrize("bandwidth", [50e6, 200e6, 2e9])
@pytest.mark.parametrize("others", [1.0, 1.6])
def test_a_slow_machine_is_measured_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bandwidth: float, others: float
) -> None:
    """others: how much longer than their share the parts take that run the engine: their last samples."""
    world = SlowWorld(bandwidth)
    monkeypatch.setattr(os, "preadv", lambda descriptor, into, offset: world.bytes_pass(sum(map(len, into))))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: world.bytes_pass(len(data)))
    monkeypatch.setattr(reads, "checksum", lambda pieces: "")  # gigabytes that were never read
    given: list[float] = []

    def take(allowance: Allowance) -> None:
        given.append(allowance.left)
        world.move(others * allowance.left)

    def experts(allowance: Allowance, bandwidths: Mapping[str, float]) -> tuple[ExpertSpeed, ...]:
        take(allowance)
        assert list(bandwidths.values()) == [pytest.approx(bandwidth, rel=0.3)]
        return ()

    def framework(allowance: Allowance) -> FrameworkCost | None:
        take(allowance)
        return made_profile().framework

    # Products are computed, while this clock stands nearly still: few of them.
    effort = replace(Effort(), memory=0.1, kernels=0.1, buffer_nbytes=4 * MIB)
    machine = read_machine([tmp_path], FakeNvml([]))
    machine = replace(machine, disks=tuple(replace(one, free=100 << 30) for one in machine.disks))
    profile = measure(machine, None, framework, experts, effort, clock=world)
    assert profile.seconds == pytest.approx(world.move(0.0), abs=0.2)
    assert profile.seconds < LIMIT_S
    # Where even the disk is too slow for its share, the last part makes do with its fewest samples.
    assert len(given) == 2 and (bandwidth < 200e6 or all(seconds > 1.0 for seconds in given))
    (disk,) = profile.disks
    assert disk.note == ""
    assert [read.nbytes for read in disk.experts] == [MIB, 4 * MIB, 16 * MIB, 64 * MIB]
    for read in disk.experts:
        operations = -(-read.nbytes // (2 * MIB))
        true = read.nbytes / (read.nbytes / bandwidth + operations * 1e-3)
        assert read.bandwidth.value == pytest.approx(true, rel=0.05)
        assert read.bandwidth.low <= read.bandwidth.value <= read.bandwidth.high
    assert disk.fresh is not None and disk.sustained is not None
    # One block at a time at the least, in each size that there is time for.
    assert {read.nbytes for read in disk.reads} >= {MIB, 4 * MIB}


@pytest.mark.parametrize(
    ("rate", "seconds", "all_of_them"), [(2e6, 8.0, False), (2e6, 40.0, True), (1e9, 8.0, True)]
)
def test_experts_from_a_slow_disk_are_measured_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, seconds: float, all_of_them: bool
) -> None:
    world = SlowWorld(rate)
    read = os.preadv

    def slowly(descriptor: int, into: list[memoryview], offset: int) -> int:
        return world.bytes_pass(read(descriptor, into, offset))

    monkeypatch.setattr(os, "preadv", slowly)
    effort = ProbeEffort(
        0.0, 4 * MIB, (Geometry(64, 32, 2), Geometry(256, 256, 4)), ("BF16", "Q4_0"), (4, 16)
    )
    allowance = Allowance(seconds, world)
    found = measure_experts(tmp_path, effort, allowance)
    # The last sample of a setting may end after the end: of 32 experts of .4 MB at most.
    assert allowance.spent < seconds + 2 * 32 * 393216 / 2e6
    settings = 2 * [(form, tokens) for form in ("bf16", "q4_0") for tokens in (1, 4, 16)]
    measured = [(one.format, one.tokens) for one in found]
    # The cheaper ones first, where there is no time for all.
    assert measured == settings[: len(measured)] and len(measured) >= 6
    assert (measured == settings) is all_of_them
    assert all(one.resident > 0 and one.arriving > 0 for one in found)


def test_a_disk_that_is_too_slow_for_experts_leaves_them_as_resident_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SlowWorld(20e3)
    read, layers = os.preadv, []
    made = expert_probe._Layer.__init__

    def noted(self: expert_probe._Layer, *arguments: object) -> None:
        layers.append(arguments[4])
        made(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(expert_probe._Layer, "__init__", noted)
    monkeypatch.setattr(
        os,
        "preadv",
        lambda descriptor, into, offset: world.bytes_pass(read(descriptor, into, offset)),
    )
    effort = ProbeEffort(0.0, 4 * MIB, (Geometry(64, 32, 2), Geometry(256, 256, 4)), ("BF16",), (4,))
    found = measure_experts(tmp_path, effort, Allowance(60.0, world))
    # 32 small ones took 20 s; four of 393 KB would take 80.
    assert layers == [True, False, True]
    large = found[2:]
    assert len(large) == 2 and all(one.arriving == one.resident and not one.handling for one in large)
