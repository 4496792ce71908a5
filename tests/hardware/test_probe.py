"""The disk probe in awkward places and killed half-way; the whole probe; the stored profile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from moei_core.hardware.disks import DiskFacts, read_disk
from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.machine import Machine, read_machine
from moei_core.hardware.probe import Effort, measure
from moei_core.hardware.probe import disk as disk_probe
from moei_core.hardware.probe import reads as disk_reads
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.disk import DiskEffort, nameless_file, probe_disk
from moei_core.hardware.probe.reads import ExpertReads, read_again
from moei_core.hardware.profile import load_profile, save_profile
from moei_core.quant import native
from tests.cli.conftest import Outcome
from tests.hardware.fakes import FakeGpu, FakeNvml, made_profile
from tests.hardware.test_gpus import BOARD

MIB = 1 << 20
LONG = DiskEffort(1.0, 8 * MIB, (MIB, 4 * MIB), (1, 2))
QUICK = DiskEffort(0.05, 8 * MIB, (MIB, 4 * MIB), (1, 2))


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    steps = []
    profile = probe_disk(read_disk(tmp_path), (), LONG, lambda: steps.append(1))
    assert [(read.nbytes, read.depth) for read in profile.reads] == [
        (size, depth) for size in QUICK.blocks for depth in QUICK.depths
    ]
    assert len(steps) == QUICK.settings == 4
    assert [read.nbytes for read in profile.experts] == list(QUICK.blocks)
    for read in profile.reads:
        assert 0 < read.bandwidth.low <= read.bandwidth.value <= read.bandwidth.high
        assert read.latency.value > 0
    assert profile.sustained is not None
    assert profile.note == ""
    assert everything_in(tmp_path) == []


def test_a_model_on_the_disk_is_read_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    small.write_bytes(bytes(MIB))
    large.write_bytes(os.urandom(9 * MIB))
    monkeypatch.setattr(disk_probe, "nameless_file", lambda folder: pytest.fail("wrote a file"))
    profile = probe_disk(read_disk(tmp_path), [small, large, tmp_path / "gone"], QUICK)
    assert profile.source == "the model file large.safetensors"
    assert len(profile.reads) == 4
    assert everything_in(tmp_path) == [large, small]


def test_without_nameless_files_the_name_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    descriptor = nameless_file(tmp_path)
    assert everything_in(tmp_path) == []
    os.close(descriptor)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_tmpfs_is_measured_as_the_memory_that_it_is() -> None:
    facts = read_disk(Path("/dev/shm"))
    assert facts.in_memory
    profile = probe_disk(facts, (), QUICK)
    assert len(profile.reads) == 4


def facts_of(tmp_path: Path, **changes: object) -> DiskFacts:
    return replace(read_disk(tmp_path), **changes)  # type: ignore[arg-type]


def test_a_full_disk(tmp_path: Path) -> None:
    profile = probe_disk(facts_of(tmp_path, free=3 * MIB), (), DiskEffort(0.05))
    assert profile.reads == ()
    assert profile.note.startswith("full: 3.0 MiB")
    assert everything_in(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_space)
    assert "full" in probe_disk(read_disk(tmp_path), (), QUICK).note
    assert everything_in(tmp_path) == []


def test_a_read_only_mount(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, read_only=True)
    assert "read-only" in probe_disk(facts, (), QUICK).note
    model = tmp_path / "m.safetensors"
    model.write_bytes(bytes(9 * MIB))
    assert len(probe_disk(facts, [model], QUICK).reads) == 4
    assert everything_in(tmp_path) == [model]


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk_probe, "nameless_file", refused)
    assert "cannot be written" in probe_disk(read_disk(tmp_path), (), QUICK).note


KILLED = """
import sys
from pathlib import Path
from moei_core.hardware.disks import read_disk
from moei_core.hardware.probe.disk import DiskEffort, probe_disk
print("begins", flush=True)
probe_disk(read_disk(Path(sys.argv[1])), (), DiskEffort(60.0, 8 << 20), lambda: print("step", flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_probe_killed_half_way_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begins\n"
    assert process.stdout.readline() == b"step\n"
    # The file is there, open and being read; only its name is not.
    assert process.poll() is None
    process.send_signal(how)
    process.wait(timeout=60)
    process.stdout.close()
    assert process.returncode != 0
    assert everything_in(tmp_path) == []


TINY = Effort(0.5, 0.02, 0.02, 0.2, 0.0, 0.0, 0.01, QUICK, 4 * MIB)


def machine_with(tmp_path: Path, boards: list[dict[str, object]]) -> Machine:
    return read_machine([tmp_path, tmp_path / "same"], FakeNvml(boards))


def test_the_whole_probe(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, [BOARD, {"name": "Broken"}])
    assert len(machine.disks) == 1
    seen: list[tuple[str, int, int]] = []

    def open_gpu(gpu: GpuFacts) -> FakeGpu:
        if gpu.index:
            raise RuntimeError("no kernel image")
        return FakeGpu()

    profile = measure(machine, effort=TINY, progress=lambda *step: seen.append(step), open_gpu=open_gpu)
    assert list(profile.memory_bandwidth) == sorted(profile.memory_bandwidth, key=int)
    assert all(figure.value > 0 for figure in profile.memory_bandwidth.values())
    # A buffer of 4 MiB holds only the smallest matrix in bf16.
    torch_cells = {(kernel.format, kernel.nbytes) for kernel in profile.kernels if kernel.kernel == "torch"}
    assert torch_cells == {("bf16", 768 * 2048 * 2)}
    found = {kernel.format for kernel in profile.kernels if kernel.kernel == "native"}
    assert found == ({"bf16", "q8_0", "q4_0", "mxfp4"} if native.available() else set())
    assert [gpu.note for gpu in profile.gpus] == ["", "no kernel image"]
    assert "GPU 1 was not measured: no kernel image." in profile.notes
    assert profile.framework is None
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]
    assert everything_in(tmp_path) == []
    assert save_profile(profile) == ""
    assert load_profile() == profile


@pytest.mark.parametrize(("others", "noticed"), [(0.1, False), (1.5, True)])
def test_figures_measured_beside_other_programs_are_doubted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: float, noticed: bool
) -> None:
    from moei_core.hardware import probe

    def spent() -> tuple[float, float]:
        now = time.perf_counter()
        return 1000 + (1 + others) * now, now

    monkeypatch.setattr(probe, "processor_seconds", spent)
    profile = measure(machine_with(tmp_path, []), effort=TINY)
    assert ("Other programs used 1.5 processors" in " ".join(profile.notes)) is noticed


