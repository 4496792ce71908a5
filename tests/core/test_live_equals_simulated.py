"""A trace recorded from a live run replays to the same plans and counters: the product itself was simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.devices import CpuDevice, Device
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.placement import device_tier
from moei_core.hub.resolve import resolve_model
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchController, PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import Observer, replay
from moei_core.tiers import LinkCosts, TieredScheduler
from moei_core.trace import read_trace
from moei_core.types import FetchPlan, LayerAccess
from tests.watched_plans import watch_plans

QUESTIONS = (("What does moei do?", "And what is an expert?"), ("What is the capital of France?",))
LIVE = [name for name, policy in POLICIES.items() if not getattr(policy, "needs_future", False)]


class Collector(Observer):
    def __init__(self) -> None:
        self.plans: list[FetchPlan] = []

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)


COSTS = LinkCosts(20e9, 1e-6, 40e9)


def record(
    options: LoadOptions, path: Path, device: Device | None = None
) -> tuple[list[FetchPlan], LoadedModel]:
    """Two conversations, recorded: the plans that were made, and the model as it was afterwards."""
    with LoadedModel(resolve_model("moei-demo").folder, options, device, COSTS) as model:
        plans = watch_plans(model)
        writer = model.record(path, "moei-demo")
        for conversation in QUESTIONS:
            session = ChatSession(model, GenerationSettings(max_new_tokens=12, temperature=0))
            writer.begin_sequence()
            for question in conversation:
                writer.begin_request()
                list(session.reply(question))
        assert writer.close()
    return plans, model


def replayed(path: Path, model: LoadedModel) -> tuple[list[FetchPlan], ExpertScheduler]:
    """The same trace and its events through a scheduler of the same making."""
    budget, spec, options = model.budget, model.spec, model.options
    cache = ExpertCache(budget.resident, POLICIES[options.policy](budget.resident, spec.num_experts))
    predictor = PREDICTORS[options.predictor](spec.num_experts) if options.predictor else None
    simulated: ExpertScheduler
    beside: dict[str, Any] = {"prefetch_slots": budget.spare, "num_experts": spec.num_experts}
    if model.device_budget is None:
        simulated = ExpertScheduler(cache, budget.working, predictor, options.prefetch, **beside)
    else:
        front = POLICIES[options.policy](model.device_budget.resident, spec.num_experts)
        tier = device_tier(model.device_budget, front, spec, options.misses, COSTS)
        simulated = TieredScheduler(cache, budget.working, tier, predictor, options.prefetch, **beside)
    collector = Collector()
    replay(read_trace(path), simulated, collector, recorded_events=True)
    return collector.plans, simulated


@pytest.mark.sampled(3)
@pytest.mark.parametrize("share", [0.04, 0.25, 0.6])
@pytest.mark.parametrize("policy", LIVE)
def test_plans_and_counters(policy: str, share: float, tmp_path: Path) -> None:
    plans, model = record(LoadOptions(experts=ExpertBudget(fraction=share), policy=policy), tmp_path / "t")
    expected, simulated = replayed(tmp_path / "t", model)
    assert expected == plans
    assert simulated.statistics == model.scheduler.statistics
    assert simulated.statistics.misses > 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("share", [0.07, 0.25, 0.6])
@pytest.mark.parametrize("predictor", sorted({*PREDICTORS} - {"stride"}))
def test_with_prefetches_as_they_came(predictor: str, share: float, tmp_path: Path) -> None:
    """When each prefetch began and ended depends on the disk; the trace has kept it."""
    options = LoadOptions(experts=ExpertBudget(fraction=share), predictor=predictor, prefetch=PrefetchMode.ON)
    plans, model = record(options, tmp_path / "t")
    expected, simulated = replayed(tmp_path / "t", model)
    assert expected == plans
    assert simulated.statistics == model.scheduler.statistics
    assert simulated.prefetch_statistics == model.scheduler.prefetch_statistics
    assert simulated.prefetch_statistics.started > 0


def test_when_the_controller_decides_by_the_time_that_passes_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a few passes for each of its steps, some learn, some prefetch and most do neither."""
    for name in ("WARM_UP", "EVIDENCE", "LEARN", "WINDOW", "WAIT", "FEW_PAIRS", "LEAST_PAIRS", "MOST_PAIRS"):
        monkeypatch.setattr(PrefetchController, name, 2)
    monkeypatch.setattr(PrefetchController, "LEAST_WAITING", 0.0)
    options = LoadOptions(experts=ExpertBudget(fraction=0.25), predictor="mixed", prefetch=PrefetchMode.AUTO)
    plans, model = record(options, tmp_path / "t")
    expected, simulated = replayed(tmp_path / "t", model)
    assert expected == plans
    assert simulated.controller.trials == model.scheduler.controller.trials > 0
    assert simulated.controller.kept == model.scheduler.controller.kept
    assert simulated.prefetch_statistics == model.scheduler.prefetch_statistics
    assert simulated.prefetch_statistics.started > 0
    assert {plan.prefetch_slots for plan in plans} == {0, model.budget.spare}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("misses", ["auto", "copy"])
@pytest.mark.parametrize("policy", LIVE)
@pytest.mark.parametrize("prefetch", [PrefetchMode.AUTO, PrefetchMode.ON], ids=["auto", "on"])
def test_two_tiers(prefetch: PrefetchMode, policy: str, misses: str, tmp_path: Path) -> None:
    """What the device holds, copies, promotes and prefetches is part of the plans."""
    budget = ExpertBudget(fraction=0.25)
    with LoadedModel(resolve_model("moei-demo").folder, LoadOptions(), CpuDevice()) as whole:
        assert whole.device_budget is not None
        absent = whole.spec.total_experts * 3 // 4
        vram = sum(line.nbytes for line in whole.device_budget.lines) - absent * whole.budget.slot_nbytes
    options = LoadOptions(
        experts=budget, policy=policy, predictor="markov", vram=vram, misses=misses, prefetch=prefetch
    )
    plans, model = record(options, tmp_path / "t", CpuDevice())
    expected, simulated = replayed(tmp_path / "t", model)
    assert expected == plans
    assert simulated.statistics == model.scheduler.statistics
    assert isinstance(simulated, TieredScheduler) and isinstance(model.scheduler, TieredScheduler)
    assert simulated.device_statistics == model.scheduler.device_statistics
    assert simulated.device.prefetch_statistics == model.scheduler.device.prefetch_statistics
    assert simulated.device_statistics.misses > 0
    if policy != "on-demand":
        assert (simulated.device.prefetch_statistics.useful > 0) == (prefetch is PrefetchMode.ON)
    if policy not in ("on-demand", "static"):
        assert simulated.device_statistics.hits > 0 and simulated.device_statistics.evictions > 0
