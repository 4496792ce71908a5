"""Experts of unequal layers: more of the small ones in the same memory, never more memory, and the same answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.expert_sizes import ExpertSizes, experts_in
from moei_core.cache.policies import LIVE_POLICIES, POLICIES
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.slots import SizedSlotPool, SlotPool, unequal_sizes
from moei_core.errors import DoesNotFitError, ExpertReadError
from moei_core.hub.gguf_model import gguf_folder
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import Observer, replay
from moei_core.store.base import Extent
from moei_core.store.file_store import FileStore
from moei_core.trace import read_trace
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase
from tests.gguf_checkpoint import save_gguf
from tests.watched_plans import slots_of, watch_plans

PAGE = 4096


def pages_of(pool: SlotPool) -> int:
    """Bytes of the pool's mapping that the kernel has given pages for."""
    address = pool.address(0)
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        start = line.split("-")[0]
        if "-" in line.split(" ")[0] and int(start, 16) <= address < int(
            line.split(" ")[0].split("-")[1], 16
        ):
            return next(int(one.split()[1]) << 10 for one in lines if one.startswith("Rss:"))
    raise AssertionError("the pool is not mapped")


@pytest.mark.parametrize("nbytes", [(3, 5), (9, 10, 4), (1, 64)])
def test_a_pool_never_has_more_pages_than_its_slots(nbytes: tuple[int, ...]) -> None:
    rng = random.Random(str(nbytes))
    by_layer = {layer: PAGE * size for layer, size in enumerate(nbytes)}
    sizes = ExpertSizes(by_layer, dict.fromkeys(by_layer, 20))
    count, allowed = 12, 12
    pool = SizedSlotPool(count, sizes)
    held: dict[int, tuple[int, int]] = {}
    spares: list[int] = []
    most = 0
    for step in range(4000):
        layer = rng.randrange(len(nbytes))
        wanted = rng.random()
        if wanted < 0.5 and pool.has_room(layer):
            slot = pool.take(layer)
        elif wanted < 0.6 and pool.free:
            # For whatever will be prefetched, all of which may be written to.
            slot = pool.take()
            some = rng.randrange(1, sizes.largest + 1)
            pool.view(slot)[:some] = b"y" * some
            spares.append(slot)
            continue
        elif wanted < 0.7 and spares:
            slot = spares.pop()
            if rng.random() < 0.3:
                pool.view(slot)[:] = b"x" * sizes.largest
                pool.give_back(slot)
                continue
        elif wanted < 0.98 and held:
            slot = rng.choice(list(held))
            own, mark = held.pop(slot)
            assert bytes(pool.view(slot)[: sizes.nbytes[own]]) == bytes([mark]) * sizes.nbytes[own]
            pool.give_back(slot)
            continue
        else:
            allowed = rng.randrange(count // 2, count + 1)
            while sum(sizes.nbytes[own] for own, _ in held.values()) + len(spares) * sizes.largest > (
                allowed * sizes.largest
            ):
                pool.give_back(spares.pop() if spares else held.popitem()[0])
            pool.resize(allowed)
            continue
        mark = step % 256
        pool.view(slot)[: sizes.nbytes[layer]] = bytes([mark]) * sizes.nbytes[layer]
        pool.fit(slot, layer)
        held[slot] = layer, mark
        most = max(most, len(held))
        assert pool.committed <= allowed * sizes.largest
        if step % 20 == 0:
            assert pages_of(pool) <= pool.committed
    assert most > count, "small ones were no more than large ones"
    for slot in [*held, *spares]:
        pool.give_back(slot)
    pool.resize(count)
    assert pool.free == count and pool.committed == 0 and pages_of(pool) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer's experts take twice the bytes of the first one's."""
    path = tmp_path_factory.mktemp("unequal")
    return gguf_folder(save_gguf(path, "qwen3_moe_wide", experts=("Q4_K", "Q8_0")))


def load(folder: Path, share: float, **options: object) -> LoadedModel:
    return LoadedModel(folder, LoadOptions(experts=ExpertBudget(fraction=share), **options))  # type: ignore[arg-type]


def use_all(model: LoadedModel) -> None:
    """A pass over four tokens that choose all eight experts of each layer."""
    index = torch.arange(8).reshape(4, 2)
    hidden = torch.randn(4, model.spec.hidden_size, dtype=model.adapter.dtype)
    with torch.inference_mode():
        model.runtime.forward_pass(Phase.PREFILL, 4)
        for _, layer, module in experts_modules(model.adapter.model):
            weights = torch.full(index.shape, 0.5, dtype=hidden.dtype)
            model.runtime.run_layer(module, layer, hidden, index, weights)
        model.runtime.end_pass()


def test_half_of_the_bytes_hold_more_than_half_of_the_slots(folder: Path) -> None:
    with load(folder, 1.0) as model:
        sizes = model.budget.sizes
        assert sizes is not None and sizes == unequal_sizes(model.runtime._store, model.spec.num_experts)
        assert model.budget.slots == model.budget.resident == sizes.whole < sizes.total
        assert model.budget.experts == model.spec.total_experts
        use_all(model)
        assert model.scheduler.resident_count == model.spec.total_experts
        assert pages_of(model.runtime._pool) <= model.budget.nbytes
    with load(folder, 0.6, policy="layer-lru") as model:
        use_all(model)
        assert model.budget.resident < model.scheduler.resident_count < model.spec.total_experts
    with pytest.raises(DoesNotFitError, match="is too small: it pays for 1 of 13"):
        load(folder, 0.1)


def test_equal_layers_have_a_slot_each(tmp_path: Path) -> None:
    with LoadedModel(gguf_folder(save_gguf(tmp_path, "qwen3_moe_wide")), LoadOptions()) as model:
        assert model.budget.sizes is None and type(model.runtime._pool) is SlotPool


def test_what_is_resident_changes_no_answer(folder: Path) -> None:
    answers = set()
    for share, predictor in ((1.0, None), (0.6, None), (0.45, "noise"), (0.3, "router"), (0.2, None)):
        with load(folder, share, predictor=predictor, prefetch=PrefetchMode.ON) as model:
            session = ChatSession(model, GenerationSettings(max_new_tokens=16, temperature=0.0))
            answers.add("".join(piece.text for piece in session.reply("hello world, " * 20)))
            assert session.report is not None and (share == 1.0 or session.report.cache.misses)
    assert len(answers) == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("policy", LIVE_POLICIES)
def test_budgets_under_random_plans(policy: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and prompts, resizes, prefetches by noise, and reads that fail: neither memory nor a slot is lost."""
    rng = random.Random(policy)
    broken, read = [False], FileStore.read_extent

    def read_extent(self: FileStore, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        if broken[0]:
            raise ExpertReadError(f"Reading {key} failed.")
        read(self, key, extent, slot)

    monkeypatch.setattr(FileStore, "read_extent", read_extent)
    options = {"policy": policy, "predictor": "noise", "prefetch": PrefetchMode.ON, "context": 64}
    with load(folder, 0.6, **options) as model, torch.inference_mode():
        engine, brain, pool, spec = model.runtime, model.scheduler, model.runtime._pool, model.spec
        assert isinstance(pool, SizedSlotPool)
        modules = [(layer, module) for _, layer, module in experts_modules(model.adapter.model)]
        hidden = torch.randn(24, spec.hidden_size, dtype=model.adapter.dtype)
        least, allowed = model.budget.working + model.budget.spare, model.budget.slots
        failed = 0
        for _ in range(300):
            tokens = 1 if rng.random() < 0.8 else rng.randrange(2, 24)
            engine.forward_pass(Phase.DECODE if tokens == 1 else Phase.PREFILL, tokens)
            try:
                for layer, module in modules:
                    index = torch.stack([torch.randperm(8)[:2] for _ in range(tokens)])
                    broken[0] = rng.random() < 0.02
                    weights = torch.full(index.shape, 0.25, dtype=model.adapter.dtype)
                    engine.run_layer(module, layer, hidden[:tokens], index, weights)
                    assert pool.committed <= allowed * pool.slot_nbytes
                engine.end_pass()
            except ExpertReadError:
                failed += 1
            broken[0] = False
            assert set(brain.residents()) == set(engine._held) == set(engine._slots)
            if rng.random() < 0.1:
                allowed = rng.randrange(least, model.budget.slots + 1)
                engine.resize(allowed)
                assert pool.committed <= allowed * pool.slot_nbytes
                assert pages_of(pool) <= pool.committed
        assert failed
        engine.resize(model.budget.slots)
        engine._settle_prefetches()
        others = slots_of(engine._transfers)
        assert set(pool._held) == {*engine._slots.values()} | others, "a slot was lost"


class Collector(Observer):
    def __init__(self) -> None:
        self.plans: list[FetchPlan] = []

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_recorded_chat_replays_to_the_same_plans(share: float, folder: Path, tmp_path: Path) -> None:
    with load(folder, share, predictor="noise", prefetch=PrefetchMode.ON) as model:
        plans, budget, spec = watch_plans(model), model.budget, model.spec
        writer = model.record(tmp_path / "t", "unequal")
        writer.begin_sequence()
        writer.begin_request()
        session = ChatSession(model, GenerationSettings(max_new_tokens=24, temperature=0))
        list(session.reply("hello world, hello world"))
        model.runtime.resize(budget.slots - 1)
        writer.begin_request()
        list(session.reply("and what else?"))
        assert writer.close()
    made = POLICIES["learned"](experts_in(budget.resident, budget.sizes), spec.num_experts)
    simulated = ExpertScheduler(
        ExpertCache(budget.resident, made, sizes=budget.sizes),
        budget.working,
        PREDICTORS["noise"](spec.num_experts),
        PrefetchMode.ON,
        prefetch_slots=budget.spare,
        num_experts=spec.num_experts,
    )
    collector = Collector()
    replay(read_trace(tmp_path / "t"), simulated, collector, recorded_events=True)
    assert collector.plans == plans
    assert simulated.statistics == model.scheduler.statistics
