"""Packing: killed and resumed, damaged in every way, odd sizes, weights that are no numbers."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moei_core.adapters.skeleton import read_tensor
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.errors import DamagedFileError, DoesNotFitError, ExpertReadError, MoeiError
from moei_core.quant.formats import decode, transcode
from moei_core.store.base import PAGE, read_expert
from moei_core.store.checksums import checksum
from moei_core.store.file_reader import FileReader
from moei_core.store.packed_folder import JOURNAL_NAME, LOCK_NAME, MANIFEST_NAME
from moei_core.store.packed_manifest import read_manifest
from moei_core.store.packed_store import PackedStore
from moei_core.store.packing import PackPlan, pack
from moei_core.types import ExpertKey
from tests.core.test_store import flip
from tests.packed import pack_folder, plan
from tests.tiny_models import build, save_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK_NAME}


def slot_of(store: PackedStore, key: ExpertKey) -> memoryview:
    slot = memoryview(mmap(-1, store.layout(key).slot_nbytes))
    assert read_expert(store, key, slot) == store.layout(key).nbytes
    return slot


@pytest.fixture
def source(chat_folder: Callable[..., Path]) -> Path:
    return chat_folder("qwen3_moe", "bfloat16")


@pytest.fixture
def store(source: Path, tmp_path: Path) -> Path:
    pack_folder(source, tmp_path / "store", "Q4_0")
    return tmp_path / "store"


def test_every_weight_is_the_encoded_original(source: Path, store: Path) -> None:
    """Each value in the store, experts and dense, against the checkpoint as the library reads it."""
    original = {}
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, "pt") as reader:
            original |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118

    def encoded(tensor: torch.Tensor, form: str) -> np.ndarray:
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        return decode(form, transcode("BF16", raw, form, "w"), tensor.shape)

    manifest = read_manifest(store)
    packed = PackedStore(store, manifest)
    for key in packed.experts():
        layout, slot = packed.layout(key), slot_of(packed, key)
        assert layout.extents[0].offset % PAGE == 0
        for part in layout.parts:
            name = {("gate_up_proj", 0): "gate", ("gate_up_proj", 1): "up", ("down_proj", 0): "down"}
            leaf = name[part.tensor.param, part.tensor.index]
            expected = original.pop(f"model.layers.{key.layer}.mlp.experts.{key.expert}.{leaf}_proj.weight")
            raw = np.frombuffer(slot, np.uint8, part.tensor.nbytes, part.slot_offset)
            assert part.slot_offset % 64 == 0
            assert np.array_equal(decode("Q4_0", raw, part.tensor.shape), encoded(expected, "Q4_0"))
    for name, entry in manifest.dense_entries(store).items():
        found = read_tensor(name, entry, FileReader(entry.file), torch.float32)
        expected = original.pop(name)
        if entry.dtype == "Q8_0":
            assert np.array_equal(found.numpy(), encoded(expected, "Q8_0"))
        else:
            assert torch.equal(found, expected)
    assert not original, "something was not packed"


def test_a_store_is_a_model_folder_of_its_own(source: Path, store: Path) -> None:
    kept = {path.name for path in source.iterdir() if path.suffix == ".json"} - {
        "model.safetensors.index.json"
    }
    assert kept <= set(contents(store))
    assert not (store / JOURNAL_NAME).exists()
    assert read_manifest(store).nbytes == sum(map(len, contents(store).values())) - len(
        (store / MANIFEST_NAME).read_bytes()
    )


def test_packing_is_deterministic_and_progress_is_complete(source: Path, store: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    pack_folder(source, tmp_path / "again", "Q4_0", progress=steps.append)
    assert contents(tmp_path / "again") == contents(store)
    assert sum(steps) == plan(source, "Q4_0").source_nbytes


def pack_in_a_child(packing: PackPlan, target: Path) -> tuple[int, TextIO]:
    """A process that packs slowly, and a pipe on which it writes a line for each finished item."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:

        def slowly(nbytes: int) -> None:
            os.write(writer, b".\n")
            time.sleep(0.003)

        try:
            pack(packing, target, slowly)
        finally:
            os._exit(0)
    os.close(writer)
    return child, os.fdopen(reader)


