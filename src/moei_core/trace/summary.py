"""What people want to see of a trace: popularity, reuse, overlap of tokens by lag, a request's EAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moei_core.trace.format import Trace

LAGS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One MoE layer. top_quarter: share of uses that its most popular quarter of experts gets.

    entropy: of popularity, over that of a uniform choice. reuse: share of uses whose expert was used within
    the last 8 tokens. touched: experts that were used at all.
    """

    layer: int
    top_quarter: float
    entropy: float
    reuse: float
    touched: int


def activation_counts(trace: Trace) -> NDArray[np.int64]:
    """[layers, experts]: how often each expert was chosen."""
    layers, count = len(trace.moe_layers), trace.num_experts
    counts = np.zeros((layers, count + 1), np.int64)
    for i in range(layers):
        counts[i] = np.bincount(np.asarray(trace.experts[:, i]).reshape(-1), minlength=count + 1)
    return counts[:, :count]


def overlap_by_lag(trace: Trace, limit: int = 4000) -> dict[int, float]:
    """Mean share of a token's experts that the token ``lag`` before it in its sequence used too.

    Over the first ``limit`` tokens. For a uniform choice it would be top-k / experts.
    """
    tokens = min(trace.tokens, limit)
    used = _one_hot(trace, tokens)
    sequence = np.repeat(np.arange(trace.sequences), np.diff(trace.sequence_offsets))[:tokens]
    chosen = used.sum(axis=2)
    found: dict[int, float] = {}
    for lag in LAGS:
        same = sequence[lag:] == sequence[:-lag]
        if tokens > lag and same.any():
            common = (used[lag:][same] & used[:-lag][same]).sum(axis=2)
            found[lag] = float((common / np.maximum(chosen[lag:][same], 1)).mean())
    return found


def layer_summaries(trace: Trace, limit: int = 4000) -> list[LayerSummary]:
    """One summary a MoE layer; reuse over the first ``limit`` tokens."""
    counts = activation_counts(trace)
    used = _one_hot(trace, min(trace.tokens, limit))
    recent = np.zeros_like(used)
    for lag in range(1, 9):
        recent[lag:] |= used[:-lag]
    again = (used & recent).sum(axis=(0, 2)) / np.maximum(used.sum(axis=(0, 2)), 1)
    quarter = max(1, trace.num_experts // 4)
    summaries = []
    for i, layer in enumerate(trace.moe_layers):
        share = np.sort(counts[i])[::-1] / max(int(counts[i].sum()), 1)
        entropy = -float((share[share > 0] * np.log(share[share > 0])).sum())
        summaries.append(
            LayerSummary(
                layer,
                float(share[:quarter].sum()),
                entropy / np.log(trace.num_experts) if trace.num_experts > 1 else 1.0,
                float(again[i]),
                int((counts[i] > 0).sum()),
            )
        )
    return summaries


def request_matrix(trace: Trace, request: int) -> NDArray[np.int64]:
    """[layers, experts]: the request's activation matrix (rEAM)."""
    first, last = int(trace.requests[request]), int(trace.requests[request + 1])
    matrix = np.zeros((len(trace.moe_layers), trace.num_experts + 1), np.int64)
    for i in range(len(trace.moe_layers)):
        flat = np.asarray(trace.experts[first:last, i]).reshape(-1)
        matrix[i] = np.bincount(flat, minlength=trace.num_experts + 1)
    return matrix[:, : trace.num_experts]


def _one_hot(trace: Trace, tokens: int) -> NDArray[Any]:
    used = np.zeros((tokens, len(trace.moe_layers), trace.num_experts + 1), np.bool_)
    np.put_along_axis(used, np.asarray(trace.experts[:tokens], np.int64), True, axis=2)
    return used[:, :, : trace.num_experts]
