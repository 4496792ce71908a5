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
        self._previous: tuple[int, ...] = ()
        self._at = -1

    def observe(self, event: Event) -> None:
        if isinstance(event, RequestEvent):
            self._previous, self._at = (), -1
        elif isinstance(event, LayerAccess):
            i, experts = self.position[event.layer], list(event.experts)
            if max(event.token_counts, default=1) > 1:
                # Which token went from where to where is not known in a pass over many.
                self._previous, self._at = (), i
                return
            if self._previous:
                before = list(self._previous)
                self._follows[i][np.ix_(before, experts)] += 1
                self._seen[i, before] += 1
            self._uses[i, experts] += 1
            self._times[i] += 1
            self._previous, self._at = event.experts, i

    def distribution(self, i: int) -> Array | None:
        """The probability of each expert of layer number ``i`` when it runs next; None: no evidence."""
        if not self._previous or not self._times[i]:
            return None
        steps = (i - self._at) % len(self.layers) or len(self.layers)
        weights = np.zeros(self.width, np.float32)
        weights[list(self._previous)] = 1
        for step in range(1, steps + 1):
            at = (self._at + step) % len(self.layers)
            popularity = self._uses[at] / max(float(self._times[at]), 1.0)
            trust = weights / (self._seen[at] + np.float32(self.SHRINK)) / np.float32(weights.sum())
            sources = np.flatnonzero(trust)
            # Not a matrix product: libraries sum in an order of their own, and plans must not depend on it.
            follows = self._follows[at].take(sources, axis=0) * trust.take(sources)[:, None]
            weights = follows.sum(axis=0) + popularity * np.float32(self.SHRINK * float(trust.sum()))
            if not weights.any():
                return None
        return weights

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
