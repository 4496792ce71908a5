"""GPUs through faked NVML answers, and their speeds through a faked device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moei_core.hardware.gpus import read_gpus, visible_gpus
from moei_core.hardware.probe.gpu import EXPERT_SIZES, probe_gpu, torch_gpu
from tests.hardware.fakes import GIB, FakeGpu, FakeNvml, NVMLError, NVMLError_LibraryNotFound

BOARD = {
    "name": b"A Board",
    "uuid": "GPU-1",
    "memory": (8 * GIB, 6 * GIB),
    "processes": [(1, GIB), (77, GIB // 2)],
    "capability": (8, 6),
    "pcie": (4, 16),
}


def test_two_gpus() -> None:
    nvml = FakeNvml([BOARD, BOARD | {"name": "Another", "processes": []}])
    gpus, notes = read_gpus(nvml, own_pid=77)
    assert [gpu.name for gpu in gpus] == ["A Board", "Another"]
    first = gpus[0]
    assert (first.total, first.free, first.used_by_others) == (8 * GIB, 6 * GIB, GIB)
    assert (first.capability, first.pcie_generation, first.pcie_width, first.mig) == ((8, 6), 4, 16, False)
    assert notes == []
    assert nvml.open == 0


def test_no_gpu_and_no_bindings() -> None:
    assert read_gpus(FakeNvml([], NVMLError_LibraryNotFound("NVML Shared Library Not Found")), 1) == ([], [])
    gpus, notes = read_gpus(None, 1)
    assert gpus == []
    assert "not installed" in notes[0]


def test_a_broken_nvml_is_a_note() -> None:
    gpus, notes = read_gpus(FakeNvml([], NVMLError("Driver/library version mismatch")), 1)
    assert gpus == []
    assert notes == ["NVML does not start: Driver/library version mismatch."]


def test_a_lost_gpu_does_not_hide_the_other() -> None:
    gpus, notes = read_gpus(FakeNvml([{"lost": True}, BOARD]), 1)
    assert [gpu.index for gpu in gpus] == [1]
    assert notes == ["GPU 0 does not answer: GPU is lost."]


def test_questions_without_answers_are_none() -> None:
    (gpu,), _ = read_gpus(FakeNvml([{"name": "Quiet"}]), 1)
    assert gpu.name == "Quiet"
    assert (gpu.total, gpu.free, gpu.used_by_others, gpu.capability, gpu.pcie_width) == (None,) * 5


def test_processes_without_memory_are_not_counted_as_nothing() -> None:
    (gpu,), _ = read_gpus(FakeNvml([BOARD | {"processes": [(5, None)]}]), 1)
    assert gpu.used_by_others is None


def test_mig_slices_stand_for_their_board() -> None:
    part = {"name": "A Board MIG 1g", "uuid": "MIG-1", "memory": (GIB, GIB)}
    gpus, notes = read_gpus(FakeNvml([BOARD | {"slices": [part, part | {"uuid": "MIG-2"}]}]), 1)
    assert [(gpu.uuid, gpu.total, gpu.mig) for gpu in gpus] == [("MIG-1", GIB, True), ("MIG-2", GIB, True)]
    assert gpus[0].pcie_width == 16
    assert notes == []
    gpus, notes = read_gpus(FakeNvml([BOARD | {"slices": []}]), 1)
    assert gpus == []
    assert "MIG mode" in notes[0]


def test_an_old_binding_without_mig() -> None:
    class Old(FakeNvml):
        nvmlDeviceGetMigMode = None  # type: ignore[assignment]

    gpus, _ = read_gpus(Old([BOARD]), 1)
    assert len(gpus) == 1


def test_speeds_of_a_gpu() -> None:
    (facts,), _ = read_gpus(FakeNvml([BOARD]), 1)
    profile = probe_gpu(facts, lambda index: FakeGpu())
    assert [copy.nbytes for copy in profile.copies] == list(EXPERT_SIZES)
    assert all(copy.pinned.value == pytest.approx(12e9) for copy in profile.copies)
    assert all(copy.pageable.value == pytest.approx(6e9) for copy in profile.copies)
    assert profile.bandwidth is not None
    assert profile.bandwidth.value == pytest.approx(300e9)
    assert profile.launch is not None
    assert profile.launch.value == pytest.approx(8e-6)
    assert profile.read_back is not None
    assert profile.read_back.value == pytest.approx(20e-6)
    assert profile.note == ""


def test_a_full_gpu_is_copied_to_in_small_blocks() -> None:
    (facts,), _ = read_gpus(FakeNvml([BOARD | {"memory": (8 * GIB, 10 << 20)}]), 1)
    assert [copy.nbytes for copy in probe_gpu(facts, lambda index: FakeGpu()).copies] == [1 << 20, 4 << 20]


def test_a_gpu_that_fails_has_a_note() -> None:
    (facts,), _ = read_gpus(FakeNvml([BOARD]), 1)

    class Dying(FakeGpu):
        def read(self, nbytes: int) -> float:
            raise RuntimeError("CUDA error: an illegal\nmemory access")

    assert probe_gpu(facts, lambda index: Dying()).note == "CUDA error: an illegal memory access"


def test_torch_without_cuda_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (facts,), _ = read_gpus(FakeNvml([BOARD]), 1)
    assert "no CUDA" in probe_gpu(facts, torch_gpu).note


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("1, 7, 0", [1]),
        ("GPU-b", [1]),
        ("GPU-bb-2,0", [1, 0]),
        ("GPU-", []),
        ("0,0", []),
        ("MIG-c", [2]),
    ],
)
def test_what_cuda_shows(setting: str | None, seen: list[int]) -> None:
    boards = [BOARD | {"uuid": "GPU-aa-1"}, BOARD | {"uuid": "GPU-bb-2"}, BOARD | {"uuid": "MIG-cc-3"}]
    gpus, _ = read_gpus(FakeNvml(boards), 1)
    assert [gpu.index for gpu in visible_gpus(gpus, setting)] == seen


def test_torch_finds_a_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's second is torch's first."""
    from moei_core.hardware.probe import gpu as probe

    uuids, opened = ["bb-2", "aa-1"], []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    monkeypatch.setattr(probe, "TorchGpu", lambda index: opened.append(index))
    gpus, _ = read_gpus(FakeNvml([BOARD | {"uuid": "GPU-aa-1"}, BOARD | {"uuid": "GPU-bb-2"}]), 1)
    torch_gpu(gpus[1])
    torch_gpu(gpus[0])
    assert opened == [0, 1]
    (other,), _ = read_gpus(FakeNvml([BOARD | {"uuid": "GPU-cc-3"}]), 1)
    with pytest.raises(RuntimeError, match="does not see it"):
        torch_gpu(other)
