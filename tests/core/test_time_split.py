"""Where the time of a turn went: each second is put where it was spent, and prefetching is told as shares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.layer_work import LayerWork
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.measure import measure_requests
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.sampling import Sampler
from moei_core.engine.statistics import prefetch_shares, prefetch_verdict
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler, PrefetchStatistics
from moei_core.store.file_store import FileStore

NAP_S = 0.02
PLACES: dict[str, tuple[type, str]] = {
    "decisions": (ExpertScheduler, "access"),
    "experts": (LayerWork, "compute"),
    "moving": (ExpertRuntime, "_ask"),
    "combining": (LayerWork, "total"),
    "sampling": (Sampler, "next_token"),
    "disk": (FileStore, "read_extent"),
    "dense": (nn.Embedding, "forward"),
}


@pytest.mark.parametrize("part", PLACES)
def test_what_takes_longer_shows_in_its_own_part(
    part: str, chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part sleeps in turn, and the clock of that part must see all of it."""
    place, name = PLACES[part]
    original, naps = getattr(place, name), [0]

    def slowly(*arguments: object, **named: object) -> object:
        # Readers are threads of their own: one of them at a time stands for the disk.
        if naps[0] < 10 and (part != "disk" or threading.current_thread().name == "moei-reader-0"):
            naps[0] += 1
            time.sleep(NAP_S)
        return original(*arguments, **named)

    options = LoadOptions(experts=ExpertBudget(fraction=0.3), context=512)
    with LoadedModel(chat_folder("mixtral"), options) as model:
        session = ChatSession(model, GenerationSettings(max_new_tokens=10, temperature=0))
        list(session.reply("hello"))
        monkeypatch.setattr(place, name, slowly)
        list(session.reply("hello again, and more"))
        report = session.report
        assert report is not None
        split = report.time_split
    assert naps[0] > 0
    slept = naps[0] * NAP_S
    # Waiting for the disk is shorter than reading by what was computed meanwhile.
    assert split[part] >= slept * (0.5 if part == "disk" else 1)
    assert split["unexplained"] < 0.5 * slept
    assert set(split) == {*PLACES, "unexplained"}
    assert all(seconds >= 0 for seconds in split.values())


def test_shares_of_prefetching() -> None:
    done = PrefetchStatistics(started=20, useful=6, late=2, wasted=5, cancelled=4)
    # 6 hits came by prefetching, and of 10 misses 2 were on their way: 8 of 16.
    assert prefetch_shares(done, misses=10) == {"coverage": 0.5, "waste": 0.45, "lateness": 0.25}
    assert prefetch_shares(PrefetchStatistics(), 0) == {"coverage": 0.0, "waste": 0.0, "lateness": 0.0}


def test_the_verdict_in_words() -> None:
    def said(mode: PrefetchMode, trials: int = 0, kept: int | None = None, by: str | None = None) -> str:
        controller = SimpleNamespace(mode=mode, trials=trials, kept=kept)
        return prefetch_verdict(SimpleNamespace(controller=controller, prefetching_by=by))  # type: ignore[arg-type]

    assert said(PrefetchMode.OFF) == "off"
    assert said(PrefetchMode.ON) == "on, as asked"
    assert said(PrefetchMode.AUTO) == "off: no trial has ended yet"
    assert said(PrefetchMode.AUTO, 3) == "off: not faster in 3 trials"
    assert said(PrefetchMode.AUTO, 3, 0, "Markov") == "on by Markov, which was faster; 3 trials"


def test_every_report_has_them(chat_folder: Callable[..., Path]) -> None:
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.4), predictor="markov", prefetch=PrefetchMode.ON, context=512
    )
    with LoadedModel(chat_folder("qwen3_moe"), options) as model:
        session = ChatSession(model, GenerationSettings(max_new_tokens=24, temperature=0))
        list(session.reply("a question that needs experts"))
        assert session.report is not None
        told = session.report.as_dict()["prefetch"]
        assert told["started"] >= told["useful"] + told["late"] + told["wasted"] + told["cancelled"] > 0
        assert told["verdict"] == "on, as asked"
        assert told["waste"] == round((told["wasted"] + told["cancelled"]) / told["started"], 4) > 0
        assert 0 < told["coverage"] < 1
        (cold,) = measure_requests(model, 8, 16, 1)["changing"]
        assert 0 < cold.prefetch_coverage < 1 and 0 < cold.prefetch_waste <= 1
