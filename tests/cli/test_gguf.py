"""A GGUF file from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.gguf_checkpoint import save_gguf

Moei = Callable[..., Outcome]
GREEDY = ("--temperature", "0", "--max-tokens", "6")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf"), "qwen3_moe_wide")


def test_it_is_talked_to_shown_and_gone_on_with(
    moei: Moei, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOEI_HOME", str(tmp_path))
    monkeypatch.chdir(file.parent)
    done = moei("chat", file.name, "hello", *GREEDY)
    assert done.code == 0, done.err
    assert f"{file.name} runs with all of its 16 experts in RAM" in done.err
    monkeypatch.chdir(tmp_path)
    again = moei("chat", *GREEDY, stdin="hello")
    assert (again.code, again.out) == (0, done.out), again.err
    shown = moei("show", str(file))
    assert shown.code == 0, shown.err
    assert "a GGUF file, read where it is" in shown.out and "q4_k" in shown.out and "complete" in shown.out
    benched = moei("bench", str(file), "--experts", "50%", "--prompt-tokens", "8", "--new-tokens", "4")
    assert benched.code == 0, benched.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("quantize", "FILE", "q4_0"), "is quantised already"),
        (("chat", "FILE:q4_0", "hello"), "has a format of its own"),
        (("pull", "FILE"), "a file of yours"),
        (("rm", "FILE"), "a file that moei did not make"),
        (("chat", "none.gguf", "hello"), "There is no file"),
        (("chat", "owner/name:Q4_K_M", "hello"), "are not pulled yet"),
    ],
)
def test_mistakes(moei: Moei, file: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = moei(*(one.replace("FILE", str(file)) for one in arguments))
    assert done.code in (1, 2, 3)
    assert sentence in done.err
