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
    """Routers of the next two MoE layers, applied early (Pre-gated MoE, arXiv 2308.12066).

    Each is given this layer's hidden state as it is, or the residual stream through its own norm. Which of
    the two predicts better is measured for each pair of layers, in every ``SAMPLE``-th pass, and kept. A hint's
    score is how often predictions of its rank have been right lately.
    """

    SAMPLE = 8
    DECAY = 0.95
    DISTANCES = (1, 2)

    def __init__(self, routers: EarlyRouters) -> None:
        self._routers = routers
        self._layers = routers.layers
        self._position = {layer: at for at, layer in enumerate(self._layers)}
        self._records: dict[tuple[int, int, bool], _Record] = {}
        # By the layer that is predicted: (the layer predicted from, with norm, experts).
        self._pending: dict[int, list[tuple[int, bool, list[int]]]] = {}
        self._pass = 0

    @property
    def distances(self) -> tuple[int, ...]:
        return self.DISTANCES

    def with_norm(self, source: int, target: int) -> bool:
        """Whether predictions of ``target`` from ``source`` go through the norm of ``target``."""
        return (
            self._routers.has_norm(target)
            and self._record(source, target, True).mean() > self._record(source, target, False).mean()
        )

    def hints(
        self, layer: int, hidden_states: torch.Tensor, chosen: tuple[int, ...]
    ) -> tuple[ScoredExpert, ...]:
        at = self._position.get(layer)
        if at is None:
            return ()
        if at == 0:
            self._pass += 1
            self._pending.clear()
        truth = set(chosen)
        for source, norm, predicted in self._pending.pop(layer, ()):
            self._record(source, layer, norm).judge(predicted, truth, self.DECAY)
        found: list[ScoredExpert] = []
        for target in self._layers[at + 1 : at + 1 + max(self.DISTANCES)]:
            best = self.with_norm(layer, target)
            for norm in (best, not best) if self._pass % self.SAMPLE == 1 else (best,):
                state = self._routers.normed(target, layer) if norm else hidden_states
                if state is None:
                    continue
                predicted = self._routers.route(target, state)
                self._pending.setdefault(target, []).append((layer, norm, predicted))
                if norm == best:
                    record = self._record(layer, target, norm)
                    found += [
                        ScoredExpert(ExpertKey(target, expert), _score(record.score(rank)))
                        for rank, expert in enumerate(predicted)
                    ]
        return tuple(found)

    def watch(self, wanted: bool) -> None:
        self._routers.watch(wanted)

    def close(self) -> None:
        self._routers.close()

    def _record(self, source: int, target: int, norm: bool) -> _Record:
        return self._records.setdefault((source, target, norm), _Record())


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
