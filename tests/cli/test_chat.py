"""``moei chat`` without a terminal: one answer, JSON, streams, exit codes, every mistake a person makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moei_core.engine.model_settings import recommended_settings
from moei_core.errors import DamagedFileError, ExpertReadError
from moei_core.hub.resolve import bundled_folder
from moei_core.store.safetensors_store import SafetensorsStore
from tests.cli.conftest import Outcome

Moei = Callable[..., Outcome]
MOEI = [sys.executable, "-c", "from moei_cli.main import main; main()"]
QUESTION = "What does moei do?"


def test_the_answer_goes_to_standard_output_and_nothing_else_does(moei: Moei) -> None:
    done = moei("chat", "moei-demo", QUESTION, "--temperature", "0")
    assert done.code == 0
    assert "expert" in done.out.lower()
    assert "\x1b" not in done.out + done.err
    assert "experts in RAM" in done.err


def test_a_prompt_alone_or_piped_asks_the_demo(moei: Moei) -> None:
    expected = moei("chat", "moei-demo", QUESTION, "--temperature", "0").out
    assert moei("chat", QUESTION, "--temperature", "0").out == expected
    assert moei("chat", "--temperature", "0", stdin=QUESTION + "\n").out == expected


def test_json_is_one_object_with_the_figures(moei: Moei) -> None:
    texts = []
    for share in ("100%", "25%"):
        done = moei("chat", "--experts", share, "--temperature", "0", QUESTION, "--json")
        report = json.loads(done.out)
        assert done.code == 0
        assert done.err == ""
        texts.append(report["answer"])
        for figure in ("hits", "misses", "bytes_read", "stall_s", "peak_memory_bytes", "ttft_s"):
            assert report[figure] > 0, figure
        assert report["loads"] == report["misses"]
    assert report["experts"]["slots"] * 4 == report["experts"]["total"]
    assert report["evictions"] > 0
    assert texts[0] == texts[1] != ""


def test_the_last_model_is_remembered(moei: Moei, chat_folder: Callable[..., Path]) -> None:
    folder = chat_folder("mixtral")
    assert moei("chat", str(folder), "hi", "--max-tokens", "2").code == 0
    done = moei("chat", "one more question", "--max-tokens", "2", "--json")
    assert json.loads(done.out)["model"] == folder.name


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["no-such-model"], 3, "There is no model called 'no-such-model'"),
        (["moei-demo", "hi", "--experts", "1%"], 4, "The smallest that works is --experts"),
        (["moei-demo", "hi", "--ram", "64MiB"], 4, "The smallest that works is --ram"),
        (["moei-demo", "hi", "--experts", "lots"], 2, "--experts: 'lots' is not a size"),
        (["moei-demo", "hi", "--ram", "-3"], 2, "--ram"),
        (["moei-demo", "hi", "--temperature", "-1"], 2, "temperature"),
        (["moei-demo", "hi", "--seed", str(2**64)], 2, "seed"),
        (["moei-demo", "hi", "--repetition-penalty", "1e-300"], 2, "repetition penalty"),
        (["moei-demo", "hi", "--prefetch", "on", "--predictor", "none"], 2, "nothing to prefetch by"),
        (["moei-demo", " "], 2, "the prompt was empty"),
        (["moei-demo", "hi \udcff"], 2, "no text in UTF-8"),
        (["moei-demo", "hi", "--system", "\udcff"], 2, "--system is no text in UTF-8"),
        (["moei-demo", "hi", "--stop", "a", "--stop", "\udcff"], 2, "--stop is no text in UTF-8"),
        (["moei-demo", "hi", "--ram", ""], 2, "--ram is empty"),
        (["moei-demo", "hi", "--experts", " "], 2, "--experts is empty"),
        (["moei-demo", "hi", "--policy", "magic"], 2, "layer-lru"),
        (["moei-demo", "hi", "--dtype", "int8"], 2, "bfloat16"),
        (["moei-demo", "hi", "--context", "5"], 2, "--context: 5 tokens are too few"),
        (["moei-demo", "hi", "--frobnicate"], 2, "--frobnicate"),
        (["moei-demo", "--json"], 2, "standard input was empty"),
        (["moei-demo", " ".join(["long"] * 6000)], 2, "longer than its context"),
        ([], 2, "standard input was empty"),
    ],
)  # fmt: skip
def test_mistakes(moei: Moei, arguments: list[str], code: int, sentence: str) -> None:
    done = moei("chat", *arguments)
    assert done.code == code
    assert sentence in done.err
    assert done.out == ""
    if code != 2 or "Usage:" not in done.err:
        assert len([line for line in done.err.splitlines() if "runs with" not in line]) <= 3


def test_a_larger_context_is_named_where_there_is_one(moei: Moei) -> None:
    asked = ["moei-demo", " ".join(["long"] * 6000)]
    for context, larger in (("2048", False), ("1024", True)):
        done = moei("chat", *asked, "--context", context)
        assert done.code == 2
        assert ("run with a larger --context" in done.err) == larger


def test_the_smallest_budget_that_an_error_names_works(moei: Moei) -> None:
    import re

    for option, small in (("--experts", "1%"), ("--ram", "64MiB")):
        refused = moei("chat", "moei-demo", "hi", option, small)
        named = re.search(rf"works is {option} (\S+)", refused.err)
        assert named is not None
        assert moei("chat", "moei-demo", "hi", option, named[1].rstrip(".")).code == 0


def test_a_model_that_is_no_moe(moei: Moei, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    done = moei("chat", str(tmp_path), "hi")
    assert done.code == 1
    assert "LlamaForCausalLM is not a Mixture-of-Experts model" in done.err


def test_an_architecture_whose_hook_does_not_take(moei: Moei, tmp_path: Path) -> None:
    """JetMoE accepts transformers' setting and ignores it."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_key_value_heads=1, kv_channels=16, intermediate_size=32,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    JetMoeForCausalLM(config).save_pretrained(tmp_path)
    done = moei("chat", str(tmp_path), "hi")
    assert done.code == 1
    assert "JetMoeForCausalLM is not supported" in done.err


