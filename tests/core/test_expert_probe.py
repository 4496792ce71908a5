"""The probe of experts: that it computes what it says, leaves nothing behind, and fails quietly."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moei_core.engine import expert_probe
from moei_core.engine.expert_probe import Geometry, ProbeEffort, expert_nbytes, measure_experts
from moei_core.engine.runtime import ExpertRuntime

SMALL = ProbeEffort(0.0, 4 << 20, (Geometry(64, 32, 2), Geometry(128, 64, 4)), ("BF16", "Q4_0"), (4, 16))


def test_every_setting_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    run = ExpertRuntime.run_layer

    def watched(
        self: ExpertRuntime, module: object, layer: int, hidden: object, index: object, *rest: object
    ):  # type: ignore[no-untyped-def]
        shapes.append((*index.shape, int(index.unique().numel())))  # type: ignore[attr-defined]
        return run(self, module, layer, hidden, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertRuntime, "run_layer", watched)
    found = measure_experts(tmp_path, SMALL)
    assert [(one.format, one.nbytes, one.tokens) for one in found] == [
        (form.lower(), expert_nbytes(geometry, form), tokens)
        for geometry in SMALL.geometries
        for form in SMALL.formats
        for tokens in (1, 4, 16)
    ]
    assert expert_nbytes(Geometry(64, 32, 2), "Q4_0") == 3 * 64 * 32 // 32 * 18
    assert all(one.resident > 0 and one.arriving > 0 for one in found)
    # One token of top-2 and top-4, and prompts in which each of 32 experts has 4 or 16 tokens.
    assert {(1, 2, 2), (1, 4, 4), (64, 2, 32), (256, 2, 32), (32, 4, 32), (128, 4, 32)} <= set(shapes)
    assert list(tmp_path.iterdir()) == []


def test_resident_experts_are_never_read_and_others_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: dict[bool, int] = {}
    close = expert_probe._Layer.close

    def counted(self: expert_probe._Layer) -> None:
        count = self._runtime.statistics.loads
        waited[self._runtime._scheduler.resident_count > 0] = count
        close(self)

    monkeypatch.setattr(expert_probe._Layer, "close", counted)
    effort = ProbeEffort(0.0, 1 << 20, (Geometry(64, 32, 2),), ("BF16",), (4,))
    measure_experts(tmp_path, effort)
    count = (1 << 20) // (expert_nbytes(Geometry(64, 32, 2), "BF16") + 4096)
    assert waited[True] == count
    # The first round, then at least three accesses of each kind.
    assert waited[False] >= 32 + 3 * 2 + 3 * 32


def test_experts_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    huge = ProbeEffort(0.0, 1 << 20, (Geometry(1024, 1024, 2),), ("BF16",), (4,))
    assert measure_experts(tmp_path, huge) == ()


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_where_no_file_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int) -> None:
    def refused(folder: Path) -> int:
        raise OSError(failure, "no")

    monkeypatch.setattr(expert_probe, "nameless_file", refused)
    assert measure_experts(tmp_path, SMALL) == ()


KILLED = """
import sys
from pathlib import Path
from moei_core.engine.expert_probe import Geometry, ProbeEffort, measure_experts
print("begins", flush=True)
measure_experts(Path(sys.argv[1]), ProbeEffort(60.0, 1 << 20, (Geometry(64, 32, 2),), ("BF16",), (4,)))
"""


def test_killed_half_way_it_leaves_no_file(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begins\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []
