"""Events written by hand, and the synthetic trace under the name that the tests use."""

from __future__ import annotations

from moei_core.trace.synthetic import synthetic_trace as make_trace
from moei_core.types import LayerAccess, Phase

__all__ = ["access", "make_trace"]


def access(layer: int, *experts: int, counts: tuple[int, ...] = ()) -> LayerAccess:
    """One decode access, or a prefill access if ``counts`` are given."""
    ordered = tuple(sorted(experts))
    phase = Phase.PREFILL if counts else Phase.DECODE
    return LayerAccess(layer, ordered, counts or (1,) * len(ordered), phase)
