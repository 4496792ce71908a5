"""The stored profile, what it is believed for, and what it says between its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moei_core.forecast.routing import Range
from moei_core.forecast.speed import Speeds
from moei_core.hardware.machine import read_machine
from moei_core.hardware.profile import Figure, fingerprint, load_profile, profile_path, save_profile
from moei_core.hardware.system import CgroupMemory
from tests.hardware.fakes import FakeNvml, exactly, made_profile
from tests.hardware.test_gpus import BOARD

MIB = 1 << 20


def test_a_stored_profile_is_not_believed_blindly(tmp_path: Path) -> None:
    assert load_profile() is None
    profile = made_profile()
    save_profile(profile)
    content = json.loads(profile_path().read_text())
    for damaged in (
        "",
        "[]",
        json.dumps(content | {"format_version": 0}),
        json.dumps(content | {"memory_bandwidth": {}}),
        json.dumps(content | {"disks": 3}),
        json.dumps({key: value for key, value in content.items() if key != "cpu"}),
    ):
        profile_path().write_text(damaged)
        assert load_profile() is None


def test_a_read_only_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEI_HOME", "/proc/self/nowhere")
    runtime = tmp_path / "runtime"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    told = save_profile(made_profile())
    assert told.startswith(
        f"The profile is kept until the machine restarts ({runtime}/moei-hardware.json): /proc"
    )
    assert load_profile() == made_profile()
    # Where others can write, they could have written it.
    runtime.chmod(0o777)
    assert load_profile() is None
    assert save_profile(made_profile()).startswith("The profile is not kept: /proc/self/nowhere")


def test_the_fingerprint_changes_with_the_machine_and_not_with_the_minute(tmp_path: Path) -> None:
    machine = read_machine([tmp_path], FakeNvml([BOARD]))
    memory, cpu, disks, gpus = machine.memory, machine.cpu, machine.disks, machine.gpus
    before = fingerprint(memory, cpu, disks, gpus)
    limit = CgroupMemory(2, "/sys/fs/cgroup/x", 1 << 30, 1 << 20)
    busy = replace(memory, available=memory.available // 2, swap_free=0, cgroup=limit)
    later = [replace(disk, free=disk.free // 2) for disk in disks]
    other = [replace(gpu, free=1, used_by_others=5) for gpu in gpus]
    assert fingerprint(busy, cpu, later, other) == before
    changed = [
        fingerprint(replace(memory, total=memory.total * 2), cpu, disks, gpus),
        fingerprint(memory, replace(cpu, cores=cpu.cores + 1), disks, gpus),
        fingerprint(memory, replace(cpu, quota=0.5), disks, gpus),
        fingerprint(memory, cpu, [replace(disk, number="9:9") for disk in disks], gpus),
        fingerprint(memory, cpu, disks, []),
    ]
    assert before not in changed
    assert len(set(changed)) == len(changed)


def test_between_measured_sizes_the_bandwidth_is_between() -> None:
    disk = made_profile().disks[0]
    small, large = disk.experts
    disk = replace(disk, experts=(small, replace(large, bandwidth=exactly(3e9))))
    assert (small.nbytes, large.nbytes) == (MIB, 16 * MIB)
    assert disk.expert_bandwidth(MIB // 2) == exactly(1e9)
    assert disk.expert_bandwidth(MIB) == exactly(1e9)
    assert disk.expert_bandwidth(4 * MIB).value == pytest.approx(2e9)
    assert disk.expert_bandwidth(100 * MIB) == exactly(3e9)


def test_a_disk_at_another_moment_is_as_much_faster_at_every_size() -> None:
    disk = made_profile(disk_bandwidth=1e9).disks[0]
    small, large = disk.experts
    disk = replace(disk, experts=(replace(small, bandwidth=Figure(1e9, 0.5e9, 1.2e9)), large))
    now = replace(small, nbytes=4 * MIB, bandwidth=Figure(2e9, 1.8e9, 2.8e9))
    then = disk.at_another_moment(now, now)
    assert then.expert_bandwidth(MIB) == Figure(2e9, 1e9, 2.8e9)
    assert then.expert_bandwidth(64 * MIB) == Figure(2e9, 1.8e9, 2.8e9)
    assert then.fresh == now
    speeds = Speeds.of(replace(made_profile(), disks=(then,)), then)
    assert speeds.read(MIB, 4) == Range(*(4 * MIB / one for one in (2.8e9, 2e9, 1e9)))
