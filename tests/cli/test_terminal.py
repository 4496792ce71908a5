"""The chat in a real process and a pseudo-terminal: Ctrl-C, slash commands, NO_COLOR, idling, start-up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
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


def test_help_is_quick_and_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom moei_cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    # Processor time, since the machine may be busy.
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.3
