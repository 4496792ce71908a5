"""Routing with the properties of real traces, made from a seed: skewed, sticky, with topics."""

from __future__ import annotations

import numpy as np

from moei_core.trace.format import Trace


def synthetic_trace(
    sequences: int = 6,
    length: int = 40,
    layers: int = 4,
    num_experts: int = 16,
    top_k: int = 3,
    seed: int = 0,
) -> Trace:
    """``sequences`` of ``length`` decode tokens; the decoder layers are 1 .. ``layers``.

    Each sequence has one of three topics that favour some experts; consecutive tokens share some of theirs.
    The tasks of the sequences alternate and mean nothing.
    """
    random = np.random.default_rng(seed)
    topics = random.gumbel(size=(3, layers, num_experts)) * 1.5
    tokens = sequences * length
    experts = np.empty((tokens, layers, top_k), np.uint8 if num_experts < 256 else np.uint16)
    momentum = np.zeros((layers, num_experts))
    for token in range(tokens):
        if token % length == 0:
            taste = topics[random.integers(3)]
            momentum[:] = 0
        score = taste + momentum + random.gumbel(size=(layers, num_experts))
        chosen = np.argsort(-score, axis=1, kind="stable")[:, :top_k]
        experts[token] = chosen
        momentum *= 0.6
        np.put_along_axis(momentum, chosen, np.take_along_axis(momentum, chosen, 1) + 1, axis=1)
    return Trace(
        model="synthetic",
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_layers=tuple(range(1, layers + 1)),
        experts=experts,
        sequence_offsets=np.arange(0, tokens + 1, length, dtype=np.int64),
        sequence_tasks=tuple(f"task{i % 2}" for i in range(sequences)),
    )
