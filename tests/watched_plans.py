"""The plans of a running model, whole: what its brain decides on a layer, and what it looks ahead to from there."""

from __future__ import annotations

from collections.abc import Callable

from moei_core.engine.loaded_model import LoadedModel
from moei_core.engine.transfers import TransferQueue
from moei_core.tiers import TieredScheduler
from moei_core.types import ExpertKey, FetchPlan, LayerAccess


def watch_plans(
    model: LoadedModel,
    before: Callable[[], None] = lambda: None,
    after: Callable[[FetchPlan], None] = lambda plan: None,
) -> list[FetchPlan]:
    """A list that every plan from now on is added to. before, after: called around each decision."""
    plans: list[FetchPlan] = []
    scheduler = model.scheduler
    own_decide, own_look_ahead = scheduler.decide, scheduler.look_ahead

    def decide(event: LayerAccess) -> FetchPlan:
        before()
        plans.append(own_decide(event))
        after(plans[-1])
        return plans[-1]

    def look_ahead(event: LayerAccess) -> tuple[ExpertKey, ...]:
        found = own_look_ahead(event)
        plan = plans[-1]._replace(prefetch=found)
        if isinstance(scheduler, TieredScheduler):
            assert plan.device is not None
            plan = plan._replace(device=plan.device._replace(prefetch=scheduler.to_device))
        plans[-1] = plan
        return found

    scheduler.decide = decide  # type: ignore[assignment, method-assign]
    scheduler.look_ahead = look_ahead  # type: ignore[method-assign]
    return plans


def slots_of(queue: TransferQueue) -> set[int]:
    """Those that the queue has: for prefetches, on their way, and back from what was given up."""
    loads = [*queue._active, *queue._prefetches.values()]
    return {load.slot for load in loads} | {*queue._spares, *queue._returned}
