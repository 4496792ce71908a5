"""The kernels' own test program: under sanitizers on every instruction set of this processor, and ARM's emulated."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "native"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.untimed,
    pytest.mark.skipif(not SOURCE.is_dir(), reason="the sources of the kernels are not here"),
]


def tool(*names: str) -> str:
    """The first of these programs that exists, those installed beside Python included."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    pytest.skip(f"{names[0]} is not installed")


def build(folder: Path, *options: str) -> Path:
    cmake = tool("cmake")
    for command in (
        [cmake, "-S", SOURCE, "-B", folder, "-DMOEI_TEST_PROGRAM=ON", "-DCMAKE_BUILD_TYPE=Release", *options],
        [cmake, "--build", folder],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "test_kernels"


def passes(command: list[str | Path], isa: str) -> bool:
    """True if the program passed, False if this instruction set cannot run here."""
    done = subprocess.run(command, env={**os.environ, "MOEI_NATIVE_ISA": isa}, capture_output=True, text=True)
    if "cannot run here" in done.stderr:
        return False
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[0] == isa
    return True


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_under_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    tool("g++", "c++")
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -g"
    program = build(tmp_path, f"-DCMAKE_CXX_FLAGS={flags}", f"-DCMAKE_EXE_LINKER_FLAGS={flags}")
    every = ("portable", "avx2", "avx512", "amx_int8", "neon", "neon-dotprod")
    assert "portable" in [isa for isa in every if passes([program], isa)]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not cross-compiling from here")
def test_arm_under_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64", "qemu-aarch64-static")
    program = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert all(passes([emulator, program], isa) for isa in ("neon", "neon-dotprod"))