def test_the_processor_time_of_this_program_is_part_of_everybodys() -> None:
    from moei_core.hardware.probe import processor_seconds

    before = processor_seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    everybody, own = (now - then for now, then in zip(processor_seconds(), before, strict=True))
    assert 0.1 < own <= everybody + 0.05


def test_experts_are_measured_on_the_fastest_disk_with_room(tmp_path: Path) -> None:
    from moei_cli.measured_machine import _expert_places

    machine = machine_with(tmp_path, [])
    disk = replace(machine.disks[0], free=100 << 30)
    slow, fast, full, memory, fixed = (
        replace(disk, number=number, **changes)
        for number, changes in (
            ("slow", {}), ("fast", {}), ("full", {"free": 1 << 20}), ("memory", {"file_system": "tmpfs"}),
            ("fixed", {"read_only": True}),
        )
    )  # fmt: skip
    nowhere = replace(disk, number="nowhere", folder="/proc/self/nowhere")
    machine = replace(machine, disks=(slow, full, memory, nowhere, fixed, fast))
    speeds = {"slow": 1e9, "fast": 3e9, "full": 7e9, "memory": 9e9, "fixed": 9e9, "nowhere": 9e9}
    assert _expert_places(machine, speeds) == [fast, slow, full]
    assert _expert_places(machine, {}) == [slow, fast, full]


