"""Slots change hands between residents and prefetches while a chat runs: none is lost, and no bit changes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hub.resolve import resolve_model
from moei_core.prefetch import PrefetchController
from moei_core.types import FetchPlan
from tests.watched_plans import watch_plans


def reply(predictor: str | None, share: float) -> tuple[str, LoadedModel, list[FetchPlan]]:
    """An answer, and the plans it took. At every access all slots are accounted for."""
    options = LoadOptions(experts=ExpertBudget(fraction=share), predictor=predictor)
    with LoadedModel(resolve_model("moei-demo").folder, options) as model:
        model.runtime.governor = None
        runtime, scheduler = model.runtime, model.scheduler

        def account() -> None:
            queue = runtime._transfers
            with queue._lock:
                # What is abandoned is written to until its threads have noticed; what has arrived waits for its router.
                coming = {load.slot for load in [*queue._active, *queue._prefetches.values()]}
                slots = [*queue._spares, *coming, *queue._returned, *queue._lent]
            slots += [*runtime._slots.values(), *runtime._pool._free]
            assert sorted(slots) == list(range(model.budget.slots))

        def fit(plan: FetchPlan) -> None:
            resident = scheduler.resident_count
            assert resident + plan.prefetch_slots + model.budget.working <= model.budget.slots

        plans = watch_plans(model, account, fit)
        session = ChatSession(model, GenerationSettings(max_new_tokens=40, temperature=0))
        text = "".join(piece.text for piece in session.reply("What does moei do?"))
    return text, model, plans


@pytest.mark.parametrize("predictor", ["noise", "mixed"])
@pytest.mark.parametrize("share", [0.07, 0.25])
def test_no_slot_is_lost_when_trials_begin_and_end(
    predictor: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WARM_UP", "EVIDENCE", "LEARN", "WINDOW", "WAIT", "FEW_PAIRS", "LEAST_PAIRS", "MOST_PAIRS"):
        monkeypatch.setattr(PrefetchController, name, 2)
    # Whatever the clock says: no trial is called off before the challenger has prefetched.
    for name, value in (("LEAST_WAITING", 0.0), ("ABORT", 1e9), ("DOUBT", 1e9)):
        monkeypatch.setattr(PrefetchController, name, value)
    expected, _, _ = reply(None, share)
    text, model, plans = reply(predictor, share)
    assert text == expected
    taken = [plan.prefetch_slots for plan in plans]
    changes = sum(one != other for one, other in pairwise(taken))
    assert changes >= 2 and set(taken) == {0, model.budget.spare}
    assert model.scheduler.prefetch_statistics.started > 0
