"""``moei plan``, ``moei show --settings`` and predictions beside actuals, on a machine of round numbers."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moei_cli import measured_machine
from moei_core.forecast.ledger import entries
from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.probe.gpu import probe_gpu
from moei_core.hub.aliases import aliases
from tests.cli.conftest import Outcome
from tests.hardware.fakes import FakeGpu, exactly, made_profile

Moei = Callable[..., Outcome]
GPU = GpuFacts(0, "A Board", "GPU-1", 8 << 30, 6 << 30, 0, (8, 6), 4, 16, False)
SMALL = ("--prompt-tokens", "8", "--new-tokens", "10", "--repeats", "1")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine was measured, and free memory stands still."""
    from moei_cli import planner, settings_view
    from moei_core.hardware.system import MemoryFacts

    profile = made_profile()
    monkeypatch.setattr(measured_machine, "stored_profile", lambda folders=(): profile)
    facts = MemoryFacts(24 << 30, 20 << 30, 0, 0, None)
    monkeypatch.setattr(planner, "read_memory", lambda: facts)
    monkeypatch.setattr(settings_view, "read_memory", lambda: facts)
    monkeypatch.setattr(settings_view, "stored_profile", lambda: profile)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        pytest.fail("used the network")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.parametrize("name", aliases())
def test_every_alias_is_planned_without_a_network(
    name: str, moei: Moei, measured: None, no_network: None
) -> None:
    done = moei("plan", name, "--json")
    report = json.loads(done.out)
    runs = any(one["fits"] and not one["disk_problem"] for one in report["formats"])
    assert done.code == (0 if runs else 4)
    assert report["shape"]["moe_layers"] == aliases()[name].layers
    assert {one["format"] for one in report["formats"]} >= {aliases()[name].format}
    for one in report["formats"]:
        if one["fits"]:
            speed, first = one["tokens_per_s"], one["ttft_s"]
            assert 0 < speed["low"] < speed["value"] < speed["high"]
            assert 0 < first["low"] < first["value"] < first["high"]
            assert {"disk", "experts", "rest"} >= set(one["limits"])
        else:
            assert len(one["problem"]) in (2, 3)
    shown = moei("plan", name)
    assert shown.code == done.code
    assert "\x1b" not in shown.out


def test_a_plan_shows_tiers_account_speed_and_what_would_help(moei: Moei, measured: None) -> None:
    shown = moei("plan", "mixtral-8x7b").out
    assert "RAM   #" in shown
    assert "of experts on disk only" in shown
    assert "left to the system" in shown
    assert "limited by waiting for missing experts from disk" in shown
    assert "+16 GB RAM" in shown
    assert "q4_0 instead of bf16" in shown
    report = json.loads(moei("plan", "mixtral-8x7b", "--json").out)
    budget = {line["name"]: line["nbytes"] for line in report["budget"]}
    assert sum(budget.values()) <= 20 << 30
    assert budget["dense weights"] == report["shape"]["dense_bytes"]


def test_flags_win_and_too_small_is_a_row_with_its_reason(moei: Moei, measured: None) -> None:
    report = json.loads(moei("plan", "mixtral-8x7b", "--format", "q4_0", "--experts", "50%", "--json").out)
    assert report["plan"]["format"] == "q4_0"
    assert report["plan"]["experts_resident"] == 126
    small = json.loads(moei("plan", "mixtral-8x7b", "--ram", "3GiB", "--json").out)
    assert not small["plan"]["fits"]
    assert "smallest that works" in small["plan"]["problem"][2]
    # The answer is shown either way; scripts learn it from the exit code.
    for arguments, code in (
        (["--ram", "3GiB"], 4),
        (["--ram", "3GiB", "--format", "q4_0"], 4),
        (["--ram", "5GiB"], 0),
        (["--ram", "5GiB", "--format", "bf16"], 4),
    ):
        done = moei("plan", "mixtral-8x7b", *arguments)
        assert (done.code, "does not fit" in done.out) == (code, True)


def test_lengths_follow_each_other_and_the_model(moei: Moei, measured: None) -> None:
    for arguments, context, prompt in (
        ([], 4096, 1024),
        (["--context", "64"], 64, 64),
        (["--prompt-tokens", "8000"], 8000, 8000),
        (["--context", "20000", "--prompt-tokens", "10"], 20000, 10),
    ):
        report = json.loads(moei("plan", "mixtral-8x7b", *arguments, "--json").out)
        assert report["prompt_tokens"] == prompt
        assert {line["name"]: line["reason"] for line in report["budget"]}["context"].endswith(
            f" {context} tokens"
        )


def test_more_ram_than_there_is_is_told(moei: Moei, measured: None) -> None:
    assert "are free now" not in moei("plan", "mixtral-8x7b", "--ram", "12GiB").err
    assert "are free now" in moei("plan", "mixtral-8x7b", "--ram", "100GiB").err
    assert "--experts 0.8% of" in moei("plan", "mixtral-8x7b", "--experts", "0.8%").out


