"""The ledger: written before the run, settled after it, and what a machine learns from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moei_core.config import ExpertBudget
from moei_core.forecast.forecast import Forecast, corrected, forecast, plan_budget
from moei_core.forecast.formats import FORMATS
from moei_core.forecast.ledger import (
    Actual,
    correction,
    entries,
    ledger_path,
    write_actual,
    write_prediction,
)
from moei_core.forecast.shape import ModelShape, bundled_shape
from moei_core.forecast.speed import Speeds
from tests.hardware.fakes import made_profile


def shape() -> ModelShape:
    found = bundled_shape("mixtral-8x7b")
    assert found is not None
    return found


def made(share: float = 0.25, prompt: int = 64) -> Forecast:
    profile = made_profile()
    speeds, form = Speeds.of(profile, profile.disks[0]), FORMATS["bf16"]
    budget = plan_budget(shape(), form, speeds, 1 << 50, 4096, experts=ExpertBudget(fraction=share))
    return forecast(shape(), form, speeds, budget, prompt)


def run(one: Forecast, speed: float, ttft: float, machine: str = "this") -> None:
    """A run that came out so many times as fast, and so many times as long to its first token."""
    identity = write_prediction(machine, shape(), one, "bench")
    write_actual(identity, Actual(one.tokens_per_s.value * speed, one.ttft_s.value * ttft))


def test_a_prediction_is_there_before_its_actual() -> None:
    one = made()
    identity = write_prediction("this", shape(), one, "bench")
    (entry,) = entries()
    assert entry.actual is None
    assert entry.prediction["tokens_per_s"] == one.tokens_per_s.value
    assert entry.prediction["bottleneck"] == "disk"
    write_actual(identity, Actual(1.0, 2.0, 0.5, 0.7, 0.2))
    (entry,) = entries()
    assert entry.actual is not None
    assert (entry.actual["tokens_per_s"], entry.actual["limits"]) == (1.0, ["disk"])
    # A killed run leaves a prediction alone, which teaches nothing.
    write_prediction("this", shape(), one, "bench")
    assert len(entries()) == 2
    assert correction("this", one).runs == 1


@pytest.mark.parametrize(
    ("stall", "experts", "expected"),
    [(0.6, 0.3, ("disk",)), (0.1, 0.6, ("experts",)), (0.2, 0.3, ("rest",)), (0.45, 0.14, ("disk", "rest"))],
)
def test_the_actual_bottleneck_is_the_largest_part(
    stall: float, experts: float, expected: tuple[str, ...]
) -> None:
    assert Actual(1.0, 1.0, 0.5, stall, experts).limits == expected
    assert Actual(1.0, 1.0, 0.5, stall, experts, 0.0).limits == expected
    assert Actual(1.0, 1.0, 0.5, 0.1, 0.2, 0.6).limits == ("gpu",)
    assert Actual(1.0, None).limits == ()


def test_nothing_is_learned_from_nothing() -> None:
    assert correction("this", made()) == correction("other", made())
    assert correction("this", made()).decode == 1.0


def test_a_machine_that_is_always_slower_is_learned() -> None:
    one = made()
    run(one, 0.8, 1.5)
    first = correction("this", one)
    # One run counts against two of doubt: a third of the way, on a logarithmic scale.
    assert first.decode == pytest.approx((1 / 0.8) ** (1 / 3))
    assert first.ttft == pytest.approx(1.5 ** (1 / 3))
    for _ in range(30):
        run(one, 0.8, 1.5)
    learned = correction("this", one)
    assert learned.decode == pytest.approx(1 / 0.8, rel=0.03)
    shown = corrected(one, learned.decode, learned.ttft)
    assert shown.tokens_per_s.value == pytest.approx(one.tokens_per_s.value * 0.8, rel=0.03)
    assert shown.ttft_s.value == pytest.approx(one.ttft_s.value * 1.5, rel=0.05)
    assert correction("another machine", one).decode == 1.0
    ledger_path().unlink()
    assert correction("this", one).runs == 0


def test_other_bottlenecks_and_scales_teach_little() -> None:
    disk, resident = made(0.25), made(1.0)
    assert (disk.decode.bottleneck, resident.decode.bottleneck) == ("disk", "experts")
    run(disk, 0.5, 1.0)
    assert correction("this", resident).decode == 1.0
    far = replace(disk, tokens_per_s=replace(disk.tokens_per_s, value=disk.tokens_per_s.value * 100))
    assert 1.0 < correction("this", far).decode < 1.05


def test_one_wild_run_does_not_ruin_it() -> None:
    one = made()
    run(one, 1e-6, 1e6)
    assert correction("this", one).decode < 1.5
    assert correction("this", one).ttft < 1.5


def test_damaged_lines_are_passed_over() -> None:
    one = made()
    run(one, 0.8, 1.0)
    before = correction("this", one)
    with ledger_path().open("a") as file:
        file.write("{half a li\n[]\n" + json.dumps({"prediction": "x"}) + "\n")
        file.write(json.dumps({"actual": "x", "tokens_per_s": "fast"}) + "\n")
    assert correction("this", one) == before


def test_a_read_only_home_only_loses_the_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEI_HOME", "/proc/self/nowhere")
    run(made(), 1.0, 1.0)
    assert entries() == []


def test_the_ledger_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from moei_core.forecast import ledger

    monkeypatch.setattr(ledger, "_LONGEST_FILE", 4000)
    for _ in range(30):
        run(made(), 1.0, 1.0)
    assert ledger_path().stat().st_size < 8000
    assert entries()
