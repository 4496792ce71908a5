"""What the command line says about a GPU, with a stand-in for one, and without any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from moei_cli import measured_machine, render
from moei_cli.commands.chat import _report
from moei_cli.device_options import device_sentence, device_settings
from moei_cli.forecasts import actual_of, predict
from moei_cli.main import app
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.devices import CpuDevice
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.errors import UsageError
from moei_core.forecast.ledger import entries
from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.probe.gpu import probe_gpu
from moei_core.hub.resolve import resolve_model
from tests.hardware.fakes import FakeGpu, made_profile


def test_statistics_name_both_tiers(capsys: pytest.CaptureFixture[str]) -> None:
    files = resolve_model("moei-demo")
    with LoadedModel(files.folder, LoadOptions(experts=ExpertBudget(fraction=0.25)), CpuDevice()) as model:
        session = ChatSession(model, GenerationSettings(max_new_tokens=8, temperature=0))
        pieces = list(session.reply("What does moei do?"))
        assert session.report is not None
        told = _report(session, files, pieces)
        assert told["device"]["copies"] == model.runtime.statistics.copies > 0
        assert told["device_budget"]["resident"] == 128
        assert "hits on the GPU" in render.status_line(session.report, 1 << 30)
        render.statistics(session)
        shown = " ".join(capsys.readouterr().err.split())
        assert "on the GPU" in shown and f"{model.runtime.statistics.copies} copied" in shown
        sentence = device_sentence(model)
        assert sentence is not None and "holds 128 of 128 experts" in sentence


def test_a_run_with_a_gpu_is_forecast_too_if_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = made_profile()
    facts = GpuFacts(0, "A Board", "GPU-1", 8 << 30, 6 << 30, 0, (8, 6), 4, 16, False)
    gpus = (probe_gpu(facts, lambda index: FakeGpu()),)
    files = resolve_model("moei-demo")
    with LoadedModel(files.folder, LoadOptions(experts=ExpertBudget(fraction=0.25)), CpuDevice()) as model:
        monkeypatch.setattr(measured_machine, "stored_profile", lambda folders=(): profile)
        assert predict(model, files, 16, "chat") is None
        monkeypatch.setattr(
            measured_machine, "stored_profile", lambda folders=(): replace(profile, gpus=gpus)
        )
        found = predict(model, files, 16, "chat")
        assert found is not None and found.one.gpu is not None
        assert found.one.gpu.budget.resident == 128 and found.one.decode.gpu > 0
        session = ChatSession(model, GenerationSettings(max_new_tokens=12, temperature=0))
        list(session.reply("What does moei do?"))
        assert session.report is not None
        actual = actual_of(session.report, model)
        assert actual.gpu_share is not None and 0 < actual.gpu_share < 1
        found.settle(actual)
        assert entries()[-1].actual is not None and "came" in found.beside


def test_without_a_gpu_nothing_is_said_and_no_option_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions()) as model:
        assert device_sentence(model) is None
        session = ChatSession(model, GenerationSettings(max_new_tokens=2, temperature=0))
        list(session.reply("Hello"))
        assert session.report is not None and session.report.as_dict()["device"] is None
        assert "gpu" not in session.report.time_split
        render.statistics(session)
        assert "GPU" not in capsys.readouterr().err
    done = CliRunner().invoke(app, ["chat", "moei-demo", "Hello", "--vram", "1GiB"])
    assert isinstance(done.exception, UsageError) and "--vram needs a GPU" in str(done.exception)
    with pytest.raises(UsageError, match="--vram"):
        device_settings(None, "much", None)