def test_experts_are_read_in_chunks_and_each_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * (16 * MIB // 256)
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    places: list[int] = []
    hashed: list[int] = []
    read = os.preadv

    def watched(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        places.append(offset)
        return read(descriptor, buffers, offset)

    def noted(pieces: list[memoryview]) -> str:
        hashed.append(len(pieces[0]))
        return ""

    monkeypatch.setattr(os, "preadv", watched)
    monkeypatch.setattr(disk_reads, "checksum", noted)
    descriptor = os.open(file, os.O_RDONLY)
    with disk_reads.read_target(16 * MIB) as target:
        source = disk_reads.Source(descriptor, 16 * MIB, False, "a file")
        experts = disk_reads.ExpertReads(source, target, [4 * MIB])
        for _ in range(3):
            for kind in experts._spent:
                experts._spent[kind] = 0.0  # as at the first moment, so that each is read once
            experts.sample(Allowance(0.0))
            assert sorted(bytes(target[::MIB])) == sorted(content[::MIB])
    os.close(descriptor)
    (speed,), fresh = experts.speeds()
    assert fresh is not None
    assert speed.nbytes == fresh.nbytes == 4 * MIB
    assert speed.latency.value == pytest.approx(4 * MIB / speed.bandwidth.value, rel=0.5)
    # Three rounds, each once into the target and once into fresh memory: four experts of two chunks, all of the file.
    assert all(places.count(place * 2 * MIB) == 6 for place in range(8))
    assert len(places) == 48
    assert hashed == [2 * MIB] * 48


def test_every_size_is_read_all_through_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no size is judged by one moment of a disk whose speed changes."""
    order: list[str] = []
    sample, measure_one = ExpertReads.sample, disk_probe._measure
    spent: list[dict[tuple[int, bool], float]] = []

    def sampled(self: ExpertReads, allowance: Allowance) -> None:
        order.append("experts")
        sample(self, allowance)
        spent.append(dict(self._spent))

    def measured(*arguments: object) -> object:
        order.append("blocks")
        return measure_one(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertReads, "sample", sampled)
    monkeypatch.setattr(disk_probe, "_measure", measured)
    profile = probe_disk(read_disk(tmp_path), (), replace(QUICK, seconds=1.0))
    assert order == ["blocks", "experts"] * 4 + ["blocks"]
    for earlier, later in pairwise([dict.fromkeys(spent[0], 0.0), *spent]):
        assert all(later[kind] > earlier[kind] for kind in later)
    assert profile.fresh is not None
    assert profile.fresh.nbytes == max(QUICK.blocks)


def test_the_command_shows_what_is_stored(
    moei: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moei_cli import measured_machine

    measured = []

    def quickly(folders: list[Path]) -> tuple[object, str]:
        machine = read_machine(folders)
        measured.append(folders)
        profile = replace(
            made_profile(),
            fingerprint=machine.fingerprint,
            disks=tuple(replace(made_profile().disks[0], facts=disk) for disk in machine.disks),
        )
        return profile, save_profile(profile)

    monkeypatch.setattr(measured_machine, "measure_now", quickly)
    first = moei("profile-hardware", "--json")
    assert first.code == 0
    assert json.loads(first.out)["memory_bandwidth"]["2"]["value"] == 20e9
    shown = moei("profile-hardware")
    assert shown.code == 0
    assert "ceiling of resident decode" in shown.out
    assert len(measured) == 1
    moei("profile-hardware", "--again")
    assert len(measured) == 2
    # Another machine's figures are not used.
    other = replace(load_profile(), fingerprint="another")  # type: ignore[type-var]
    save_profile(other)
    moei("profile-hardware")
    assert len(measured) == 3


def test_the_command_refuses_a_folder_that_is_not_there(moei: Callable[..., Outcome]) -> None:
    done = moei("profile-hardware", "--folder", "/nowhere/at/all")
    assert done.code == 3
    assert "not a folder" in done.err


def test_measuring_ends_soon(tmp_path: Path) -> None:
    started = time.perf_counter()
    probe_disk(read_disk(tmp_path), (), replace(QUICK, seconds=0.2))
    # Generous: shared machines stall. Without the limit it would read for ever.
    assert time.perf_counter() - started < 60


def test_a_model_is_read_again_before_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(os.urandom(9 * MIB))
    found = read_again(file, MIB + 17, 0.05)  # no expert is a whole number of pages
    assert found is not None
    now, fresh = found
    assert now.nbytes == MIB and fresh is not None and fresh.nbytes == MIB
    assert 0 < now.bandwidth.low <= now.bandwidth.value <= now.bandwidth.high
    assert read_again(file, 2 * MIB, 0.05) is None  # too few of them
    assert read_again(tmp_path / "gone", MIB, 0.05) is None
