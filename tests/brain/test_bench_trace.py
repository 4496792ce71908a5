"""``moei bench --trace`` and ``moei trace show`` as a person meets them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moei_cli.main import main
from moei_core.hub.library import describe
from moei_core.trace import TraceEvent, read_trace, write_trace

from .synthetic import make_trace


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("traces") / "t.safetensors"
    write_trace(make_trace(), file)
    return str(file)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as exit:
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_report_is_one_json_object(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys,
        "bench",
        "--trace",
        path,
        "--policy",
        "layer-lru,learned,layer-belady",
        "--experts",
        "25%,20MB",
        "--workers",
        "1",
        "--interleave",
        "1,2",
        "--json",
    )
    assert code == 0
    report = json.loads(out)
    assert len(report["results"]) == 2 * 2 * 3
    first = {row["policy"]: row for row in report["results"][:3]}
    assert first["layer-lru"]["gap_closed"] == 0
    assert first["layer-belady"]["gap_closed"] == 1
    assert set(first["learned"]["gap_closed_by_task"]) == {"task0", "task1"}
    assert first["learned"]["hits"] + first["learned"]["misses"] == 240 * 4 * 3
    assert report["hardware"]["name"] == "gpu-pcie4"


def test_an_expert_is_as_large_as_that_of_the_model_which_the_trace_names(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, nbytes, why in (
        ("moei-demo", describe("moei-demo")[0].summary.expert_nbytes, "as moei-demo has it"),  # type: ignore[union-attr]
        ("nobody/nothing", 4_000_000, "the model is not known; set --expert-size"),
    ):
        named = tmp_path / "named"
        write_trace(replace(read_trace(path), model=model), named)
        _, out, _ = run(
            capsys, "bench", "--trace", str(named), "--experts", "25%", "--workers", "1", "--json"
        )
        report = json.loads(out)
        assert (report["expert_bytes"], report["expert_bytes_reason"]) == (nbytes, why)


def test_the_table_fits_a_pipe(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "bench", "--trace", path, "--experts", "10%,25%", "--workers", "1")
    assert code == 0
    assert "\x1b" not in out + err
    assert "gap closed" in out and "layer-belady" in out
    assert "floods a global LRU" in err


def test_what_if_flags_change_the_machine(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = []
    for extra in ([], ["--disk", "7GB/s", "--ram", "64GiB"]):
        _, out, _ = run(
            capsys,
            "bench",
            "--trace",
            path,
            "--policy",
            "layer-lru",
            "--experts",
            "25%",
            "--workers",
            "1",
            "--json",
            *extra,
        )
        speeds.append(json.loads(out)["results"][0]["tokens_per_second"])
    assert speeds[1] > speeds[0]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["bench"], 2, "needs a model"),
        (["bench", "--trace", "none"], 3, "no trace file"),
        (["bench", "--trace", "PATH", "--policy", "lru"], 2, "Choose from: all, learned"),
        (["bench", "--trace", "PATH", "--experts", "lots"], 2, "is not a size"),
        (["bench", "--trace", "PATH", "--experts", "1kB"], 2, "less than the experts of one token"),
        (["bench", "--trace", "PATH", "--predictor", "oracle"], 2, "Choose from: mixed"),
        (["bench", "--trace", "PATH", "--prefetch", "on"], 2, "nothing to prefetch by"),
        (["bench", "--trace", "PATH", "--half", "third"], 2, "Choose from: all, first, second"),
        (["bench", "--trace", "PATH", "--interleave", "0"], 2, "not a positive number"),
        (["bench", "--trace", "PATH", "--interleave", "\u00b2"], 2, "not a positive number"),
        (["bench", "--trace", "PATH", "--policy", "all,lru"], 2, "there is no 'lru'"),
        (["bench", "--trace", "PATH", "--hardware", "none.json"], 3, "no file"),
        (["bench", "--trace", "PATH", "--hardware", "disk-1g", "--ram", "8GiB"], 2, "no GPU"),
        (["trace", "show", "PATH", "--request", "99"], 2, "not one of 0 to 5"),
    ],
)
def test_errors_are_sentences(
    path: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
) -> None:
    got, out, err = run(capsys, *(path if part == "PATH" else part for part in arguments))
    assert (got, out) == (code, "")
    assert sentence in err
    assert len(err.strip().splitlines()) <= 3


def test_all_policies_may_be_among_others(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    replay = ["bench", "--trace", path, "--experts", "25%", "--workers", "1", "--json", "--sequences", "1"]
    found = []
    for policy in ("all", "learned,all"):
        _, out, _ = run(capsys, *replay, "--policy", policy)
        found.append([row["policy"] for row in json.loads(out)["results"]])
    assert found[0] == found[1]


def test_a_damaged_trace_has_its_own_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert run(capsys, "bench", "--trace", str(file))[0] == 6


def test_show_draws_a_request(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "trace", "show", path, "--request", "1")
    assert code == 0
    lines = out.splitlines()
    assert "overlap with the token so far back" in lines[1]
    assert sum(line.endswith("|") for line in lines) == 4
    assert run(capsys, "trace", "show", path, "--json")[1].startswith("{")


def test_show_tells_what_turns_spent_their_time_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two turns, the second one with a GPU; a part of a later version is passed over."""
    spent = int(TraceEvent.SPENT)
    rows = [(9, 0, 0.5), (9, 10, 0.25), (20, 0, 1), (20, 8, 2), (20, 10, 0.25), (20, 99, 7)]
    events = np.array([(step, spent, part, int(seconds * 1e9)) for step, part, seconds in rows], np.int64)
    file = str(tmp_path / "t.safetensors")
    write_trace(replace(make_trace(), events=events), file)
    turns = json.loads(run(capsys, "trace", "show", file, "--json")[1])["time_split_s"]
    assert turns == [
        {"dense": 0.5, "unexplained": 0.25},
        {"dense": 1.0, "gpu": 2.0, "unexplained": 0.25},
    ]
    out = run(capsys, "trace", "show", file)[1]
    assert "time of 2 turns, 4.00 s  dense: 37.5%  gpu: 50.0%  unexplained: 12.5%" in " ".join(
        out.split("\n")
    )


def test_show_draws_a_picture(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the optional extra 'plots' is not installed")
    picture = tmp_path / "eam.png"
    assert run(capsys, "trace", "show", path, "--png", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
