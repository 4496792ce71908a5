"""Copies ahead of their router, with copies that end when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moei_core.adapters.skeleton import experts_modules
from moei_core.config import ExpertBudget
from moei_core.engine.copies_ahead import CopiesAhead
from moei_core.engine.layer_work import Choice
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.tiered_runtime import TieredRuntime
from moei_core.types import DevicePlan, ExpertKey, FetchPlan, Phase
from tests.core.stepped import SteppedDevice
from tests.core.test_tiers import COSTS, vram_for

KEYS = [ExpertKey(1, expert) for expert in range(6)]


class Copy:
    """The event of one copy."""

    ended = False

    def done(self) -> bool:
        return self.ended


def made(at_once: int, in_ram: set[ExpertKey]) -> tuple[CopiesAhead, dict[ExpertKey, Copy]]:
    copies: dict[ExpertKey, Copy] = {}

    def copy(key: ExpertKey) -> Any:
        assert key in in_ram, "its bytes are not there"
        copies[key] = Copy()
        return SimpleNamespace(key=key, ready=copies[key])

    return CopiesAhead(copy, in_ram, at_once), copies


def test_few_are_on_their_way_and_the_rest_waits() -> None:
    ahead, copies = made(2, set(KEYS))
    ahead.wish(KEYS[:4])
    ahead.advance()
    ahead.advance()
    assert list(copies) == KEYS[:2]
    copies[KEYS[0]].ended = True
    ahead.advance()
    assert list(copies) == KEYS[:3], "in the order of the plan, one for one"
    assert ahead.cancel(KEYS[3]) is None, "what waits has no slot and never moves"
    cancelled = ahead.cancel(KEYS[1])
    assert cancelled is not None and cancelled.key == KEYS[1]
    for event in copies.values():
        event.ended = True
    ahead.advance()
    assert KEYS[3] not in copies


def test_what_its_router_chooses_is_copied_at_the_latest_then() -> None:
    ahead, copies = made(1, set(KEYS))
    ahead.wish(KEYS[:3])
    ahead.advance()
    copies[KEYS[0]].ended = True
    assert [ahead.take(key)[1] for key in KEYS[:2]] == [True, False], "there; waiting"
    assert KEYS[1] in copies
    ahead.wish(KEYS[3:4])
    ahead.cancel(KEYS[2])
    copies[KEYS[1]].ended = True
    ahead.advance()
    assert ahead.take(KEYS[3])[1] is False, "on its way"


def test_what_ram_gives_up_is_copied_before_it_goes() -> None:
    in_ram = set(KEYS[:2])
    ahead, copies = made(1, in_ram)
    ahead.wish(KEYS[:3])
    ahead.advance()
    assert list(copies) == KEYS[:1] and not ahead.known(KEYS[2]) and ahead.known(KEYS[1])
    ahead.leaving(KEYS[1])
    in_ram.discard(KEYS[1])
    assert KEYS[1] in copies and ahead.known(KEYS[1])
    ahead.leaving(KEYS[2])
    assert KEYS[2] not in copies, "it never was in RAM"
    assert ahead.take(KEYS[1])[0].key == KEYS[1]


def test_a_prefetched_expert_that_does_not_stay_is_not_overwritten_before_it_is_computed(
    chat_folder: Callable[..., Path],
) -> None:
    """Two were rightly predicted, neither stays, and the second one's copy begins only now."""
    folder, device = chat_folder("mixtral"), SteppedDevice()
    options = LoadOptions(experts=ExpertBudget(fraction=1.0), vram=vram_for(folder, 1.0, None), misses="copy")
    with LoadedModel(folder, options, device, COSTS) as model, torch.inference_mode():
        engine = model.runtime
        assert isinstance(engine, TieredRuntime)
        engine._ahead._at_once = 1
        _, layer, module = next(experts_modules(model.adapter.model))
        hidden = torch.randn(1, model.spec.hidden_size)
        index, weights = torch.tensor([[2, 5]]), torch.full((1, 2), 0.5)
        engine.forward_pass(Phase.DECODE, 1)
        expected = engine.run_layer(module, layer, hidden, index, weights).clone()
        chosen = ExpertKey(layer, 2), ExpertKey(layer, 5)
        engine._ahead.wish(chosen)
        engine._ahead.advance()
        work = engine._work(module, hidden, Choice.of(index, weights, (2, 5), int(module.num_experts)))
        there = DevicePlan((), foreseen=chosen, release=chosen)
        engine._carry_out(FetchPlan(layer, (), 0, 0, device=there), work)
        assert engine.statistics.copies_ahead == 2 and engine.statistics.copies_late == 2
        assert torch.equal(work.total(), expected)
