"""``moei quantize`` and what the other commands make of packed models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moei_core.hub import packed
from moei_core.hub.resolve import resolve_model
from moei_core.quant import native
from moei_core.quant.formats import ENCODABLE_FORMATS
from moei_core.quant.mxfp4 import MXFP4
from moei_core.store.packed_folder import JOURNAL_NAME, MANIFEST_NAME
from moei_core.store.packed_manifest import read_manifest
from tests.cli.conftest import Outcome
from tests.core.test_store import flip

Moei = Callable[..., Outcome]
GREEDY = ("--temperature", "0", "--max-tokens", "8", "--json")


def test_a_person_packs_and_chats(moei: Moei) -> None:
    done = moei("quantize", "moei-demo", "q8_0", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    folder = Path(report["folder"])
    assert report["bytes"] == sum(path.stat().st_size for path in folder.iterdir())

    def used(model: str) -> str:
        answer = moei("chat", model, "What is an expert?", *GREEDY)
        assert answer.code == 0, answer.err
        assert ("slow torch path" in answer.err) == (not native.available())
        return json.loads(answer.out)["model"]

    assert used("moei-demo") == used("moei-demo:q8_0") == "moei-demo:q8_0"
    assert used("moei-demo:none") == "moei-demo"
    assert moei("quantize", "moei-demo", "q4_0").code == 0
    assert used("moei-demo") == "moei-demo:q4_0", "the plain name means what was asked for last"
    assert used("moei-demo:q8_0") == "moei-demo:q8_0"
    again = moei("quantize", "moei-demo", "q8_0")
    assert again.code == 0 and "already" in again.err
    assert used("moei-demo") == "moei-demo:q8_0"

    listed = {one["name"]: one for one in json.loads(moei("list", "--json").out)["models"]}
    own, eight, four = (listed[name] for name in ("moei-demo", "moei-demo:q8_0", "moei-demo:q4_0"))
    assert four["experts_bytes"] * 32 == own["experts_bytes"] * 9
    assert eight["experts_bytes"] * 32 == own["experts_bytes"] * 17
    assert [one["format"] for one in (own, eight, four)] == ["bf16", "q8_0", "q4_0"]
    assert {one["source"] for one in (eight, four)} == {"packed"}
    shown = moei("show", "moei-demo")
    assert "q4_0" in shown.out and str(folder) in shown.out and "Q8_0" in shown.out
    assert len(json.loads(moei("show", "moei-demo:q4_0", "--json").out)["here"]) == 1

    assert moei("rm", "moei-demo:q4_0").code == 0
    assert moei("chat", "moei-demo:q4_0", "Hello", *GREEDY).code == 3
    assert used("moei-demo") == "moei-demo:q8_0"
    assert moei("rm", "moei-demo:q8_0").code == 0
    assert not packed.packed_root().exists()
    assert used("moei-demo") == "moei-demo"


def test_a_store_is_used_by_its_path_and_remembered(moei: Moei, chat_folder: Callable[..., Path]) -> None:
    source = chat_folder("mixtral", "bfloat16")
    folder = moei("quantize", str(source), "q8_0").out.strip()
    for model in (folder, str(source)):
        answer = moei("chat", model, "Hello", *GREEDY)
        assert answer.code == 0, answer.err
    recalled = json.loads(moei("chat", *GREEDY, stdin="Hello again").out)["model"]
    assert recalled.endswith(":q8_0")


@pytest.fixture
def copied(chat_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_folder("mixtral", "bfloat16"), tmp_path / "model"))


def test_a_store_of_replaced_weights_is_not_used(moei: Moei, copied: Path) -> None:
    assert moei("quantize", str(copied), "q8_0").code == 0
    assert resolve_model(str(copied)).format == "q8_0"
    next(copied.glob("*.safetensors")).touch()
    assert resolve_model(str(copied)).format == ""
    asked = moei("chat", f"{copied}:q8_0", "Hello", *GREEDY)
    assert asked.code == 3 and "moei quantize" in asked.err
    (row,) = (one for one in json.loads(moei("list", "--json").out)["models"] if one["source"] == "packed")
    assert row["state"] == "outdated"
    assert moei("quantize", str(copied), "q8_0").code == 0
    assert resolve_model(str(copied)).format == "q8_0"


def test_damaged_stores_exit_with_6(moei: Moei, copied: Path) -> None:
    folder = Path(moei("quantize", str(copied), "q8_0").out.strip())
    manifest = read_manifest(folder)
    for expert in manifest.experts.values():
        flip(folder / expert.file, expert.offset + 3)
    broken = moei("chat", str(copied), "Hello", *GREEDY)
    assert broken.code == 6 and "expert" in broken.err and "experts-00001.bin" in broken.err
    os.truncate(folder / MANIFEST_NAME, 100)
    cut = moei("chat", str(copied), "Hello", *GREEDY)
    assert cut.code == 6 and len(cut.err.strip().splitlines()) <= 3
    assert "damaged" in moei("list").out
    assert moei("rm", f"{copied}:q8_0").code == 0


def test_ctrl_c_leaves_what_is_packed(moei: Moei, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moei_cli import render

    calls = []

    def interrupt(self: object, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(render.PullBar, "advance", interrupt)
        stopped = moei("quantize", str(copied), "q8_0")
    assert stopped.code == 130 and "same command" in stopped.err
    (journal,) = packed.packed_root().rglob(JOURNAL_NAME)
    assert journal.read_text().count("\n") == 6
    (row,) = (one for one in json.loads(moei("list", "--json").out)["models"] if one["source"] == "packed")
    assert row["state"] == "partial" and "packed" in row["problem"]
    assert resolve_model(str(copied)).format == ""
    assert moei("quantize", str(copied), "q8_0").code == 0
    assert resolve_model(str(copied)).format == "q8_0"


def test_a_synthetic_model_is_packed_dropped_and_measured(
    moei: Moei, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moei_core.hub import synthetic, synthetic_models

    real = synthetic_models.SYNTHETIC_MODELS["mixtral-8x7b"]
    config = dict(real.config) | {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512,
    }  # fmt: skip
    small = synthetic_models.SyntheticModel("mixtral-8x7b", config, real.layer_tensors)
    monkeypatch.setitem(synthetic.SYNTHETIC_MODELS, "mixtral-8x7b", small)
    bench = ("bench", "--synthetic", "mixtral-8x7b", "--layers", "2", "--experts", "50%")
    few = ("--prompt-tokens", "4", "--new-tokens", "3", "--repeats", "1", "--json")
    done = moei(*bench, "--quant", "q4_0", *few)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["model"] == "synthetic:mixtral-8x7b@2:q4_0" and report["format"] == "q4_0"
    assert report["expert_bytes"] == 3 * 64 * 96 // 32 * 18
    assert json.loads(moei(*bench, *few).out)["format"] == "as published"
    dropped = moei("quantize", "synthetic:mixtral-8x7b@2", "q4_0", "--drop-source", "--json")
    assert json.loads(dropped.out)["source_freed_bytes"] > 0
    assert resolve_model("synthetic:mixtral-8x7b@2").format == "q4_0"
    assert moei("rm", "synthetic:mixtral-8x7b@2").code == 0
    assert not packed.packed_root().exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("quantize", "moei-demo", "q5_0"), 2, "Choose from: q8_0, q4_0, mxfp4"),
        (("quantize", "moei-demo", "mxfp4"), 1, "published in MXFP4"),
        (("quantize", "moei-demo:q4_0", "q4_0"), 2, "names a packed model"),
        (("quantize", "moei-demo", "q4_0", "--drop-source"), 2, "not moei's to drop"),
        (("quantize", "owner/absent", "q4_0"), 3, "not on this machine"),
        (("chat", "moei-demo:q4_0", "Hello"), 3, "moei quantize moei-demo q4_0"),
        (("bench", "moei-demo", "--quant", "q4_0"), 2, "moei-demo:q4_0"),
        (("pull", "owner/name", "--drop-source"), 2, "--quant"),
        (("pull", "owner/name:q4_0", "--quant", "q8_0"), 2, "two formats"),
        (("rm", "moei-demo:q4_0"), 3, "not on this machine"),
        (("rm", "moei-demo:none"), 2, "part of moei"),
    ],
)
def test_mistakes(moei: Moei, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    done = moei(*arguments)
    assert (done.code, sentence in done.err) == (code, True), done.err


def test_the_names_of_formats_are_those_of_the_table() -> None:
    assert (*(name.lower() for name in ENCODABLE_FORMATS), MXFP4.lower()) == packed.PACKED_NAMES