@pytest.fixture
def with_gpu(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured machine has a GPU of 6 GB free memory."""
    profile = measured_machine.stored_profile()
    assert profile is not None
    more = replace(profile, gpus=(probe_gpu(GPU, lambda index: FakeGpu()),))
    monkeypatch.setattr(measured_machine, "stored_profile", lambda folders=(): more)


def test_with_a_gpu_the_plan_has_its_memory_and_its_speed(moei: Moei, with_gpu: None) -> None:
    shown = moei("plan", "qwen3-30b-a3b", "--format", "q4_0")
    assert "VRAM  #" in shown.out
    assert "GPU dense weights" in shown.out
    assert "compared with the simulator only" in shown.err
    both, alone = (
        json.loads(moei("plan", "qwen3-30b-a3b", "--format", "q4_0", "--json", *more).out)["plan"]
        for more in ((), ("--device", "cpu"))
    )
    assert both["experts_on_gpu"] > 0 == alone["experts_on_gpu"]
    assert both["tokens_per_s"]["value"] > alone["tokens_per_s"]["value"]
    less = json.loads(moei("plan", "qwen3-30b-a3b", "--format", "q4_0", "--vram", "5GiB", "--json").out)[
        "plan"
    ]
    assert 0 < less["experts_on_gpu"] < both["experts_on_gpu"]


def test_a_gpu_that_is_too_small_is_passed_over_unless_it_was_asked_for(moei: Moei, with_gpu: None) -> None:
    without = moei("plan", "glm-4.5-air")
    assert "VRAM  #" not in without.out
    assert "The GPU is not used" in without.err
    asked = moei("plan", "glm-4.5-air", "--vram", "5GiB", "--format", "q4_0")
    assert "smallest that works is --vram" in asked.out


def test_comparing_ranks_by_speed_and_marks_the_model(moei: Moei, measured: None) -> None:
    report = json.loads(moei("plan", "qwen3-30b-a3b", "--compare", "--json").out)
    speeds = [one["tokens_per_s"]["value"] for one in report["ranking"] if one["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    assert {one["model"] for one in report["ranking"]} > {"qwen3-30b-a3b", "olmoe-1b-7b"}
    one = json.loads(moei("plan", "qwen3-30b-a3b", "--compare", "--format", "q8_0", "--json").out)
    assert {row["format"] for row in one["ranking"]} == {"q8_0"}
    assert len(one["ranking"]) > 5
    shown = moei("plan", "qwen3-30b-a3b", "--compare").out
    assert sum(line.startswith("*") for line in shown.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["plan", "mixtrall"], 3, "Did you mean"),
        (["plan", "mixtral-8x7b", "--format", "q3_x"], 2, "There are: f32"),
        (["plan", "mixtral-8x7b", "--format", "f32", "--compare"], 2, "Leave --format out"),
        (["plan", "mixtral-8x7b", "--ram", "much"], 2, "--ram"),
        (["plan", "mixtral-8x7b", "--context", "99999999"], 2, "16 to 32768 tokens"),
        (["plan", "mixtral-8x7b", "--device", "gpu"], 2, "Choose from: auto"),
        (["plan", "mixtral-8x7b", "--device", "cuda"], 2, "needs a GPU that was measured"),
        (["plan", "mixtral-8x7b", "--vram", "8GiB"], 2, "needs a GPU that was measured"),
        (["plan", "mixtral-8x7b", "--prompt-tokens", "40000"], 2, "up to 32768 tokens"),
        (
            ["plan", "mixtral-8x7b", "--context", "100", "--prompt-tokens", "200"],
            2,
            "does not fit --context 100",
        ),
        (["show", "mixtral-8x7b", "--ram", "8GiB"], 2, "belong to --settings"),
        (["show", "mixtral-8x7b", "--settings", "--ram", "2GiB"], 4, "smallest that works"),
    ],
)
def test_mistakes(moei: Moei, measured: None, arguments: list[str], code: int, sentence: str) -> None:
    done = moei(*arguments)
    assert done.code == code
    assert sentence in done.err


def test_settings_say_where_they_come_from(moei: Moei, measured: None) -> None:
    shown = moei("show", "mixtral-8x7b", "--settings", "--ram", "12GiB").out
    assert "--ram" in shown
    assert "automatic: the model's, at most 4096" in shown
    report = json.loads(moei("show", "mixtral-8x7b", "--settings", "--json").out)
    assert report["settings"]["ram"]["reason"].startswith("automatic")
    assert [line["name"] for line in report["budget"]][-1] == "expert slots"
    assert sum(line["nbytes"] for line in report["budget"]) <= report["limit_bytes"]


def test_a_bench_sets_its_prediction_beside_what_came(
    moei: Moei, chat_folder: Callable[..., Path], measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moei_core.engine import measure

    seen = []
    requests = measure.measure_requests

    def watched(*arguments: object) -> object:
        seen.append([entry.actual for entry in entries()])
        return requests(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "measure_requests", watched)
    folder = str(chat_folder("qwen3_moe"))
    report = json.loads(moei("bench", folder, "--experts", "50%", *SMALL, "--json").out)
    # Written before the run, settled after it.
    assert seen == [[None]]
    prediction, (entry,) = report["prediction"], entries()
    assert entry.actual is not None
    came = report["conditions"]["changing"]["decode_tokens_per_s"]["median"]
    assert prediction["actual"]["tokens_per_s"] == came == entry.actual["tokens_per_s"]
    expected = prediction["tokens_per_s"]["value"]
    assert prediction["error"]["tokens_per_s"] == pytest.approx(expected / came - 1)
    assert 1 <= len(prediction["actual"]["limits"]) <= 2
    shares = prediction["actual"]["stall_share"] + prediction["actual"]["expert_share"]
    assert 0 < shares < 1
    shown = moei("bench", folder, "--experts", "50%", *SMALL)
    assert "before the run" in shown.out
    assert "with 1 runs learned" in shown.out


def test_a_prediction_looks_at_the_disk_of_a_large_model_once_more_for_its_first_prompt(
    moei: Moei, chat_folder: Callable[..., Path], measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moei_cli import forecasts
    from moei_core.hardware.probe import reads

    monkeypatch.setattr(forecasts, "_LEAST_NBYTES", 0)
    asked: list[tuple[str, int]] = []
    speeds = iter((1e9, 1e5))

    def again(file: Path, nbytes: int, seconds: float) -> object:
        asked.append((file.name, nbytes))
        even = exactly(next(speeds))
        return replace(made_profile().disks[0].experts[0], nbytes=nbytes, bandwidth=even), None

    monkeypatch.setattr(reads, "read_again", again)
    folder = str(chat_folder("qwen3_moe"))
    fast, slow = (
        json.loads(moei("bench", folder, "--experts", "50%", *SMALL, "--json").out)["prediction"]
        for _ in range(2)
    )
    assert len(asked) == 2 and all(name.endswith(".safetensors") for name, _ in asked)
    waiting = [one["prefill_parts_s"]["disk"] for one in (fast, slow)]
    assert waiting[1] > 100 * waiting[0]
    assert fast["decode_parts_s"] == slow["decode_parts_s"], "replies have the disk as it was measured"


def test_an_answer_is_predicted_too(moei: Moei, measured: None) -> None:
    question = "What is an expert?"
    report = json.loads(moei("chat", "moei-demo", question, "--json").out)
    assert report["prediction"]["actual"]["ttft_s"] == pytest.approx(report["ttft_s"], abs=1e-3)
    assert entries()[0].prediction["prompt_tokens"] == report["prompt_tokens"]
    assert report["experts"]["budget"][-1]["name"] == "expert slots"
    shown = moei("chat", "moei-demo", question)
    assert "Expected" in shown.err
    assert "tokens/s" in shown.err
    # And afterwards what came of it, as far as one answer tells.
    told = shown.err.splitlines()[-1]
    assert told.startswith("Forecast") and "; first token forecast after" in told and "; came" in told


def test_large_and_small_figures_have_no_exponent() -> None:
    from moei_cli.forecasts import short

    assert [short(value) for value in (312.4, 9.96, 10.0, 0.123, 4321.0)] == [
        "312",
        "10",
        "10",
        "0.12",
        "4321",
    ]
    assert [short(value, 3) for value in (312.4, 99.96, 4.567)] == ["312", "100", "4.57"]


def test_without_a_measured_machine_nothing_is_promised(moei: Moei, chat_folder: Callable[..., Path]) -> None:
    done = moei("bench", str(chat_folder("qwen3_moe")), *SMALL, "--json")
    assert json.loads(done.out)["prediction"] is None
    assert "moei profile-hardware" in moei("bench", str(chat_folder("qwen3_moe")), *SMALL).err


def test_a_refused_budget_names_the_speed_of_the_smallest(
    moei: Moei, chat_folder: Callable[..., Path], measured: None
) -> None:
    folder = str(chat_folder("qwen3_moe"))
    for command in (
        ("bench", folder, "--experts", "1%", *SMALL),
        ("chat", folder, "hello", "--experts", "1%"),
        ("show", "mixtral-8x7b", "--settings", "--experts", "0.1%"),
        ("show", "mixtral-8x7b", "--settings", "--ram", "1GiB"),
    ):
        done = moei(*command)
        assert done.code == 4
        assert "The smallest that works is" in done.err
        assert "It would decode about" in done.err
        assert len(done.err.strip().splitlines()) == 3
    planned = json.loads(moei("plan", "mixtral-8x7b", "--ram", "1GiB", "--json").out)
    assert all("It would decode about" in one["problem"][2] for one in planned["formats"])
