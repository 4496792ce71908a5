"""The engine with a device's memory in front of RAM, on a stand-in for a GPU that is late wherever it may be."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.device_compute import DeviceBlocks
from moei_core.engine.device_slots import LinkedSlotPool
from moei_core.engine.devices import CpuDevice, Device
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.placement import measure_costs
from moei_core.engine.tiered_runtime import TieredRuntime
from moei_core.errors import DoesNotFitError, ExpertReadError, UsageError
from moei_core.hardware.budget import LEAST_RING
from moei_core.hub.resolve import resolve_model
from moei_core.prefetch import PrefetchMode
from moei_core.quant.formats import FORMATS, decode
from moei_core.quant.layouts import to_layout
from moei_core.store.base import Extent, StoredTensor
from moei_core.store.safetensors_store import SafetensorsStore
from moei_core.tiers import LinkCosts, TieredScheduler
from moei_core.types import ExpertKey, Phase
from tests.core.test_exactness import prompt_tokens, reference, smallest, stepwise
from tests.mxfp4_checkpoint import save_mxfp4
from tests.packed import pack_folder
from tests.tiny_models import FAMILIES

COSTS = LinkCosts(20e9, 1e-6, 40e9)
"""A usual machine: RAM is read twice as fast as the link copies."""


def cpu_device() -> CpuDevice:
    """Late by up to two milliseconds, copies and computing each in a rhythm of their own."""
    rng = random.Random(3)
    late = [rng.random() * 0.002 if rng.random() < 0.1 else 0.0 for _ in range(997)]
    at = [0, 500]

    def delay(which: int) -> float:
        at[which] = (at[which] + 1) % len(late)
        return late[at[which]]

    return CpuDevice(copy_delay=lambda: delay(0), compute_delay=lambda: delay(1))


def cuda_device() -> Device:
    from moei_core.engine.cuda_device import CudaDevice

    return CudaDevice()


DEVICES = [pytest.param(cpu_device, id="cpu"), pytest.param(cuda_device, id="cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def folder(request: pytest.FixtureRequest, chat_folder: Callable[..., Path]) -> Path:
    name, dtype = request.param if isinstance(request.param, tuple) else (request.param, "bfloat16")
    return resolve_model(name).folder if name == "moei-demo" else chat_folder(name, dtype)


def vram_for(folder: Path, share: float, dtype: str | None) -> int:
    """Bytes of device memory of which ``share`` of all experts may stay."""
    with LoadedModel(folder, LoadOptions(dtype=dtype), CpuDevice()) as loaded:
        assert loaded.device_budget is not None
        budget = loaded.device_budget
        others = sum(line.nbytes for line in budget.lines[:-1])
        return others + (int(share * loaded.spec.total_experts) + LEAST_RING) * budget.slot_nbytes


def decoded(loaded: LoadedModel, forced: list[int] | None = None) -> tuple[torch.Tensor, list[int]]:
    """As ``stepwise``, single tokens through the recordings of the device where the model can be recorded."""
    torch.set_num_threads(1)
    cache = ConversationCache(loaded.adapter.config)
    prompt = prompt_tokens(loaded.adapter.config.vocab_size)
    place = loaded.adapter.model.device

    def model(tokens: torch.Tensor, **kwargs: object) -> object:
        count = tokens.shape[-1]
        loaded.runtime.forward_pass(Phase.DECODE if count == 1 else Phase.PREFILL, count)
        if count == 1 and loaded.graphs is not None and loaded.graphs.takes(cache):
            output: object = SimpleNamespace(logits=loaded.graphs.forward(int(tokens), cache).view(1, 1, -1))
        else:
            output = loaded.adapter.model(tokens.to(place), **kwargs)
        cache.commit(tokens[0].tolist())
        return output

    return stepwise(model, cache.cache, prompt, forced)  # type: ignore[arg-type]


def ours(
    make_device: Callable[[], Device],
    folder: Path,
    dtype: str,
    share: float,
    misses: str,
    ram: ExpertBudget,
    forced: list[int] | None = None,
    predictor: str | None = None,
) -> tuple[torch.Tensor, list[int], LoadedModel]:
    options = LoadOptions(
        experts=ram,
        dtype=dtype,
        vram=vram_for(folder, share, dtype),
        misses=misses,
        predictor=predictor,
        prefetch=PrefetchMode.ON,
    )
    with LoadedModel(folder, options, make_device(), COSTS) as loaded:
        logits, tokens = decoded(loaded, forced)
        return logits.cpu(), tokens, loaded


@pytest.mark.sampled(2)
@pytest.mark.parametrize("make_device", DEVICES)
@pytest.mark.parametrize("folder", [*FAMILIES, "moei-demo"], indirect=True)
def test_e1_with_copies_no_budget_of_any_tier_changes_a_bit(
    folder: Path, make_device: Callable[[], Device]
) -> None:
    everything, tokens, loaded = ours(make_device, folder, "bfloat16", 1, "copy", ExpertBudget(fraction=1.0))
    assert isinstance(loaded.scheduler, TieredScheduler)
    assert loaded.scheduler.device_statistics.evictions == 0
    for share, ram in ((0.5, ExpertBudget(fraction=0.5)), (0.25, smallest(folder)), (0.0, smallest(folder))):
        logits, _, loaded = ours(make_device, folder, "bfloat16", share, "copy", ram, tokens)
        work, scheduler = loaded.runtime.statistics, loaded.scheduler
        assert isinstance(scheduler, TieredScheduler)
        assert work.copies == scheduler.device_statistics.misses > 0
        assert work.expert_compute_s > 0 and work.promotions == 0
        assert torch.equal(logits, everything), (share, ram)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make_device", DEVICES)
@pytest.mark.parametrize("misses", ["auto", "copy"])
@pytest.mark.parametrize("folder", [*FAMILIES, "moei-demo"], indirect=True)
def test_e2_float32_is_transformers_eager(
    folder: Path, misses: str, make_device: Callable[[], Device]
) -> None:
    expected, expected_tokens = reference(folder, torch.float32, "eager")
    for share in (1.0, 0.25):
        logits, tokens, _ = ours(make_device, folder, "float32", share, misses, smallest(folder))
        assert tokens == expected_tokens
        assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("folder", ["moei-demo"], indirect=True)
def test_by_cost_all_three_ways_are_taken(folder: Path) -> None:
    """Many tokens are copied, few are computed in RAM, and some of those are promoted."""
    _, _, loaded = ours(cpu_device, folder, "float32", 0.25, "auto", ExpertBudget(fraction=0.5))
    scheduler, work = loaded.scheduler, loaded.runtime.statistics
    assert isinstance(scheduler, TieredScheduler)
    counts = scheduler.device_statistics
    assert counts.hits > 0 and work.promotions > 0, (counts, work)
    assert work.promotions < work.copies < counts.misses
    assert loaded.runtime.misses == scheduler.statistics.misses < counts.misses


def residents(loaded: LoadedModel) -> tuple[set[ExpertKey], set[ExpertKey]]:
    """What the brain believes to be on the device, and what is there."""
    assert isinstance(loaded.scheduler, TieredScheduler) and isinstance(loaded.runtime, TieredRuntime)
    return set(loaded.scheduler.device.cache.residents()), set(loaded.runtime._on_device)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After as many reads as the list's only number says, every read fails."""
    left = [1 << 30]
    read = SafetensorsStore.read_extent

    def read_extent(self: SafetensorsStore, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ExpertReadError("The disk is gone.")
        read(self, key, extent, slot)

    monkeypatch.setattr(SafetensorsStore, "read_extent", read_extent)
    yield left


@pytest.mark.parametrize("misses", ["auto", "copy"])
def test_a_failed_read_leaves_both_tiers_as_they_really_are(failing: list[int], misses: str) -> None:
    folder = resolve_model("moei-demo").folder
    options = LoadOptions(
        experts=ExpertBudget(fraction=0.05), vram=vram_for(folder, 0.4, None), misses=misses
    )

    def ask(session: ChatSession) -> str:
        return "".join(piece.text for piece in session.reply("What does moei do?"))

    with LoadedModel(folder, options, cpu_device(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=12, temperature=0))
        expected = ask(session)
        for after in (0, 5, 20):
            session.clear()
            failing[0] = after
            with pytest.raises(ExpertReadError):
                ask(session)
            failing[0] = 1 << 30
            believed, there = residents(loaded)
            assert believed == there
            session.clear()
            assert ask(session) == expected


@pytest.mark.parametrize("predictor", ["router", "markov"])
def test_prefetching_into_ram_passes_over_what_the_device_holds(predictor: str) -> None:
    folder = resolve_model("moei-demo").folder
    ram = ExpertBudget(fraction=0.15)
    plain, tokens, _ = ours(cpu_device, folder, "bfloat16", 0.2, "copy", ram)
    logits, _, loaded = ours(cpu_device, folder, "bfloat16", 0.2, "copy", ram, tokens, predictor)
    assert torch.equal(logits, plain)
    assert loaded.scheduler.prefetch_statistics.started > 0


@pytest.mark.parametrize("layout", ["plain", "rows16"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "MXFP4"])
def test_the_device_decodes_blocks_to_their_exact_values(name: str, layout: str) -> None:
    shape = (48, 96)
    rng = np.random.default_rng(0)
    encode = FORMATS[name].encode
    if encode is None:
        blocks = rng.integers(0, 256, (48 * 3, 17), np.uint8)
        blocks[:, 0] = rng.integers(0, 130, len(blocks))  # subnormal scales too
        plain = blocks.reshape(-1)
    else:
        plain = encode(rng.standard_normal(shape).astype(np.float32).reshape(-1, 32)).reshape(-1)
    tensor = StoredTensor("up_proj", 0, Path(), 0, len(plain), name, shape, layout=layout)
    matrix = DeviceBlocks(tensor, torch.from_numpy(to_layout(layout, name, plain, shape).copy()))
    assert torch.equal(matrix.decode(torch.float32), torch.from_numpy(decode(name, plain, shape)))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_e1_holds_for_packed_experts(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    pack_folder(resolve_model("moei-demo").folder, folder, name, "rows16")
    everything, tokens, _ = ours(cpu_device, folder, "float32", 1, "copy", ExpertBudget(fraction=0.5))
    logits, _, loaded = ours(cpu_device, folder, "float32", 0.1, "copy", ExpertBudget(fraction=0.2), tokens)
    assert loaded.runtime.statistics.copies > 0
    assert torch.equal(logits, everything)


def test_e1_holds_for_published_mxfp4(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path)
    everything, tokens, _ = ours(cpu_device, folder, "float32", 1, "copy", ExpertBudget(fraction=0.5))
    logits, _, loaded = ours(cpu_device, folder, "float32", 0.1, "copy", ExpertBudget(fraction=0.3), tokens)
    assert loaded.runtime.statistics.copies > 0
    assert torch.equal(logits, everything)


@pytest.mark.parametrize("form", [None, "Q4_0"])
def test_costs_are_measured_on_the_models_own_slots(
    form: str | None, tmp_path: Path, chat_folder: Callable[..., Path]
) -> None:
    """A device whose every copy is late has a slow link; the slots that were measured on are free again."""
    folder = chat_folder("mixtral", "bfloat16")
    if form is not None:
        pack_folder(folder, tmp_path / "packed", form, "rows16")
        folder = tmp_path / "packed"
    found = []
    for delay in (0.0, 0.02):
        with LoadedModel(folder, LoadOptions(), CpuDevice(copy_delay=lambda: delay)) as loaded:  # noqa: B023
            runtime = loaded.runtime
            assert isinstance(runtime, TieredRuntime)
            pool, free = runtime._linked_pool, runtime._linked_pool.free
            _, layer, module = next(experts_modules(loaded.adapter.model))
            layout = runtime._store.layout(ExpertKey(layer, 0))
            costs = measure_costs(runtime.device, runtime._device_slots, pool, module, layout, loaded.spec)
            assert pool.free == free == loaded.budget.slots
            assert 0 < costs.ram_bandwidth < 1e12
            found.append(costs.copy_seconds(layout.nbytes))
    assert found[1] > 0.015 > found[0]


def test_a_device_that_is_too_small() -> None:
    folder = resolve_model("moei-demo").folder
    with LoadedModel(folder, LoadOptions(), CpuDevice(1 << 20)) as loaded:
        assert loaded.device_budget is None and not isinstance(loaded.runtime, TieredRuntime)
        assert any("The GPU is not used" in note and "too small" in note for note in loaded.notes)
    with pytest.raises(DoesNotFitError, match="--vram"):
        LoadedModel(folder, LoadOptions(vram=1 << 20), CpuDevice())


def test_options_that_cannot_be() -> None:
    folder = resolve_model("moei-demo").folder
    for options, sentence in (
        (LoadOptions(device="tpu"), "no device 'tpu'"),
        (LoadOptions(misses="sometimes"), "no such way"),
        (LoadOptions(device="cpu", vram=1 << 30), "--vram needs a GPU, and --device cpu rules it out"),
        (LoadOptions(vram=1 << 30), "--vram needs a GPU, and torch finds none"),
        (LoadOptions(misses="copy"), "--misses needs a GPU"),
        (LoadOptions(device="cuda"), "--device cuda needs a GPU"),
    ):
        with pytest.raises(UsageError, match=sentence):
            LoadedModel(folder, options)


def test_the_report_of_a_turn_counts_both_tiers_and_the_link() -> None:
    folder = resolve_model("moei-demo").folder
    options = LoadOptions(experts=ExpertBudget(fraction=0.25), vram=vram_for(folder, 0.25, None))
    with LoadedModel(folder, options, CpuDevice(), COSTS) as loaded:
        session = ChatSession(loaded, GenerationSettings(max_new_tokens=8, temperature=0))
        for _ in range(2):
            list(session.reply("What does moei do?"))
        assert session.report is not None
        told = session.report.as_dict()
        there, work = told["device"], loaded.runtime.statistics
        assert 0 < there["bytes_copied"] < work.bytes_copied
        assert there["bytes_copied"] >= there["copies"] * min(loaded.spec.expert_nbytes.values())
        assert told["hits"] + told["misses"] == there["misses"] > 0 and there["hits"] > 0
        assert told["time_split_s"]["gpu"] >= 0
        assert sum(told["time_split_s"].values()) == pytest.approx(told["total_s"], abs=0.01)
        assert loaded.device_budget is not None
        assert sum(line.nbytes for line in loaded.device_budget.lines) <= options.vram  # type: ignore[operator]


@pytest.mark.parametrize("make_device", DEVICES)
def test_a_queue_does_what_events_say(make_device: Callable[[], Device]) -> None:
    """Copies wait for what is computed where they are told to, and the other way round; the host waits for events."""
    device = make_device()
    try:
        host = np.arange(4096, dtype=np.uint8)
        target = device.allocate(4096)
        first = device.copy_in(memoryview(host), target, None)
        seen: list[torch.Tensor] = []
        device.compute_after(first)
        device.compute(lambda: seen.append(target.clone()))
        used = device.mark()
        other = host[::-1].copy()
        second = device.copy_in(memoryview(other), target, used)
        second.wait()
        assert first.done() and second.done() and used.done()
        device.finish()
        then, now = device.read_back(seen[0], target)
        assert torch.equal(then.cpu(), torch.from_numpy(host))
        assert torch.equal(now.cpu(), torch.from_numpy(other))
        assert torch.equal(device.read_back(device.bring(torch.arange(3)))[0], torch.arange(3))
    finally:
        device.close()


def test_what_computing_raises_surfaces_once() -> None:
    device = CpuDevice()
    device.compute(lambda: torch.zeros(2).view(3))  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError):
        device.finish()
    device.finish()
    device.close()


def test_host_slots_are_locked_while_they_may_be_copied_and_free_when_copies_end() -> None:
    device = CpuDevice(copy_delay=lambda: 0.05)
    pool = LinkedSlotPool(4, 4096, device)
    slots = [pool.take() for _ in range(3)]
    assert set(device.registered) == {pool.address(slot) for slot in slots}
    target = device.allocate(4096)
    pool.view(slots[0])[:] = b"a" * 4096
    event = device.copy_in(pool.view(slots[0]), target, None)
    pool.read_until(slots[0], event)
    pool.give_back(slots[0])
    pool.give_back(slots[1])
    assert pool.free == 2 and not event.done(), "there are others: nobody waits"
    assert {pool.take(), pool.take()} == {slots[1], 3}
    assert pool.statistics.link_s == 0.0
    assert pool.take() == slots[0] and event.done()
    assert pool.statistics.link_s > 0.0, "that was waiting for the link"
    for slot in range(4):
        pool.give_back(slot)
    pool.resize(2)
    assert not device.registered, "what may go back to the system is not locked"
    pool.resize(4)
    slots = [pool.take() for _ in range(4)]
    pool.resize(1)
    for slot in slots:
        pool.give_back(slot)
    assert pool.free == 1 and len(device.registered) == 1, (
        "so is what came back when the pool had become smaller"
    )
    pool.take()
    pool.close()
    assert not device.registered
    device.close()
