"""GGUF files where they are: the same answers as their weights as floats, whatever is resident; mistakes by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.errors import DamagedFileError, ModelNotFoundError, UnsupportedModelError
from moei_core.hub.gguf_model import gguf_folder
from moei_core.hub.resolve import resolve_model
from moei_core.store.gguf_table import read_table
from moei_core.types import Phase
from tests.gguf_checkpoint import save_gguf

FAMILIES = ("qwen3_moe_wide", "qwen2_moe_wide")
TOKENS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module", params=FAMILIES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf"), request.param)


def logits(folder: Path) -> torch.Tensor:
    with LoadedModel(folder, LoadOptions(dtype="float32")) as model, torch.inference_mode():
        model.runtime.forward_pass(Phase.PREFILL, TOKENS.shape[1])
        found: torch.Tensor = model.adapter.model(input_ids=TOKENS).logits[0].clone()
        model.runtime.end_pass()
    return found


def test_it_computes_what_transformers_does_with_its_weights(file: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(file.parent / "floats", dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(input_ids=TOKENS).logits[0]
    assert (logits(gguf_folder(file)) - expected).abs().max() < 1e-3 * expected.std()


def test_what_is_resident_changes_no_answer(file: Path) -> None:
    answers = []
    for share in (1.0, 0.25):
        with LoadedModel(gguf_folder(file), LoadOptions(experts=ExpertBudget(fraction=share))) as model:
            session = ChatSession(model, GenerationSettings(max_new_tokens=12, temperature=0.0))
            answers.append("".join(piece.text for piece in session.reply("hello world")))
            assert session.report is not None
            assert share == 1.0 or session.report.cache.evictions
    assert answers[0] == answers[1]


def test_a_file_in_parts_is_one_model(file: Path, tmp_path: Path) -> None:
    family = (
        "qwen3_moe_wide" if "qwen3" in (gguf_folder(file) / "config.json").read_text() else "qwen2_moe_wide"
    )
    first = save_gguf(tmp_path, family, parts=3)
    parts, whole = read_table(gguf_folder(first)), read_table(gguf_folder(file))
    assert len({entry.file for entry in parts.values()}) == 3
    for name, entry in whole.items():
        other = parts[name]
        assert (entry.dtype, entry.shape) == (other.dtype, other.shape)
        data = [
            path.read_bytes()[one.offset : one.offset + one.nbytes]
            for path, one in ((entry.file, entry), (other.file, other))
        ]
        assert data[0] == data[1]
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match="model-00002-of-00003"):
        gguf_folder(first)


def test_its_tokenizer_is_transformers_own(file: Path) -> None:
    ours = AutoTokenizer.from_pretrained(gguf_folder(file))
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (
        "hello world, hell's bells!",
        "Zahlen 12345 und\r\n\r\n  Zeilen\t \n",
        "I'LL say: \u00e9t\u00e9, \u65e5\u672c\u8a9e \U0001f600",
        "<|im_start|>user\nhello<|im_end|>",
        "",
    ):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert len(ours("hell")["input_ids"]) == 1
    # As Qwen's published tokenizers, which transformers forgets here.
    assert ours("e\u0301")["input_ids"] == ours("\u00e9")["input_ids"]
    assert ours.eos_token == "<|im_end|>"
    message = [{"role": "user", "content": "hi"}]
    shown = ours.apply_chat_template(message, tokenize=False)
    assert shown.startswith("<|im_start|>user") and "hi<|im_end|>" in shown


def test_its_folder_is_made_once_and_anew_when_the_file_changes(file: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copy(file, tmp_path / "m.gguf"))
    folder = gguf_folder(copied)
    made = (folder / "gguf.json").stat().st_mtime_ns
    assert gguf_folder(copied) == folder and (folder / "gguf.json").stat().st_mtime_ns == made
    with copied.open("ab") as stream:
        stream.write(bytes(64))
    other = gguf_folder(copied)
    assert other != folder and not folder.exists(), "what means nothing any more was kept"
    copied.unlink()
    with pytest.raises(DamagedFileError, match="missing or has changed"):
        read_table(other)


def _write(path: Path, change: Callable[[gguf.GGUFWriter], None], architecture: str = "qwen3moe") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _with_tensor(name: str, kind: gguf.GGMLQuantizationType) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_count(8)
        writer.add_tensor(name, np.zeros((1, 288), np.uint8 if kind == IQ else np.float32), raw_dtype=kind)

    return change


F32, IQ = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.IQ4_NL


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda p: p.write_bytes(b""), DamagedFileError, "is no complete GGUF file"),
        (lambda p: p.write_bytes(b"GGUF" + bytes(50)), DamagedFileError, "is no complete GGUF file"),
        (lambda p: p.write_text("no model"), DamagedFileError, "is no complete GGUF file"),
        (lambda p: _write(p, lambda w: None, "llama"), UnsupportedModelError, "architecture 'llama'"),
        (lambda p: _write(p, lambda w: None), UnsupportedModelError, "architecture 'qwen3moe'"),
        (lambda p: _write(p, _with_tensor("blk.0.new", F32)), UnsupportedModelError, "'blk.0.new'"),
        (lambda p: _write(p, _with_tensor("token_embd.weight", F32)), DamagedFileError, "does not describe"),
        (lambda p: _write(p, _with_tensor("output.weight", IQ)), UnsupportedModelError, "stored in IQ4_NL"),
    ],
)
def test_mistakes(
    make: Callable[[Path], object], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    make(tmp_path / "m.gguf")
    with pytest.raises(error, match=sentence):
        resolve_model(str(tmp_path / "m.gguf"))
    assert not list(Path(os.environ["MOEI_HOME"]).rglob(".making-*"))


def test_a_file_that_ends_early(file: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copy(file, tmp_path / "m.gguf"))
    os.truncate(copied, copied.stat().st_size // 2)
    with pytest.raises(DamagedFileError, match="is no complete GGUF file"):
        resolve_model(str(copied))
    with pytest.raises(ModelNotFoundError, match="no file"):
        resolve_model(str(tmp_path / "none.gguf"))
