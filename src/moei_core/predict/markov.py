"""Predictions from the layer before (ExFlow, arXiv 2401.08383), and from popularity alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moei_core.predict.base import Event, LayerOrder, RequestEvent
from moei_core.predict.eamc import top
from moei_core.types import LayerAccess, ScoredExpert

Array = NDArray[np.float32]


class MarkovPredictor(LayerOrder):
    """Inter-layer affinity: how often expert j of a layer follows expert i of the layer before it.

    For top-k > 1 all pairs count, and the prediction is the mean over the experts chosen. Two layers ahead it
    is applied twice. The last layer is followed by the first one of the next pass. ``SHRINK`` draws rarely
    seen rows towards popularity.
    """

    SHRINK = 5.0

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        super().__init__(num_experts)
        layers = len(self.layers)
        self._follows = np.zeros((layers, self.width, self.width), np.float32)
        self._seen = np.zeros((layers, self.width), np.float32)
        self._uses = np.zeros((layers, self.width), np.float32)
        self._times = np.zeros(layers, np.float32)
        self._previous: NDArray[np.intp] = np.empty(0, np.intp)
        self._at = -1
        # The distribution one and more layers ahead of what was observed last, as far as it was asked for.
        self._ahead: list[Array | None] = []

    def observe(self, event: Event) -> None:
        if isinstance(event, RequestEvent):
            self._previous, self._at, self._ahead = self._previous[:0], -1, []
        elif isinstance(event, LayerAccess):
            i, before, self._ahead = self.position[event.layer], self._previous, []
            self._at = i
            if max(event.token_counts, default=1) > 1:
                # Which token went from where to where is not known in a pass over many.
                self._previous = before[:0]
                return
            self._previous = experts = np.array(event.experts, np.intp)
            if len(before):
                self._follows[i][before[:, None], experts] += 1
                self._seen[i, before] += 1
            self._uses[i, experts] += 1
            self._times[i] += 1

    def distribution(self, i: int) -> Array | None:
        """The probability of each expert of layer number ``i`` when it runs next; None: no evidence."""
        if not len(self._previous) or not self._times[i]:
            return None
        steps = (i - self._at) % len(self.layers) or len(self.layers)
        while len(self._ahead) < steps:
            self._ahead.append(self._step())
        return self._ahead[steps - 1]

    def _step(self) -> Array | None:
        """The distribution one layer further ahead than ``_ahead`` reaches."""
        if self._ahead:
            weights = self._ahead[-1]
            if weights is None:
                return None
        else:
            weights = np.zeros(self.width, np.float32)
            weights[self._previous] = 1
        at = (self._at + len(self._ahead) + 1) % len(self.layers)
        popularity = self._uses[at] / max(float(self._times[at]), 1.0)
        trust = weights / (self._seen[at] + np.float32(self.SHRINK)) / np.float32(weights.sum())
        sources = np.flatnonzero(trust)
        # Not a matrix product: libraries sum in an order of their own, and plans must not depend on it.
        follows = self._follows[at].take(sources, axis=0) * trust.take(sources)[:, None]
        ahead: Array = follows.sum(axis=0) + popularity * np.float32(self.SHRINK * float(trust.sum()))
        return ahead if ahead.any() else None

    def predict(self, layer: int) -> Sequence[ScoredExpert]:
        weights = self.distribution(self.position[layer])
        return () if weights is None else top(layer, weights, 2 * max(len(self._previous), 1))


class PopularityPredictor(LayerOrder):
    """The experts that the layer has chosen most often lately, whatever came before (decay .99 a pass)."""

    DECAY = 0.99

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        super().__init__(num_experts)
        self._share = np.zeros((len(self.layers), self.width), np.float32)
        self._total = np.zeros(len(self.layers), np.float32)
        self._top_k = 1

    def observe(self, event: Event) -> None:
        if isinstance(event, LayerAccess) and event.experts:
            i, experts = self.position[event.layer], list(event.experts)
            tokens = max(event.token_counts)
            self._share[i] *= np.float32(self.DECAY)
            self._share[i, experts] += np.asarray(event.token_counts, np.float32) / np.float32(tokens)
            self._total[i] = self._total[i] * np.float32(self.DECAY) + 1
            if tokens == 1:
                self._top_k = len(experts)

    def predict(self, layer: int) -> Sequence[ScoredExpert]:
        i = self.position[layer]
        if not self._total[i]:
            return ()
        return top(layer, self._share[i] / self._total[i], 2 * self._top_k)
