"""The next use of every chosen expert: what Belady's policies are told."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moei_core.cache.policies.base import NEVER
from moei_core.trace.format import Trace


def next_uses(trace: Trace) -> NDArray[np.int64]:
    """When each entry of ``trace.experts`` is used again, in its shape; ``NEVER`` if not at all.

    Time counts accesses: forward pass x moe_layers + position of the layer. Entries of one pass share their
    next use, which is in a later pass.
    """
    tokens, layers, top_k = trace.experts.shape
    count = trace.num_experts
    pass_of_token = np.repeat(np.arange(len(trace.passes) - 1), np.diff(trace.passes))
    result = np.full(trace.experts.shape, NEVER, np.int64)
    for layer in range(layers):
        experts = np.asarray(trace.experts[:, layer, :], np.int64).reshape(-1)
        when = np.repeat(pass_of_token, top_k)
        # Sorted by expert, then by time: the next use is the next row of another time.
        order = np.argsort(experts * (len(trace.passes)) + when, kind="stable")
        sorted_experts, sorted_when = experts[order], when[order]
        changes = np.empty(len(order), np.bool_)
        changes[:1] = True
        changes[1:] = (sorted_experts[1:] != sorted_experts[:-1]) | (sorted_when[1:] != sorted_when[:-1])
        group = np.cumsum(changes) - 1
        starts = np.flatnonzero(changes)
        following = np.full(len(starts), NEVER, np.int64)
        same = sorted_experts[starts[1:]] == sorted_experts[starts[:-1]]
        following[:-1][same] = sorted_when[starts[1:]][same] * layers + layer
        flat = np.empty(len(order), np.int64)
        flat[order] = following[group]
        flat[experts == count] = NEVER
        result[:, layer, :] = flat.reshape(tokens, top_k)
    return result
