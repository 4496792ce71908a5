"""A gpt-oss as it is published, from the command line: talked to, shown, planned, packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moei_cli import measured_machine
from tests.cli.conftest import Outcome
from tests.hardware.fakes import made_profile
from tests.mxfp4_checkpoint import save_mxfp4

Moei = Callable[..., Outcome]
GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mxfp4(tmp_path_factory.mktemp("gpt-oss-tiny"))


def test_it_runs_as_published_and_packed_and_says_the_same(moei: Moei, folder: Path) -> None:
    published = moei("chat", str(folder), "Hello", *GREEDY)
    assert published.code == 0, published.err
    assert published.out.strip()
    shown = json.loads(moei("show", str(folder), "--json").out)["here"]
    assert [one["format"] for one in shown] == ["mxfp4"]

    packed = moei("quantize", str(folder), "mxfp4", "--json")
    assert packed.code == 0, packed.err
    name = json.loads(packed.out)["model"]
    assert name.endswith(":mxfp4")
    again = moei("chat", str(folder), "Hello", *GREEDY)
    assert again.out == published.out
    shown = json.loads(moei("show", name, "--json").out)["here"]
    assert [one["format"] for one in shown] == ["mxfp4"]


def test_bench_and_plan(moei: Moei, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = made_profile()
    monkeypatch.setattr(measured_machine, "stored_profile", lambda folders=(): profile)
    done = moei("bench", str(folder), "--experts", "50%", "--json")
    assert done.code == 0, done.err
    report = json.loads(moei("plan", str(folder), "--experts", "50%", "--json").out)
    assert report["plan"]["format"] == "mxfp4"


def test_other_formats_are_refused_with_the_right_one(moei: Moei, folder: Path) -> None:
    done = moei("quantize", str(folder), "q4_0")
    assert done.code == 1 and "mxfp4" in done.err
