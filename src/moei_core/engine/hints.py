"""Hints: experts of later layers predicted from the hidden states of this one. Data to the brain.

Only for single tokens: a pass over many reads nearly every expert anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from moei_core.adapters.early_router import EarlyRouters
from moei_core.engine.stride import StridePredictor
from moei_core.types import ExpertKey, ScoredExpert


class Hinter(Protocol):
    """Makes hints while the model runs, one call for each MoE layer of a single-token pass, in order."""

    @property
    def distances(self) -> tuple[int, ...]:
        """How many MoE layers ahead the hints are for."""

    def hints(
        self, layer: int, hidden_states: torch.Tensor, chosen: tuple[int, ...]
    ) -> tuple[ScoredExpert, ...]:
        """hidden_states: [1, hidden_size], what the experts of ``layer`` are given. chosen: what its router said.

        Scores are probabilities, exactly representable in float16, which is what a trace keeps.
        """

    def watch(self, wanted: bool) -> None:
        """Whether hints of the passes to come are wanted: what only they need of the model can be left otherwise."""

    def close(self) -> None:
        """Detach from the model."""


def _score(value: float) -> float:
    return float(np.float16(min(max(value, 0.0), 1.0)))


@dataclass(slots=True)
class _Record:
    """How often the expert at each rank of a prediction was really chosen: a decayed mean."""

    right: list[float] = field(default_factory=list)

    def judge(self, predicted: list[int], chosen: set[int], decay: float) -> None:
        while len(self.right) < len(predicted):
            self.right.append(0.5)
        for rank, expert in enumerate(predicted):
            self.right[rank] += (1 - decay) * ((expert in chosen) - self.right[rank])

    def mean(self) -> float:
        return sum(self.right) / len(self.right) if self.right else 0.5

    def score(self, rank: int) -> float:
        return self.right[rank] if rank < len(self.right) else 0.5


class RouterHints:
    """The router of the next MoE layer, applied early (Pre-gated MoE, arXiv 2308.12066).

    It is given the residual stream through its own norm, or this layer's hidden state as it is. Which of
    the two predicts better is measured for each layer, in every ``SAMPLE``-th pass, and kept. A hint's
    score is how often predictions of its rank have been right lately.
    """

    SAMPLE = 8
    DECAY = 0.95
    distances = (1,)

    def __init__(self, routers: EarlyRouters) -> None:
        self.routers = routers
        self._first = next(iter(routers.layers), None)
        # By the layer that is predicted, with its norm and without.
        self._records = {layer: {norm: _Record() for norm in (True, False)} for layer in routers.layers}
        # What was predicted for the layer that runs next: with norm or without, experts.
        self._pending: list[tuple[bool, list[int]]] = []
        self._pass = 0

    def with_norm(self, target: int) -> bool:
        """Whether predictions of ``target`` go through its norm."""
        records = self._records[target]
        return self.routers.has_norm(target) and records[True].mean() >= records[False].mean()

    def hints(
        self, layer: int, hidden_states: torch.Tensor, chosen: tuple[int, ...]
    ) -> tuple[ScoredExpert, ...]:
        if layer not in self._records:
            return ()
        if layer == self._first:
            self._pass += 1
            self._pending.clear()
        truth = set(chosen)
        for norm, predicted in self._pending:
            self._records[layer][norm].judge(predicted, truth, self.DECAY)
        self._pending.clear()
        target = self.routers.after(layer)
        if target is None:
            return ()
        found: tuple[ScoredExpert, ...] = ()
        best = self.with_norm(target)
        for norm in (best, not best):
            if found and self._pass % self.SAMPLE != 1:
                break
            experts = self.routers.recorded(layer, norm)
            if experts is None:
                experts = (
                    self.routers.route_residual(target, layer)
                    if norm
                    else self.routers.route(target, hidden_states)
                )
            if experts is None:
                continue
            self._pending.append((norm, experts))
            if not found:
                record = self._records[target][norm]
                found = tuple(
                    ScoredExpert(ExpertKey(target, expert), _score(record.score(rank)))
                    for rank, expert in enumerate(experts)
                )
        return found

    def watch(self, wanted: bool) -> None:
        self.routers.watch(wanted)

    def close(self) -> None:
        self.routers.close()


class StrideHints:
    """A trained network for each layer that says what a layer further on will choose (ProMoE, arXiv 2410.22134)."""

    def __init__(self, file: Path, num_experts: Mapping[int, int], hidden_size: int) -> None:
        """Raises: DamagedFileError, UsageError if ``file`` is for another model."""
        self._predictor = StridePredictor.load(file)
        self._predictor.check(num_experts, hidden_size)

    @property
    def distances(self) -> tuple[int, ...]:
        return (self._predictor.stride + 1,)

    def hints(
        self, layer: int, hidden_states: torch.Tensor, chosen: tuple[int, ...]
    ) -> tuple[ScoredExpert, ...]:
        predicted = self._predictor.predict(layer, hidden_states)
        if predicted is None:
            return ()
        target, probabilities = predicted
        count = min(2 * len(chosen), len(probabilities))
        best, experts = torch.topk(probabilities, count) if count else (probabilities[:0], probabilities[:0])
        return tuple(
            ScoredExpert(ExpertKey(target, int(expert)), _score(float(score)))
            for score, expert in zip(best.tolist(), experts.tolist(), strict=True)
        )

    def watch(self, wanted: bool) -> None:
        return

    def close(self) -> None:
        return
