"""Hours of turns: memory, descriptors and speed stay as they were.

``MOEI_SOAK_MINUTES`` says how long (60). The first and the last sixth are compared.
"""

from __future__ import annotations

import gc
import os
import random
import time
from dataclasses import dataclass

import psutil
import pytest

from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hardware.memory import resident_memory
from moei_core.hub.resolve import resolve_model
from moei_core.prefetch import PrefetchMode

WORDS = (
    "What",
    "is",
    "an",
    "expert",
    "moei",
    "the capital of",
    "France",
    "a cache",
    "seven",
    "plus",
    "How",
    "?",
)
MB = 10**6


@dataclass
class Window:
    """One sixth of the run. cpu_s: of this process, which other programs do not disturb as they do the clock."""

    tokens: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    memory: int = 0
    descriptors: int = 0

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.tokens / self.cpu_s


def turns(model: LoadedModel, seconds: float, rng: random.Random) -> Window:
    """Conversations of one to four turns, each with a prompt, a temperature and a seed of its own."""
    window, ends = Window(), time.monotonic() + seconds
    cpu, wall = time.process_time(), time.monotonic()
    while time.monotonic() < ends:
        settings = GenerationSettings(
            max_new_tokens=rng.randrange(8, 64), temperature=rng.choice((0.0, 1.0)), seed=rng.randrange(10**6)
        )
        session = ChatSession(model, settings)
        for _ in range(rng.randrange(1, 5)):
            list(session.reply(" ".join(rng.choices(WORDS, k=rng.randrange(1, 40)))))
            assert session.report is not None
            window.tokens += session.report.new_tokens
    window.cpu_s, window.wall_s = time.process_time() - cpu, time.monotonic() - wall
    gc.collect()
    window.memory, window.descriptors = resident_memory(), psutil.Process().num_fds()
    return window


@pytest.mark.soak
def test_an_hour_of_turns_changes_nothing() -> None:
    sixth = float(os.environ.get("MOEI_SOAK_MINUTES", "60")) * 60 / 6
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.25), predictor="mixed", prefetch=PrefetchMode.ON, context=1024
    )
    rng = random.Random(0)
    with LoadedModel(resolve_model("moei-demo").folder, options) as model:
        turns(model, sixth / 10, rng)
        windows = [turns(model, sixth, rng) for _ in range(6)]
    for window in windows:
        print(
            f"{window.tokens} tokens, {window.tokens_per_cpu_s:.1f} a second of CPU, "
            f"{window.tokens / window.wall_s:.1f} a second, {window.memory / MB:.1f} MB, "
            f"{window.descriptors} descriptors"
        )
    first, last = windows[0], windows[-1]
    assert last.memory - first.memory < 5 * MB
    assert last.descriptors == first.descriptors
    assert last.tokens_per_cpu_s > 0.95 * first.tokens_per_cpu_s
