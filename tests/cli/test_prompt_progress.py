"""The line that shows how far a prompt is, on a real terminal, and its absence everywhere else."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moei_cli import render
from moei_core.engine.chat_session import PromptProgress

SESSION: Any = SimpleNamespace(prompt_progress=lambda: PromptProgress(512, 0.4, 6.0, 3.0, 3 << 30))


def pieces() -> Iterator[Any]:
    time.sleep(0.7)
    yield "first"
    yield "second"


def test_the_line_names_share_time_left_and_what_it_waits_for() -> None:
    line = render.prompt_line(SESSION.prompt_progress())
    assert line == "reading the prompt: 40% of 512 tokens, about 9 s left \u00b7 3.0 GiB read, 50% waiting"
    early = render.prompt_line(PromptProgress(512, 0.01, 1.0, 0.0, 0))
    assert "left" not in early


def test_a_terminal_shows_it_until_the_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        reply = render.after_prompt(pieces(), SESSION)
        assert next(reply) == "first"
        shown = _read(ours)
        assert "reading the prompt: 40% of 512 tokens" in shown
        assert list(reply) == ["second"]
        assert "reading" not in _read(ours)
    os.close(ours)


def test_what_is_no_terminal_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(render.after_prompt(pieces(), SESSION)) == ["first", "second"]
    assert capsys.readouterr().err == ""


def _read(descriptor: int) -> str:
    found = b""
    while select.select([descriptor], [], [], 0.2)[0]:
        found += os.read(descriptor, 4096)
    return found.decode(errors="replace")
