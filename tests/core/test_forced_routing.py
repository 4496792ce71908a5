"""Routing that follows a trace: which rows a pass takes, also one that is done again."""

from __future__ import annotations

import numpy as np
import torch

from moei_core.engine.forced_routing import ForcedRouting
from moei_core.trace import Trace
from moei_core.types import ModelSpec


def test_a_pass_that_did_not_end_is_done_again_with_the_same_rows() -> None:
    rows = np.arange(2 * 6 * 2).reshape(6, 2, 2).astype(np.uint8)
    trace = Trace("a-model", 32, 2, (0, 1), rows, np.asarray([0, 6], np.int64))
    routing = ForcedRouting(trace, ModelSpec("a", {0: 32, 1: 32}, 2, 8, {0: 1, 1: 1}))

    def taken(tokens: int) -> list[list[int]]:
        routing.forward_pass(tokens)
        found: list[list[int]] = routing.top_k_index(1, torch.zeros((tokens, 2), dtype=torch.long)).tolist()
        return found

    assert taken(3) == rows[:3, 1].tolist()
    assert taken(3) == rows[:3, 1].tolist()
    routing.end_pass()
    assert taken(2) == rows[3:5, 1].tolist()
    routing.end_pass()
    # At its end the trace starts again.
    assert taken(2) == rows[[5, 0], 1].tolist()
