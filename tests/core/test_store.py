"""Experts read in place: headers, layouts, direct and buffered reads, checksums, every way a file can be wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moei_core.adapters.checkpoint import read_tensors
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.engine import slots
from moei_core.engine.expert_compute import weights_in_slot
from moei_core.errors import DamagedFileError, ExpertReadError, ModelNotFoundError
from moei_core.store import slot_memory
from moei_core.store.base import PAGE, Extent, StoredTensor, lay_out, read_expert
from moei_core.store.checksums import RunningChecksum, checksum
from moei_core.store.file_reader import FileReader
from moei_core.store.memory_store import MemoryStore
from moei_core.store.safetensors_header import read_header
from moei_core.store.safetensors_store import SafetensorsStore
from moei_core.store.slot_memory import reports_free_memory
from moei_core.types import ExpertKey
from tests.tiny_models import FAMILIES, save


def slot_of(store: SafetensorsStore | MemoryStore, key: ExpertKey) -> memoryview:
    slot = memoryview(mmap(-1, store.layout(key).slot_nbytes))
    assert read_expert(store, key, slot) == store.layout(key).nbytes
    return slot


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direct", [True, False])
def test_every_tensor_is_what_the_library_reads(
    family: str, direct: bool, chat_folder: Callable[..., Path]
) -> None:
    adapter = TransformersAdapter(chat_folder(family, "bfloat16"))
    store = SafetensorsStore(adapter.experts, direct=direct)
    assert store.direct == direct, "the temporary folder's file system refuses O_DIRECT"
    seen = 0
    for key in store.experts():
        weights = weights_in_slot(store.layout(key), slot_of(store, key))
        pieces = {param: iter(tensors) for param, tensors in weights.items()}
        for tensor in sorted(adapter.experts[key], key=lambda tensor: tensor.index):
            entries = read_header(tensor.file)
            name = next(n for n, e in entries.items() if e.offset <= tensor.offset < e.offset + e.nbytes)
            with safe_open(tensor.file, "pt") as reader:
                expected = reader.get_tensor(name)
            if expected.shape != tensor.shape:
                expected = expected[key.expert]
            assert torch.equal(next(pieces[tensor.param]), expected), (key, name)
            seen += 1
    assert seen == sum(len(tensors) for tensors in adapter.experts.values())


def test_an_expert_whose_tensors_are_neighbours_is_one_read(tmp_path: Path) -> None:
    store = SafetensorsStore(TransformersAdapter(save("qwen3_moe", tmp_path)).experts)
    assert all(len(store.layout(key).extents) == 1 for key in store.experts())


def test_layouts_keep_the_alignment_of_the_file_and_never_overlap() -> None:
    file, other = Path("a"), Path("b")
    tensors = [
        StoredTensor("gate_up_proj", 0, file, 424, 5000, "U8", (5000,)),
        StoredTensor("gate_up_proj", 1, file, 5424, 100, "U8", (100,)),
        StoredTensor("down_proj", 0, other, 3712, 9000, "U8", (9000,)),
    ]
    layout = lay_out(tensors)
    assert [(e.file, e.offset, e.nbytes) for e in layout.extents] == [(file, 424, 5100), (other, 3712, 9000)]
    pages: set[int] = set()
    for extent in layout.extents:
        assert extent.slot_offset % PAGE == extent.offset % PAGE
        touched = set(range(extent.slot_offset // PAGE, -(-(extent.slot_offset + extent.nbytes) // PAGE)))
        assert not pages & touched
        pages |= touched
    assert layout.slot_nbytes == (max(pages) + 1) * PAGE
    assert [part.slot_offset for part in layout.parts] == [424, 5424, 2 * PAGE + 3712]


def test_tensors_at_odd_offsets_are_read_too(tmp_path: Path) -> None:
    """A header may have any length, so bfloat16 data may start at an odd byte."""
    values = torch.randn(33, 7).bfloat16()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [33, 7], "data_offsets": [0, 462]}}).encode()
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "odd.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + values.view(torch.uint8).numpy().tobytes()
    )
    entry = read_header(tmp_path / "odd.safetensors")["w"]
    assert entry.offset % 2 == 1
    key = ExpertKey(0, 0)
    stored = StoredTensor("down_proj", 0, entry.file, entry.offset, entry.nbytes, entry.dtype, entry.shape)
    store = SafetensorsStore({key: [stored]})
    assert torch.equal(weights_in_slot(store.layout(key), slot_of(store, key))["down_proj"][0], values)


def test_file_systems_without_direct_reads(
    monkeypatch: pytest.MonkeyPatch, chat_folder: Callable[..., Path]
) -> None:
    """Refused at open (EINVAL), or accepted at open and refused at the first read: buffered reads take over."""
    adapter = TransformersAdapter(chat_folder("mixtral"))
    expected = {key: bytes(slot_of(SafetensorsStore(adapter.experts), key)) for key in adapter.experts}
    real_open, real_preadv = os.open, os.preadv

    def refuse_open(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_open)
    store = SafetensorsStore(adapter.experts)
    assert not store.direct
    for key, layout in ((key, store.layout(key)) for key in store.experts()):
        slot = slot_of(store, key)
        for part in layout.parts:
            place = slice(part.slot_offset, part.slot_offset + part.tensor.nbytes)
            assert slot[place] == expected[key][place]
    monkeypatch.undo()

    refused = []

    def refuse_first(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if not refused:
            refused.append(descriptor)
            raise OSError(22, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    file = adapter.experts[ExpertKey(0, 0)][0].file
    reader = FileReader(file)
    monkeypatch.setattr(os, "preadv", refuse_first)
    buffer = memoryview(mmap(-1, 4 * PAGE))
    reader.read_into(100, 5000, buffer, 100)
    assert refused and not reader.direct
    assert bytes(buffer[100:5100]) == file.read_bytes()[100:5100]


def flip(file: Path, offset: int) -> None:
    """Change one bit and leave size and modification time as they were, as a failing disk would."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def copied(chat_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A model folder of our own to damage: sharded, as published."""
    import shutil

    return Path(shutil.copytree(chat_folder("qwen3_moe"), tmp_path / "model"))