def test_a_layer_that_does_not_run_through_the_hook_is_noticed(
    moei: Moei, chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    forward = MixtralSparseMoeBlock.forward
    calls = []

    def skip_second(self: MixtralSparseMoeBlock, hidden_states: object) -> object:
        calls.append(self)
        return hidden_states if len(calls) == 2 else forward(self, hidden_states)

    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", skip_second)
    done = moei("chat", str(chat_folder("mixtral")), "hi")
    assert done.code == 1
    assert "MixtralForCausalLM is not supported" in done.err
    assert "layer 1 do not run through" in done.err


def test_damaged_files_have_their_own_exit_code(
    moei: Moei, chat_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(chat_folder("mixtral"), tmp_path / "m"))
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    done = moei("chat", str(folder), "hi")
    assert done.code == 6
    assert shard.name in done.err
    (folder / "tokenizer.json").write_text("{}")
    shutil.copy(chat_folder("mixtral") / shard.name, shard)
    done = moei("chat", str(folder), "hi")
    assert done.code == 6
    assert "tokenizer" in done.err


def test_a_read_that_fails_in_the_middle_of_a_turn(moei: Moei, monkeypatch: pytest.MonkeyPatch) -> None:
    read, count = SafetensorsStore.read_extent, 0

    def fail_late(self: SafetensorsStore, key: object, extent: object, slot: memoryview) -> None:
        nonlocal count
        count += 1
        if count > 60:
            raise ExpertReadError(
                f"Reading {key} from model.safetensors failed.", "Input/output error.", "Check it."
            )
        read(self, key, extent, slot)  # type: ignore[arg-type]

    monkeypatch.setattr(SafetensorsStore, "read_extent", fail_late)
    done = moei("chat", "moei-demo", QUESTION)
    assert done.code == 6
    assert "Input/output error" in done.err


def test_quantised_checkpoints_are_refused_by_name(
    moei: Moei, chat_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(chat_folder("mixtral"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    done = moei("chat", str(folder), "hi")
    assert done.code == 1
    assert "awq" in done.err


def test_what_a_model_cannot_do_is_no_option(moei: Moei) -> None:
    done = moei("chat", "moei-demo", "hello", "--think")
    assert done.code == 2
    assert "thinking cannot be switched" in done.err
    done = moei("chat", "moei-demo", "hello", "--max-tokens", "0")
    assert (done.code, done.err) == (2, "usage: A reply must have at least 1 token.\n")


def test_a_long_first_question_is_not_told_to_clear_the_conversation(moei: Moei) -> None:
    done = moei("chat", "moei-demo", "expert " * 200, "--context", "128")
    assert done.code == 2
    assert "Shorten it, or run with a larger --context." in done.err


@pytest.mark.parametrize("noted", [b"\xff\xfe", b"/nowhere/model.gguf\n"])
def test_a_note_of_the_last_model_that_means_nothing_is_passed_over(
    noted: bytes, moei: Moei, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOEI_HOME", str(tmp_path))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "last-model").write_bytes(noted)
    assert moei("chat", "--max-tokens", "2", stdin="hello").code == 0


def test_a_folder_without_a_tokenizer(moei: Moei, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundled_folder(), tmp_path / "m"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    done = moei("chat", str(folder), "hi")
    assert done.code == 6
    assert "tokenizer.json" in done.err


@pytest.mark.parametrize("content", ["[]", '{"temperature": -1}', '{"top_k": 1.5}'])
def test_defaults_of_a_model_that_mean_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"generation_config\.json is damaged"):
        recommended_settings(tmp_path)


def test_bad_defaults_of_a_model_leave_nothing_loaded(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundled_folder(), tmp_path / "m"))
    (folder / "generation_config.json").write_text("{")
    done = subprocess.run([*MOEI, "chat", folder, "hi"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 6
    assert "generation_config.json is damaged" in done.stderr
    # What is not closed, native code complains about at exit.
    assert len(done.stderr.splitlines()) == 3, done.stderr


@pytest.mark.parametrize(("arguments", "closed"), [("chat moei-demo hello", "<&- 2>&-"), ("list", ">&-")])
def test_a_closed_stream_is_no_bug(arguments: str, closed: str) -> None:
    command = ["sh", "-c", f'"$@" {closed}', "sh", *MOEI, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "bug" in done.stderr) == (0, False)
    assert bool(done.stdout) == (closed != ">&-")


@pytest.mark.parametrize("arguments", ["list", "--version"])
def test_a_full_disk_is_no_bug(arguments: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*MOEI, *arguments.split()], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 4
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_ctrl_c_while_a_model_is_loaded_says_so(moei: Moei, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moei_core.engine.loaded_model.LoadedModel.__init__", interrupted)
    done = moei("chat", "moei-demo", "hello")
    assert (done.code, done.err) == (130, "Interrupted.\n")


def test_ctrl_c_while_moei_is_imported_is_no_traceback() -> None:
    program = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from moei_cli.__main__ import run\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize("question", ["word " * 80, "~what is an expert?"])
def test_a_question_that_is_no_path_is_a_question(question: str, moei: Moei) -> None:
    done = moei("chat", question, "--max-tokens", "4", "--temperature", "1e-39")
    assert done.code == 0 and done.out.strip(), done.err
    greedy = moei("chat", question, "--max-tokens", "4", "--temperature", "0")
    assert done.out == greedy.out, "so cold, it is the same"


def test_ctrl_c_before_typer_looks_is_no_traceback() -> None:
    program = (
        "import moei_cli.main as main\n"
        "def interrupted(**_): raise KeyboardInterrupt\n"
        "main.app = interrupted\n"
        "main.main(['list'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_piped_bytes_that_are_no_text(moei: Moei) -> None:
    done = subprocess.run([*MOEI, "chat"], input=b"caf\xe9", capture_output=True, timeout=120)
    assert done.returncode == 2
    assert b"no text in UTF-8" in done.stderr


def test_debug_shows_the_traceback(moei: Moei) -> None:
    from moei_core.errors import ModelNotFoundError

    with pytest.raises(ModelNotFoundError):
        moei("chat", "no-such-model", "--debug")


def test_a_home_that_cannot_be_written_is_no_reason_not_to_chat(
    moei: Moei, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEI_HOME", "/proc/nowhere")
    assert moei("chat", "moei-demo", "hello").code == 0
