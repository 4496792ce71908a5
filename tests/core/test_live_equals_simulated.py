"""A trace recorded from a live run replays to the same plans and counters: the product itself was simulated."""

from __future__ import annotations

from pathlib import Path

import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hub.resolve import resolve_model
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import Observer, replay
from moei_core.trace import read_trace
from moei_core.types import FetchPlan, LayerAccess

QUESTIONS = (("What does moei do?", "And what is an expert?"), ("What is the capital of France?",))
LIVE = [name for name, policy in POLICIES.items() if not getattr(policy, "needs_future", False)]


class Collector(Observer):
    def __init__(self) -> None:
        self.plans: list[FetchPlan] = []

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)


def record(options: LoadOptions, path: Path) -> tuple[list[FetchPlan], LoadedModel]:
    """Two conversations, recorded: the plans that were made, and the model as it was afterwards."""
    plans: list[FetchPlan] = []
    with LoadedModel(resolve_model("moei-demo").folder, options) as model:
        decide = model.scheduler.access

        def access(event: LayerAccess) -> FetchPlan:
            plans.append(decide(event))
            return plans[-1]

        model.scheduler.access = access  # type: ignore[method-assign]
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
    simulated = ExpertScheduler(
        ExpertCache(budget.resident, POLICIES[options.policy](budget.resident, spec.num_experts)),
        budget.working,
        PREDICTORS[options.predictor](spec.num_experts) if options.predictor else None,
        options.prefetch,
        num_experts=spec.num_experts,
    )
    collector = Collector()
    replay(read_trace(path), simulated, collector, recorded_events=True)
    return collector.plans, simulated


@pytest.mark.parametrize("share", [0.04, 0.25, 0.6])
@pytest.mark.parametrize("policy", LIVE)
def test_plans_and_counters(policy: str, share: float, tmp_path: Path) -> None:
    plans, model = record(LoadOptions(experts=ExpertBudget(fraction=share), policy=policy), tmp_path / "t")
    expected, simulated = replayed(tmp_path / "t", model)
    assert expected == plans
    assert simulated.statistics == model.scheduler.statistics
    assert simulated.statistics.misses > 0


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
