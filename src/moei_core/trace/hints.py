"""Hints of a trace: as the accesses hand them over, and made for a trace that was recorded without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from moei_core.errors import UsageError
from moei_core.trace.format import Trace, read_trace
from moei_core.types import ExpertKey, ScoredExpert


def hints_of_token(trace: Trace, token: int) -> dict[int, tuple[ScoredExpert, ...]]:
    """Hints by the number of the MoE layer whose access hands them over: the one where they arose."""
    if trace.hints_experts is None or trace.hints_scores is None:
        return {}
    found: dict[int, list[ScoredExpert]] = {}
    distances = trace.hint_distances or (1,) * trace.hints_experts.shape[2]
    for i, layer in enumerate(trace.moe_layers):
        experts, scores = trace.hints_experts[token, i].tolist(), trace.hints_scores[token, i].tolist()
        for expert, score, distance in zip(experts, scores, distances, strict=True):
            if expert < trace.num_experts and distance <= i:
                found.setdefault(i - distance, []).append(ScoredExpert(ExpertKey(layer, expert), score))
    return {i: tuple(hints) for i, hints in found.items()}


def read_hinted(path: str | Path, right: float | None) -> Trace:
    """The trace at ``path``, with hints made for it if a share of right ones is given.

    Raises: as ``read_trace``; UsageError.
    """
    trace = read_trace(path)
    return trace if right is None else with_made_hints(trace, right)


def with_made_hints(trace: Trace, right: float, seed: int = 0) -> Trace:
    """``trace`` with hints one layer ahead, as a router applied early would give them: each names one of the experts
    to be chosen with the probability ``right``, else any other, and says so with that score.

    Others measured .81 to .89 for large models (``docs/policies.md``). Raises: UsageError.
    """
    if not 0 <= right <= 1:
        raise UsageError("A share of right hints is between 0 and 1.")
    random = np.random.default_rng(seed)
    experts = np.asarray(trace.experts)
    wrong = random.random(experts.shape, np.float32) >= right
    others = random.integers(0, trace.num_experts, experts.shape, experts.dtype)
    # Wide enough for the sign for none, which 256 experts that were all chosen do without.
    hints = np.where(wrong & (experts < trace.num_experts), others, experts).astype(np.uint16)
    # Named once: a second mention says nothing.
    order = np.sort(hints, axis=2)
    order[..., 1:][order[..., 1:] == order[..., :-1]] = trace.num_experts
    scores = np.full(experts.shape, np.float16(right))
    return replace(trace, hints_experts=order, hints_scores=scores, hint_distances=())
