"""What only a real GPU can show: order between its streams, page-locked copies, other GPUs and threads, compilation."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.cuda_device import CudaDevice
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hub.resolve import resolve_model
from tests.packed import pack_folder

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.fixture
def device() -> CudaDevice:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    return CudaDevice()


def test_our_mapping_is_locked_where_it_lies_and_its_copies_do_not_wait(device: CudaDevice) -> None:
    pool = LinkedSlotPool(2, 64 * MIB, device)
    slot = pool.take()
    assert pool._locked == {slot: True}, "cudaHostRegister refused an anonymous mapping"
    view = torch.frombuffer(pool.view(slot), dtype=torch.uint8)
    assert view.is_pinned()
    target = device.allocate(64 * MIB)
    device.copy_in(pool.view(slot), target, None).wait()
    started = time.perf_counter()
    events = [device.copy_in(pool.view(slot), target, None) for _ in range(16)]
    queued = time.perf_counter() - started
    assert not events[-1].done(), f"a gigabyte was copied while it was queued, in {queued:.4f} s"
    events[-1].wait()
    pool.close()
    again = LinkedSlotPool(1, 64 * MIB, device)
    again.take()
    assert again._locked[0], "what was unlocked can be locked again"
    again.close()
    device.close()


def test_a_refused_lock_leaves_no_error_behind(device: CudaDevice) -> None:
    assert device.register(4096, 4096) is False
    assert torch.zeros(1, device=device.place).item() == 0
    device.close()


def test_copies_and_products_keep_their_order_over_many_rounds(device: CudaDevice) -> None:
    """Two host slots, two device slots, filled again and again: a missing wait shows as a wrong sum."""
    nbytes = 8 * MIB
    pool, slots = LinkedSlotPool(2, nbytes, device), DeviceSlots(device, 2, 2, nbytes)
    sums = []
    for turn in range(200):
        host, there = pool.take(), slots.take(stays=False)
        np.frombuffer(pool.view(host), np.uint8)[:] = turn
        target = slots.bytes_of(there, nbytes)
        ready = device.copy_in(pool.view(host), target, slots.last_use.get(there))
        pool.read_until(host, ready)
        device.compute_after(ready)
        sums.append(target.sum(dtype=torch.int64))
        slots.last_use[there] = device.mark()
        pool.give_back(host)
    found = device.read_back(torch.stack(sums))[0]
    assert found.tolist() == [turn * nbytes for turn in range(200)]
    pool.close()
    device.close()


def test_bringing_small_tensors_does_not_wait_for_what_is_computed(device: CudaDevice) -> None:
    big = torch.randn(8192, 8192, device=device.place)
    torch.cuda.synchronize()
    for _ in range(20):
        big @ big
    behind = device.mark()
    for _ in range(50):
        kept = device.bring(torch.arange(4096))
    assert not behind.done(), "the driver waited for the stream"
    assert torch.equal(device.read_back(kept)[0], torch.arange(4096))
    device.close()


def test_memory_of_blocks_goes_back_to_the_driver(device: CudaDevice) -> None:
    slots = DeviceSlots(device, 16, 2, 64 * MIB)
    before, _ = torch.cuda.mem_get_info(device.place)
    slots.vacate(slots.within(8), [])
    slots.shrink(slots.within(8))
    after, _ = torch.cuda.mem_get_info(device.place)
    assert after - before >= 7 * 64 * MIB
    device.close()


def test_fused_kernels_run(device: CudaDevice) -> None:
    if device.kernels is None and not device.note:
        pytest.skip("triton is not installed")
    assert device.note == ""
    device.close()


@pytest.mark.parametrize("form", [None, "Q8_0", "Q4_0"])
def test_a_chat_in_another_thread_compiles_nothing_late(
    form: str | None, device: CudaDevice, tmp_path: Path
) -> None:
    """The demo on the last GPU, from a thread that never chose a device."""
    device.close()
    folder = resolve_model("moei-demo").folder
    if form is not None:
        pack_folder(folder, tmp_path / form, form, "rows16")
        folder = tmp_path / form
    last = torch.cuda.device_count() - 1
    options = LoadOptions(experts=ExpertBudget(fraction=0.5), device=f"cuda:{last}", misses="copy")
    answers: list[str] = []
    with LoadedModel(folder, options) as model:
        assert model.device_budget is not None, model.notes

        def chat() -> None:
            session = ChatSession(model, GenerationSettings(max_new_tokens=16, temperature=0))
            for _ in range(2):
                session.clear()
                answers.append("".join(piece.text for piece in session.reply("What does moei do?")))

        thread = threading.Thread(target=chat)
        thread.start()
        thread.join()
    assert len(answers) == 2 and answers[0] == answers[1] != ""