def kill_and_resume(source: Path, expected: dict[str, bytes], target: Path, kills: int, seed: int) -> int:
    """Kill packing at random moments between two items or inside one. Returns how many items outlived a kill."""
    moments, kept, packing = random.Random(seed), 0, plan(source, "Q4_0")
    for _ in range(kills):
        child, lines = pack_in_a_child(packing, target)
        with lines:
            for _ in range(moments.randrange(0, 40)):
                lines.readline()
            time.sleep(moments.uniform(0, 0.006))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if (target / MANIFEST_NAME).exists():
            assert contents(target) == expected
            for path in target.iterdir():
                path.unlink()
        elif (target / JOURNAL_NAME).exists():
            kept = max(kept, (target / JOURNAL_NAME).read_text().count("\n") - 1)
            with pytest.raises(DamagedFileError, match="never finished"):
                read_manifest(target)
    steps: list[int] = []
    pack_folder(source, target, "Q4_0", progress=steps.append)
    assert contents(target) == expected
    return kept


def test_five_kills(source: Path, store: Path, tmp_path: Path) -> None:
    assert kill_and_resume(source, contents(store), tmp_path / "killed", 5, seed=1) > 0


@pytest.mark.slow
def test_fifty_kills(source: Path, store: Path, tmp_path: Path) -> None:
    assert kill_and_resume(source, contents(store), tmp_path / "killed", 50, seed=2) > 0


class Stop(Exception):
    pass


def stopped(source: Path, target: Path, after: int, form: str = "Q4_0") -> None:
    """Pack until ``after`` items are done, then fail."""
    count = 0

    def progress(nbytes: int) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise Stop

    with pytest.raises(Stop):
        pack_folder(source, target, form, progress=progress)


def test_what_the_journal_names_is_not_made_again(source: Path, store: Path, tmp_path: Path) -> None:
    target = tmp_path / "stopped"
    stopped(source, target, 30)
    first = target / "experts-00001.bin"
    before = first.stat().st_ino
    made: list[str] = []
    from moei_core.store import packing

    original = packing.transcode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "transcode", lambda *a: made.append(a[3]) or original(*a))
        pack_folder(source, target, "Q4_0")
    total = len(read_manifest(target).experts)
    assert len({name.partition(" of ")[2] for name in made if " of " in name}) == total - 30
    assert first.stat().st_ino == before
    assert contents(target) == contents(store)


def test_a_source_that_goes_away_is_named(source: Path, tmp_path: Path) -> None:
    """And not the folder that is written, which has nothing to do with it."""
    moved = Path(shutil.copytree(source, tmp_path / "source"))
    steps: list[int] = []
    pack_folder(moved, tmp_path / "first", "Q4_0", progress=steps.append)
    left = [len(steps)]

    def progress(_: int) -> None:
        left[0] -= 1
        if not left[0]:
            shutil.rmtree(moved)

    with pytest.raises(MoeiError, match=r"source/.* cannot be read"):
        pack_folder(moved, tmp_path / "to", "Q4_0", progress=progress)


def test_a_journal_is_not_believed_about_lost_bytes(source: Path, store: Path, tmp_path: Path) -> None:
    """After a power cut a file system may have kept the journal's line and lost the expert."""
    target = tmp_path / "stopped"
    stopped(source, target, 30)
    with (target / "experts-00001.bin").open("r+b") as stream:
        stream.seek(5 * PAGE + 7)
        stream.write(b"\0\1\2\3")
    (target / JOURNAL_NAME).write_text((target / JOURNAL_NAME).read_text() + "1.7 0123")
    pack_folder(source, target, "Q4_0")
    assert contents(target) == contents(store)


def test_what_another_plan_left_does_not_show_through(source: Path, store: Path, tmp_path: Path) -> None:
    target = tmp_path / "stopped"
    stopped(source, target, 30, "Q8_0")
    pack_folder(source, target, "Q4_0")
    assert contents(target) == contents(store)


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    def intrude(nbytes: int) -> None:
        with pytest.raises(MoeiError, match="right now"):
            pack_folder(source, tmp_path / "store", "Q4_0")

    pack_folder(source, tmp_path / "store", "Q4_0", progress=intrude)


