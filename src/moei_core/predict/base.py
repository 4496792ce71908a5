"""What a predictor is: it observes events and scores the experts of a layer that has not run yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moei_core.types import LayerAccess, Phase, ScoredExpert


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A request (one turn) starts or has ended."""

    start: bool


@dataclass(frozen=True, slots=True)
class PassEvent:
    """A forward pass starts."""

    phase: Phase


Event = RequestEvent | PassEvent | LayerAccess


class ExpertPredictor(Protocol):
    """Scores are estimates of the probability that the router chooses the expert when the layer runs next."""

    @property
    def needs_hints(self) -> bool:
        """Whether it looks at the hints of accesses."""

    @property
    def learns(self) -> bool:
        """Whether it knows nothing before it has observed many passes."""

    def observe(self, event: Event) -> None:
        """Something happened. The same events in the same order give the same predictions."""

    def predict(self, layer: int) -> Sequence[ScoredExpert]:
        """Experts of ``layer``, the likeliest first, at most a few times top-k of them."""

    def layers_after(self, layer: int, count: int) -> Sequence[int]:
        """The ``count`` MoE layers that run after ``layer``, across the end of the pass."""

    def candidates(self) -> Sequence[ExpertPredictor]:
        """Predictors to choose from, itself first; what it observes they all observe."""


class LayerOrder:
    """The order in which MoE layers run; the common part of all predictors."""

    needs_hints = False
    learns = True

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        self.num_experts = dict(num_experts)
        self.layers = tuple(num_experts)
        self.position = {layer: i for i, layer in enumerate(self.layers)}
        self.width = max(num_experts.values())
        self._after: dict[tuple[int, int], tuple[int, ...]] = {}

    def layers_after(self, layer: int, count: int) -> tuple[int, ...]:
        """The ``count`` MoE layers that run after ``layer``, across the end of the pass."""
        found = self._after.get((layer, count))
        if found is None:
            at, total = self.position[layer], len(self.layers)
            found = tuple(self.layers[(at + step) % total] for step in range(1, min(count, total - 1) + 1))
            self._after[layer, count] = found
        return found

    def candidates(self) -> Sequence[Any]:
        """Itself alone."""
        return (self,)
