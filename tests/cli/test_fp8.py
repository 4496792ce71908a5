"""A checkpoint in FP8 from the command line: refused as it is, with what to do; packed, it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moei_cli import measured_machine
from tests.cli.conftest import Outcome
from tests.fp8_checkpoint import save_fp8
from tests.hardware.fakes import made_profile

Moei = Callable[..., Outcome]
GREEDY = ("--temperature", "0", "--max-tokens", "8")


def test_it_runs_once_it_is_packed(moei: Moei, tmp_path: Path) -> None:
    folder = str(save_fp8(tmp_path / "m"))
    refused = moei("chat", folder, "Hello", *GREEDY)
    assert refused.code == 1
    assert "published in FP8" in refused.err and "moei quantize" in refused.err
    assert "pack it first" in moei("show", folder).out
    packed = moei("quantize", folder, "q8_0", "--json")
    assert packed.code == 0, packed.err
    done = moei("chat", json.loads(packed.out)["model"], "Hello", *GREEDY)
    assert done.code == 0, done.err
    assert done.out.strip()


def test_a_plan_is_about_what_can_run(moei: Moei, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = made_profile()
    monkeypatch.setattr(measured_machine, "stored_profile", lambda folders=(): profile)
    report = json.loads(moei("plan", "minimax-m2", "--json").out)
    assert report["plan"]["format"] == "q8_0"
    rows = {one["format"]: one for one in report["formats"]}
    assert set(rows) == {"fp8", "q8_0", "q4_0"}
    assert not rows["fp8"]["fits"] and rows["fp8"]["problem"][0] == "fp8 runs once it is packed."
    assert "not as it is" in moei("plan", "minimax-m2").out
    assert moei("plan", "minimax-m2", "--format", "fp8").code == 4
