"""A prompt reads what it lacks exactly once, in the order of the file, whatever is resident and however it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from moei_core.config import ExpertBudget, GenerationSettings, Overlap
from moei_core.engine import runtime
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.transfers import TransferQueue
from moei_core.store.base import PAGE, Extent
from moei_core.store.file_store import FileStore
from moei_core.types import ExpertKey
from tests.packed import pack_folder


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.14, 0.5])
def test_once_and_in_order(
    share: float,
    packed: bool,
    stream: bool,
    chat_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = chat_folder("qwen3_moe")
    if packed:
        pack_folder(folder, tmp_path / "store", "Q8_0")
        folder = tmp_path / "store"
    places: list[tuple[ExpertKey, str, int, int]] = []
    read = FileStore.read_extent

    def watched(self: FileStore, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        places.append((key, str(extent.file), extent.offset, extent.nbytes))
        read(self, key, extent, slot)

    monkeypatch.setattr(FileStore, "read_extent", watched)
    # One reader, so that there is an order.
    monkeypatch.setattr(runtime, "TransferQueue", partial(TransferQueue, readers=1))
    options = LoadOptions(
        experts=ExpertBudget(fraction=share), context=512, overlap=Overlap(2 * PAGE, stream=stream)
    )
    with LoadedModel(folder, options) as model:
        session = ChatSession(model, GenerationSettings(max_new_tokens=2, temperature=0))
        list(session.reply("the first fills the cache"))
        session.clear()
        places.clear()
        resident = set(model.scheduler.residents())
        session.settings = GenerationSettings(max_new_tokens=1, temperature=0)
        list(
            session.reply(
                "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ !?,.;:- and so on"
            )
        )
        report, store = session.report, model.runtime._store
        assert report is not None
        assert report.cache.hits + report.cache.misses == model.spec.total_experts, (
            "the prompt needs every expert"
        )
        absent = set(store.experts()) - resident
        assert report.cache.misses >= len(absent) > 0
        assert report.runtime.loads == report.cache.misses
        found = Counter(places)
    assert set(found.values()) == {1}, "some bytes were read twice"
    assert {key for key, *_ in places} >= absent
    nbytes = Counter[ExpertKey]()
    for key, _, _, count in places:
        nbytes[key] += count
    assert all(nbytes[key] == store.layout(key).nbytes for key in nbytes)
    order = list(dict.fromkeys(key for key, *_ in places))
    by_place = sorted(
        order,
        key=lambda key: (
            key.layer,
            str(store.layout(key).extents[0].file),
            store.layout(key).extents[0].offset,
        ),
    )
    assert order == by_place
