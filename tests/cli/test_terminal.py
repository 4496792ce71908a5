"""The chat in a real process and a pseudo-terminal: Ctrl-C, slash commands, NO_COLOR, idling, start-up."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import psutil
import pytest

MOEI = [sys.executable, "-c", "from moei_cli.main import main; main()"]
# What the prompt sends to the terminal when it is ready; ">>>" may also stand in a reply of random bytes.
PROMPT = "\x1b[?2004h"


def start(*arguments: str, **environment: str) -> pexpect.spawn:
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", **environment}
    command, *rest = [*MOEI, "chat", *arguments]
    return pexpect.spawn(command, rest, env=env, encoding="utf-8", timeout=120, dimensions=(40, 120))


@pytest.fixture
def endless(chat_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A model whose reply takes minutes, so that it can be interrupted however busy the machine is: it has a long
    context, and the tokens that would end a reply have a logit of zero, which greedy decoding never takes."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(chat_folder("mixtral"), tmp_path / "endless"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 32768
    (folder / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["lm_head.weight"]
    tensors = load_file(shard)
    tensors["lm_head.weight"][256:] = 0
    save_file(tensors, shard, metadata={"format": "pt"})
    return [str(folder), "--max-tokens", "30000", "--context", "32000", "--temperature", "0"]


@pytest.fixture
def chat() -> Iterator[pexpect.spawn]:
    child = start("moei-demo", "--temperature", "0")
    child.expect_exact(PROMPT)
    yield child
    child.close(force=True)


def leave(child: pexpect.spawn) -> None:
    child.sendline("/bye")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_conversation(chat: pexpect.spawn) -> None:
    chat.sendline("What does moei do?")
    chat.expect("tokens/s")
    chat.expect("hits in RAM")
    chat.expect_exact(PROMPT)
    chat.sendline("/stats")
    chat.expect("resident")
    chat.expect("last turn")
    chat.expect_exact(PROMPT)
    chat.sendline("/set temperature 0.5")
    chat.expect(r"temperature = 0\.5")
    chat.expect_exact(PROMPT)
    chat.sendline("/set temperature warm")
    chat.expect("is a number")
    chat.expect_exact(PROMPT)
    chat.sendline("/satts")
    chat.expect("Did you mean /stats")
    chat.expect_exact(PROMPT)
    chat.sendline("/clear")
    chat.expect("conversation is empty")
    chat.expect_exact(PROMPT)
    chat.sendline("/help")
    chat.expect("/bye")
    chat.expect_exact(PROMPT)
    leave(chat)


def test_several_lines_are_one_question(chat: pexpect.spawn) -> None:
    chat.sendline('"""What does')
    chat.expect_exact(PROMPT)
    chat.sendline('moei do?"""')
    chat.expect("tokens/s")
    chat.expect_exact(PROMPT)
    leave(chat)


def test_ctrl_c_stops_the_reply_and_the_chat_goes_on(endless: list[str]) -> None:
    child = start(*endless)
    child.expect_exact(PROMPT)
    child.sendline("hello")
    child.expect("tokens/s")
    child.sendintr()
    child.expect_exact(PROMPT)
    child.sendline("/stats")
    child.expect("ended by interrupted")
    child.expect_exact(PROMPT)
    child.sendline("and now?")
    child.expect("tokens/s")
    child.sendintr()
    child.expect_exact(PROMPT)
    child.sendintr()
    child.expect("Ctrl-C again leaves")
    child.expect_exact(PROMPT)
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_d_leaves(chat: pexpect.spawn) -> None:
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_no_color_writes_no_colours() -> None:
    child = start("moei-demo", "What does moei do?", "--temperature", "0", NO_COLOR="1")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "\x1b" not in child.before
    assert "expert" in child.before


def test_an_idle_chat_uses_no_processor(chat: pexpect.spawn) -> None:
    chat.sendline("Hello!")
    chat.expect("tokens/s")
    chat.expect_exact(PROMPT)
    time.sleep(2)
    process = psutil.Process(chat.pid)
    before = process.cpu_times()
    time.sleep(5)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) < 0.05


def test_ctrl_c_in_a_one_shot_answer_exits_with_130(endless: list[str]) -> None:
    process = subprocess.Popen(
        [*MOEI, "chat", *endless, "hello"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


HELD_DISK = """
import os, pathlib, time
from moei_core.engine.chat_session import ChatSession
from moei_core.store.file_store import FileStore
place = pathlib.Path(os.environ["DISK"])
read, stop = FileStore.read_extent, ChatSession.stop
def read_extent(self, *rest):
    while (place / "held").exists():
        (place / "reading").touch()
        time.sleep(0.01)
    read(self, *rest)
def stopped(self):
    stop(self)
    (place / "stopped").touch()
FileStore.read_extent, ChatSession.stop = read_extent, stopped
from moei_cli.main import main
main()
"""
"""A chat whose disk does not answer while a file is there, and which leaves files when it reads and when it stops."""


class Disk:
    """What ``HELD_DISK`` looks at."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def hold(self) -> None:
        for name in ("reading", "stopped"):
            (self.place / name).unlink(missing_ok=True)
        (self.place / "held").touch()

    def answer(self) -> None:
        (self.place / "held").unlink()

    def wait_for(self, name: str) -> None:
        until = time.monotonic() + 60
        while not (self.place / name).exists():
            assert time.monotonic() < until, f"never {name}"
            time.sleep(0.01)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "disk").mkdir()
    return Disk(tmp_path / "disk")


def modes(child: pexpect.spawn) -> int:
    """Whether the terminal echoes, waits for lines and makes signals of keys."""
    found: int = termios.tcgetattr(child.child_fd)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    return found


def test_ctrl_c_while_the_disk_does_not_answer(endless: list[str], disk: Disk) -> None:
    """The first ends the turn when the disk answers, and the chat goes on; two in one turn leave."""
    command, *rest = [sys.executable, "-c", HELD_DISK, "chat", *endless, "--experts", "35%"]
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "DISK": str(disk.place)}
    child = pexpect.spawn(command, rest, env=env, encoding="utf-8", timeout=120, dimensions=(40, 120))
    screen = child.logfile_read = io.StringIO()
    before = modes(child)
    try:
        child.expect_exact(PROMPT)
        process = psutil.Process(child.pid)
        disk.hold()
        child.sendline("hello")
        disk.wait_for("reading")
        child.sendintr()
        disk.wait_for("stopped")
        disk.answer()
        child.expect("Stopped before the first token")
        child.expect_exact(PROMPT)
        disk.hold()
        child.sendline("which experts are not here yet, and what for? !?xyz 0123456789")
        disk.wait_for("reading")
        child.sendintr()
        disk.wait_for("stopped")
        child.sendintr()
        disk.answer()
        child.expect(pexpect.EOF)
        assert modes(child) == before != 0
        child.close()
    finally:
        child.close(force=True)
    assert child.exitstatus == 130 and not process.is_running()
    assert "Traceback" not in screen.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_a_one_shot_answer_waits_for_the_disk(
    endless: list[str], disk: Disk, times: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HELD_DISK, "chat", *endless, "--experts", "35%", "hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "DISK": str(disk.place)},
    )
    disk.hold()
    disk.wait_for("reading")
    process.send_signal(signal.SIGINT)
    disk.wait_for("stopped")
    if times == 2:
        process.send_signal(signal.SIGINT)
    disk.answer()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b""
    assert b"Traceback" not in err


def test_help_is_quick_and_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom moei_cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'"
    )

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Processor time, and the least of several, since the machine may be busy and its processors shared.
    assert min(seconds() for _ in range(5)) < 0.3