def test_a_full_disk_is_told_before_any_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def small(path: object) -> object:
        status = list(real(path))  # type: ignore[call-overload]
        status[4] = 2
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(DoesNotFitError, match="does not fit"):
        pack_folder(source, tmp_path / "store", "Q4_0")
    assert not list((tmp_path / "store").glob("*.bin"))


def test_a_limit_of_file_sizes_is_told_and_nothing_is_lost(source: Path, store: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        with pytest.raises(DoesNotFitError, match="takes no files as large"):
            pack_folder(source, tmp_path / "again", "Q4_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    pack_folder(source, tmp_path / "again", "Q4_0")
    assert contents(tmp_path / "again") == contents(store)


def test_a_flipped_bit_in_any_expert_is_named_at_its_first_read(store: Path) -> None:
    manifest = read_manifest(store)
    for number, (key, expert) in enumerate(manifest.experts.items()):
        at = expert.offset + number * 977 % expert.nbytes
        flip(store / expert.file, at)
        packed = PackedStore(store, manifest)
        with pytest.raises(ExpertReadError, match=rf"{key} in experts-00001\.bin"):
            slot_of(packed, key)
        packed.close()
        flip(store / expert.file, at)
    packed = PackedStore(store, manifest)
    for key in manifest.experts:
        slot_of(packed, key)


def test_a_flipped_bit_in_a_dense_weight_is_named(store: Path) -> None:
    name, packed = sorted(read_manifest(store).dense.items())[3]
    flip(store / packed.file, packed.offset + packed.nbytes // 2)
    with pytest.raises(DamagedFileError, match=rf"'{name}' in dense\.bin"):
        TransformersAdapter(store).load()


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    outer = json.loads((folder / MANIFEST_NAME).read_text())
    change(outer["content"])
    body = json.dumps(outer["content"], sort_keys=True, separators=(",", ":"))
    outer["checksum"] = checksum([body.encode()])
    (folder / MANIFEST_NAME).write_text(json.dumps(outer))


def replace_text(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST_NAME).read_text()
    assert old in text
    (folder / MANIFEST_NAME).write_text(text.replace(old, new, 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST_NAME).unlink(), "never finished"),
    "truncated manifest": (
        lambda f: os.truncate(f / MANIFEST_NAME, (f / MANIFEST_NAME).stat().st_size // 2),
        "cut short",
    ),
    "empty manifest": (lambda f: (f / MANIFEST_NAME).write_text(""), "cut short"),
    "another JSON": (lambda f: (f / MANIFEST_NAME).write_text("[1]"), "not a manifest"),
    "newer version": (lambda f: replace_text(f, '"format_version":1', '"format_version":2'), "version 2"),
    "changed manifest": (lambda f: replace_text(f, '"offset":0', '"offset":8'), "not that of its content"),
    "unknown format": (lambda f: rewrite(f, lambda c: c["kinds"][0][0].update(format="Q9_9")), "Q9_9"),
    "unknown field": (lambda f: rewrite(f, lambda c: c["experts"][0].update(colour=1)), "colour"),
    "part beyond its expert": (
        lambda f: rewrite(f, lambda c: c["kinds"][0][-1].update(offset=c["kinds"][0][-1]["offset"] + 8192)),
        "smaller than its parts",
    ),
    "part before its expert": (
        lambda f: rewrite(f, lambda c: c["kinds"][0][0].update(offset=-64)),
        "bytes at -64",
    ),
    "part of other bytes": (lambda f: rewrite(f, lambda c: c["kinds"][0][0].update(nbytes=17)), "17 bytes"),
    "unknown kind": (
        lambda f: rewrite(f, lambda c: c["experts"][0].update(kind=-1)),
        "smaller than its parts",
    ),
    "expert beyond its file": (
        lambda f: rewrite(f, lambda c: c["experts"][-1].update(offset=1 << 40)),
        "is not within experts",
    ),
    "expert between pages": (
        lambda f: rewrite(f, lambda c: c["experts"][1].update(offset=c["experts"][1]["offset"] + 100)),
        "is not within experts",
    ),
    "dense weight beyond its file": (
        lambda f: rewrite(f, lambda c: next(iter(c["dense"].values())).update(offset=1 << 40)),
        "is not within dense",
    ),
    "missing file": (lambda f: (f / "experts-00001.bin").unlink(), r"experts-00001\.bin"),
    "missing tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json"),
    "truncated file": (lambda f: os.truncate(f / "dense.bin", 1000), r"dense\.bin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_stores_are_told(store: Path, damage: str) -> None:
    action, sentence = DAMAGES[damage]
    action(store)
    with pytest.raises(DamagedFileError, match=sentence) as caught:
        read_manifest(store)
    assert caught.value.exit_code == 6
    assert len(caught.value.lines()) <= 3 and caught.value.hint


def test_a_store_of_another_model_does_not_match_the_configuration(store: Path) -> None:
    config = json.loads((store / "config.json").read_text())
    config["num_local_experts"] = 15
    text = json.dumps(config)
    (store / "config.json").write_text(text)
    rewrite(store, lambda c: c["files"].update({"config.json": len(text)}))
    with pytest.raises(DamagedFileError, match="layer 0 expert 15"):
        TransformersAdapter(store)


def changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model folder with other weights, in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    change(tensors)
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(source: Path, tmp_path: Path, name: str) -> None:
    folder = changed(source, tmp_path / "nan", lambda t: t[name][-1].fill_(float("nan")))
    sentence = "gate_up_proj of layer 1 expert 3" if "experts" in name else name
    with pytest.raises(DamagedFileError, match=sentence):
        pack_folder(folder, tmp_path / "store")


def test_sizes_that_no_block_fits_keep_their_own_format(tmp_path: Path) -> None:
    """A hidden size of 40: rows of 40 stay bf16, the down projection's rows of 96 are blocks."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=258, hidden_size=40, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "odd")
    save_tokenizer(tmp_path / "odd")
    manifest = pack_folder(tmp_path / "odd", tmp_path / "store", "Q4_0", "rows16")
    formats = {(part.param, part.format, part.layout) for kind in manifest.kinds for part in kind}
    # 40 rows are no multiple of 16 either.
    assert formats == {("gate_up_proj", "BF16", "plain"), ("down_proj", "Q4_0", "plain")}
    assert {one.format for one in manifest.dense.values()} == {"BF16"}
    from moei_core.config import ExpertBudget
    from moei_core.engine.loaded_model import LoadedModel, LoadOptions

    with LoadedModel(tmp_path / "store", LoadOptions(experts=ExpertBudget(fraction=1.0))) as loaded:
        logits = loaded.adapter.model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_transposed_experts_are_packed_as_output_rows(
    tmp_path: Path, chat_folder: Callable[..., Path]
) -> None:
    """gpt-oss stores [in, out] with gate and up interleaved: row 2 i of the packed matrix is gate i."""
    manifest = pack_folder(chat_folder("gpt_oss", "bfloat16"), tmp_path / "store", "Q8_0")
    packed = PackedStore(tmp_path / "store", manifest)
    key = ExpertKey(2, 5)
    layout, slot = packed.layout(key), slot_of(packed, key)
    part = next(part for part in layout.parts if part.tensor.param == "gate_up_proj")
    assert part.tensor.transposed and part.tensor.shape == (64, 64)
    raw = np.frombuffer(slot, np.uint8, part.tensor.nbytes, part.slot_offset)
    found = decode("Q8_0", raw, part.tensor.shape)
    model = build("gpt_oss", torch.bfloat16)
    expected = model.model.layers[2].mlp.experts.gate_up_proj[5].detach().float().numpy().T
    assert np.abs(found - expected).max() < 0.01
    assert np.abs(found - expected.T).max() > 0.1


def test_memory_is_bounded_by_one_expert(tmp_path: Path) -> None:
    """Packing 50 MB holds the packed bytes of one expert (1.6 MB) and of the weights being converted."""
    import tracemalloc

    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=258, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    model.save_pretrained(tmp_path / "model")
    packing = plan(tmp_path / "model", "Q8_0")
    tracemalloc.start()
    made = pack(packing, tmp_path / "store")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.nbytes > 26 << 20
    assert peak < 6 << 20
