"""A model on a real file system in memory: with room, full, and read-only. Mounting needs root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moei_cli.measured_machine import _expert_places
from moei_core.engine.expert_probe import Geometry, ProbeEffort, measure_experts
from moei_core.hardware.disks import read_disk
from moei_core.hardware.machine import read_machine
from moei_core.hardware.probe.disk import DiskEffort, probe_disk
from moei_core.hub.resolve import bundled_folder
from tests.cli.conftest import Outcome, moei

__all__ = ["moei"]
MIB = 1 << 20
EFFORT = DiskEffort(0.05, 8 * MIB, (MIB,), (1, 2))
EXPERTS = ProbeEffort(0.0, 4 * MIB, (Geometry(64, 32, 2),), ("BF16",), (4,))
Moei = Callable[..., Outcome]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """128 MiB of tmpfs with the demo's folder on it."""
    place = tmp_path / "mount"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        shutil.copytree(bundled_folder(), place / "model")
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    """Leave no byte free."""
    with (place / "filler").open("wb") as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(MIB))
            filler.flush()


def read_only(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


def files(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def ask(moei: Moei, place: Path) -> None:
    """The model there answers, and is forecast or says why not."""
    done = moei("chat", str(place / "model"), "Hello", "--max-tokens", "3", "--experts", "25%", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["experts"]["slots"] == 32
    shown = moei("show", str(place / "model"), "--settings", "--json")
    assert shown.code == 0, shown.err


def test_a_model_in_memory(mount: Path, moei: Moei) -> None:
    before = files(mount)
    facts = read_disk(mount / "model")
    assert facts.in_memory
    assert facts.file_system == "tmpfs"
    assert len(probe_disk(facts, (), EFFORT).reads) == 2
    assert len(measure_experts(mount, EXPERTS)) == 2
    # Reading from memory would stand for no disk.
    assert _expert_places(read_machine([mount]), {}) == []
    ask(moei, mount)
    assert files(mount) == before


def test_a_model_on_a_full_disk(mount: Path, moei: Moei) -> None:
    fill(mount)
    before = files(mount)
    profile = probe_disk(read_disk(mount), (), EFFORT)
    assert profile.note.startswith("full: 0 B")
    assert profile.reads == ()
    # What lies there can still be read.
    assert len(probe_disk(read_disk(mount), [mount / "filler"], EFFORT).reads) == 2
    assert measure_experts(mount, EXPERTS) == ()
    ask(moei, mount)
    assert files(mount) == before


def test_a_model_on_a_read_only_mount(mount: Path, moei: Moei) -> None:
    (mount / "weights.safetensors").write_bytes(os.urandom(9 * MIB))
    read_only(mount)
    before = files(mount)
    facts = read_disk(mount)
    assert facts.read_only
    assert "read-only" in probe_disk(facts, (), EFFORT).note
    assert len(probe_disk(facts, [mount / "weights.safetensors"], EFFORT).reads) == 2
    assert measure_experts(mount, EXPERTS) == ()
    ask(moei, mount)
    assert files(mount) == before
