"""A wheel built from the tree, in an empty environment where no compiler can be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def test_the_wheel_works_without_a_compiler(tmp_path: Path) -> None:
    def run(*command: str | Path, **environment: str) -> str:
        env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
        done = subprocess.run(list(map(str, command)), env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("moei-*.whl")
    assert wheel.stat().st_size < 15e6
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    bare = {"PATH": str(python.parent), "CC": "/bin/false", "CXX": "/bin/false"}
    moei = python.parent / "moei"
    assert "chat" in run(moei, "--help", **bare)
    assert (
        "expert" in run(moei, "chat", "moei-demo", "What does moei do?", "--temperature", "0", **bare).lower()
    )
    kernels = "from moei_core.quant import native; print(native.available())"
    assert run(python, "-c", kernels, **bare).strip() == "True", "the kernels are part of the wheel"
    home = {**bare, "MOEI_HOME": str(tmp_path / "home")}
    run(moei, "quantize", "moei-demo", "q4_0", **home)
    told = run(moei, "chat", "moei-demo:q4_0", "What does moei do?", "--temperature", "0", "--json", **home)
    assert "expert" in json.loads(told)["answer"].lower()
