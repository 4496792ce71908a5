"""Peak memory, measured from outside, with a gigabyte of experts: dense + slots + in flight, and --ram is hard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.large_model import save_large

MIB = 1 << 20
# A child's high-water mark starts at its parent's size, so the parent must be small: not this process.
LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
CODE = "from moei_cli.main import main; main()"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_large(tmp_path_factory.mktemp("large"))


def measure(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """(the kernel's count of the process's peak memory in bytes, the report that it printed)."""
    command = [
        sys.executable,
        "-c",
        CODE,
        "chat",
        str(folder),
        "hello, who are you?",
        "--json",
        "--max-tokens",
        "8",
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command, *options], check=True, capture_output=True
    )
    return int(done.stderr.split()[-1]) << 10, json.loads(done.stdout)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What the same program needs with a model that weighs nothing."""
    from tests.tiny_models import save_chat

    return measure(save_chat("mixtral", tmp_path_factory.mktemp("light")))[0]


@pytest.mark.parametrize("share", ["6.25%", "25%", "50%"])
def test_peak_memory_is_dense_and_slots(large: Path, baseline: int, share: str) -> None:
    peak, report = measure(large, "--experts", share)
    assert report["experts"]["expert_bytes"] > 1e9
    assert report["bytes_read"] > report["experts"]["slots_bytes"]
    expected = baseline + report["dense_bytes"] + report["experts"]["slots_bytes"]
    assert expected - 30 * MIB < peak < expected + 60 * MIB
    assert report["peak_memory_bytes"] == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("ram_mib", [700, 1000])
def test_ram_is_a_hard_bound_that_is_used(large: Path, ram_mib: int) -> None:
    peak, report = measure(large, "--ram", f"{ram_mib}MiB", "--context", "1024")
    assert peak <= ram_mib * MIB
    assert report["experts"]["slots"] < report["experts"]["total"]
    # Hard, but not wasteful: with slots full it would come near the bound.
    unused = (report["experts"]["slots"] - report["experts"]["resident"]) * report["experts"]["slot_bytes"]
    assert peak + unused > 0.75 * ram_mib * MIB