def test_changed_bytes_are_found_by_checksum_in_the_same_and_in_a_later_run(copied: Path) -> None:
    adapter = TransformersAdapter(copied)
    key = ExpertKey(1, 3)
    tensor = adapter.experts[key][0]
    store = SafetensorsStore(adapter.experts)
    slot_of(store, key)
    flip(tensor.file, tensor.offset + 10)
    with pytest.raises(ExpertReadError, match="layer 1 expert 3"):
        slot_of(store, key)
    store.close()
    with pytest.raises(ExpertReadError, match="layer 1 expert 3"):
        slot_of(SafetensorsStore(adapter.experts), key)
    # A replaced file is another file, not a damaged one.
    tensor.file.touch()
    slot_of(SafetensorsStore(adapter.experts), key)


def test_a_file_that_shrinks_while_in_use(copied: Path) -> None:
    adapter = TransformersAdapter(copied)
    key, stored = max(adapter.experts.items(), key=lambda item: item[1][-1].offset)
    for direct in (True, False):
        store = SafetensorsStore(adapter.experts, direct=direct)
        os.truncate(stored[-1].file, stored[-1].offset + 5)
        with pytest.raises(ExpertReadError, match="too early"):
            slot_of(store, key)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def swap(folder: Path) -> None:
    first, second = shards(folder)[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def replace_by_other_model(folder: Path) -> None:
    with safe_open(shards(folder)[2], "pt") as reader:
        names = list(reader.keys())
    save_file({name: torch.zeros(3, 3) for name in names}, shards(folder)[2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: shards(f)[1].unlink(), "is missing"),
    "truncated shard": (lambda f: os.truncate(shards(f)[1], shards(f)[1].stat().st_size - 9), "truncated"),
    "empty shard": (lambda f: shards(f)[1].write_bytes(b""), "no safetensors header"),
    "garbage shard": (
        lambda f: shards(f)[1].write_bytes(b"<html>not found</html>" * 99),
        "no safetensors header",
    ),
    "swapped shards": (swap, "not the one that the index describes"),
    "shard of another model": (replace_by_other_model, "do not match"),
    "garbled index": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight'), "no weight map"),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), "no JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_told_before_anything_runs(copied: Path, damage: str) -> None:
    action, sentence = DAMAGES[damage]
    action(copied)
    with pytest.raises(DamagedFileError, match=sentence) as caught:
        adapter = TransformersAdapter(copied)
        adapter.load()
    assert caught.value.hint


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_tensors(tmp_path)


def test_only_the_files_of_the_index_are_read(copied: Path) -> None:
    """Some repositories hold a second copy of the weights beside the sharded one."""
    (copied / "consolidated.safetensors").write_bytes(b"not even a safetensors file")
    assert read_tensors(copied)


def test_the_memory_store_holds_the_same_bytes(chat_folder: Callable[..., Path]) -> None:
    store = SafetensorsStore(TransformersAdapter(chat_folder("gpt_oss")).experts)
    copy = MemoryStore.copy_of(store)
    assert list(copy.experts()) == list(store.experts())
    for key in store.experts():
        ours, theirs = slot_of(copy, key), slot_of(store, key)
        for extent in store.layout(key).extents:
            place = slice(extent.slot_offset, extent.slot_offset + extent.nbytes)
            assert ours[place] == theirs[place]


def test_a_running_checksum_is_that_of_the_whole_in_whatever_order_chunks_arrive() -> None:
    content = bytes(range(256)) * (5 * PAGE // 256)
    file = Path("any")
    chunks = [Extent(file, at * PAGE, PAGE, at * PAGE) for at in range(5)]
    random = Random(0)
    for _ in range(20):
        running, slot, order = RunningChecksum(chunks), bytearray(5 * PAGE), list(chunks)
        random.shuffle(order)

        def bring(chunk: Extent, running: RunningChecksum = running, slot: bytearray = slot) -> None:
            slot[chunk.offset : chunk.offset + PAGE] = content[chunk.offset : chunk.offset + PAGE]
            running.arrived(chunk, memoryview(slot))

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(bring, order))
        assert running.hexdigest() == checksum([content])


def test_a_running_checksum_takes_chunks_in_before_the_last_is_there() -> None:
    chunks = [Extent(Path("any"), at * PAGE, PAGE, at * PAGE) for at in range(3)]
    slot = memoryview(bytearray(3 * PAGE))
    running = RunningChecksum(chunks)
    for chunk in (chunks[1], chunks[0]):
        running.arrived(chunk, slot)
    # What was taken in may change: nobody looks at it again.
    slot[: 2 * PAGE] = b"\1" * 2 * PAGE
    running.arrived(chunks[2], slot)
    assert running.hexdigest() == checksum([bytes(3 * PAGE)])


@pytest.mark.parametrize(
    ("files", "reports"),
    [
        ({}, False),
        ({"virtio/drivers/virtio_balloon/virtio0/features": "0110010100"}, True),
        ({"virtio/drivers/virtio_balloon/virtio0/features": "0110000100"}, False),
        ({"virtio/drivers/virtio_balloon/virtio0/features": "011"}, False),
        (
            {
                "virtio/drivers/virtio_balloon/bind": "",
                "virtio/drivers/virtio_blk/virtio1/features": "111111",
            },
            False,
        ),
        ({"vmbus/drivers/hv_balloon/1eccfd72-4b41-45ef-b73a-4a6e44c12924/id": "1"}, True),
        ({"vmbus/drivers/hv_balloon/uevent": ""}, False),
    ],
)
def test_huge_pages_are_not_asked_of_a_host(files: dict[str, str], reports: bool, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert reports_free_memory(tmp_path) is reports


def test_slots_have_the_pages_that_are_best(monkeypatch: pytest.MonkeyPatch) -> None:
    if slot_memory.HUGEPAGE is None or not Path("/proc/self/smaps").exists():
        pytest.skip("this system has no such pages, or does not tell of them")
    for advice, flag in ((slot_memory.HUGEPAGE, "hg"), (slot_memory.NOHUGEPAGE, "nh")):
        monkeypatch.setattr(slot_memory, "best_pages", lambda advice=advice: advice)
        monkeypatch.setattr(slots, "best_pages", lambda advice=advice: advice)
        pool = slots.SlotPool(4, 4 << 20)
        assert flag in _flags(pool.address(0))
        held = [pool.take() for _ in range(2)]
        pool.resize(2)
        assert "nh" in _flags(pool.address(0)), "nobody fills up what is given back"
        pool.resize(4)
        assert flag in _flags(pool.address(0)) and len(held) == 2


def _flags(address: int) -> list[str]:
    """How the kernel treats the mapping that ``address`` lies in."""
    inside, found = False, list[str]()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "VmFlags:":
            found = line.split()[1:]
    return found
