"""The default policy: a mixture of histories and affinities, fitted online to the discounted future use.

The value of an expert is ``w . features``, an estimate of how much it will be used soon. Evidence:

* its own history: decayed frequencies at several speeds, cut at each new request, and a slow popularity
  (LRU and LFU are two corners of this space: LRFU, IEEE Transactions on Computers 2001);
* which experts tend to follow those that the same layer has just chosen, now and a few tokens back. This is
  learned from all requests, so it works from the first token of a short one, where history says nothing;
* which experts tend to follow those of the layer before, in the same token (affinity: ExFlow, arXiv
  2401.08383).

``w`` is the least-squares solution for the discounted future use. No future is needed: the sum over tokens of
feature x discounted future use equals the sum over tokens of use x discounted past feature, so both the fit
and the affinities are updated when a use happens. Each layer has its own ``w``, drawn towards one common to
all layers, which is drawn towards weights that held on every trace measured (``docs/policies.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moei_core.cache.policies.base import ValuePolicy
from moei_core.types import ExpertKey, LayerAccess

Array = NDArray[np.float32]

DECAYS = np.array([0.5, 0.8, 0.93, 0.98], np.float32)
SLOW = 0.9995
REQUEST_SCALE = 0.3
"""What a new request leaves of the request's own features: a new subject makes the old history stale."""
PRIOR = np.array([0.013, 0.18, -0.125, 0.617, -0.69, 1.07, -0.6, 0.8], np.float64)
"""Weights before any evidence, in the order of the features."""
PRIOR_WEIGHT = 100.0
LAYER_WEIGHT = 50.0
FORGET = 0.9999
SHRINK = 5.0
"""An affinity seen n times counts n / (n + SHRINK); the rest is popularity."""
RECENT = 0.8
FEATURES = len(PRIOR)
_USES, _OWN, _BEFORE = FEATURES, FEATURES + 1, FEATURES + 2
_FIRST_FITS = 8
_FADED = 1e-3
_NOTHING = 1e-20
_FIRST_BATCH, _EARLY = 16, 256
_FIT_EVERY = 32


class LearnedMixture(ValuePolicy):
    """Evict the resident with the least estimated use per time; a newcomer worth less is not admitted.

    One pool for all layers, so that layers with more reuse get more slots. Estimates of a layer that runs
    later are discounted by the time until it runs.
    """

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        super().__init__(capacity, num_experts, per_layer=False, bypass=True)
        layers, width = self.values.shape
        # A larger cache keeps an expert for longer, so it should look further ahead.
        horizon = min(max(13.0 * capacity / sum(num_experts.values()), 2.5), 8.0)
        self.gamma = 1 - 1 / horizon
        # Small batches learn sooner, which is worth points of hit rate; wide layers cannot pay for it.
        self._batch = batch = 16 if width <= 128 else 32
        self._powers = (self.gamma ** np.arange(batch + 1)).astype(np.float32)
        # later[s, t]: how much a use at t counts for a feature at s < t.
        gap = np.arange(batch)[None, :] - np.arange(batch)[:, None]
        self._later = np.where(gap > 0, self.gamma ** np.maximum(gap - 1, 0), 0).astype(np.float32)
        self._weights = np.tile(PRIOR.astype(np.float32), (layers, 1))
        # Two rows a layer: the weights and the floor below which no estimate falls, both times the discount.
        self._ranking = np.zeros((layers, 2, FEATURES), np.float32)
        self._ranked = np.zeros((2, width), np.float32)
        # One row block per token of the batch: features, then its uses and the two affinities it brings.
        # Entry 0 holds the features that the batch started from.
        self._batches = np.zeros((layers, batch + 1, FEATURES + 3, width), np.float32)
        # The next features are step @ block; only the popularity's entries change from step to step.
        self._step = np.zeros((FEATURES, FEATURES + 3), np.float32)
        self._step[range(4), range(4)] = DECAYS
        self._step[:4, _USES] = 1 - DECAYS
        self._step[5, _OWN] = self._step[7, _BEFORE] = 1
        self._step[6, 6], self._step[6, _OWN] = RECENT, 1 - RECENT
        self._total = [0.0] * layers
        self._sources = np.zeros((layers, batch, 2 * width), np.float32)
        self._filled = [0] * layers
        self._feature_trace = np.zeros((layers, FEATURES, width), np.float32)
        self._source_trace = np.zeros((layers, 2 * width), np.float32)
        # follows[i, s]: discounted uses of each expert of layer i after s, which is an expert of layer i or,
        # shifted by width, one of the layer before it; shrunk towards 0 by how rarely s was seen.
        self._follows = np.zeros((layers, 2 * width, width), np.float32)
        self._seen = np.full((layers, 2 * width), SHRINK, np.float32)
        # What the shrinking took, and popularity has to give. Lists: single numbers are read, not vectors.
        self._doubt = [[1.0] * (2 * width) for _ in range(layers)]
        self._mixers: dict[tuple[int, int], Array] = {}
        self._gram = np.zeros((layers, FEATURES, FEATURES), np.float64)
        self._moment = np.zeros((layers, FEATURES), np.float64)
        self._pass = self._base = 0
        self._request_started = [False] * layers
        self._previous: list[int] = []
        self._decode_width = 0
        self._discount_layers()

    def on_request(self) -> None:
        self._request_started = [True] * len(self.layers)

    def on_pass(self) -> None:
        self._pass += 1
        self._previous = []
        done = self._pass
        if done % _FIT_EVERY == 0 or (done < 4 * _FIT_EVERY and done % _FIRST_FITS == 0):
            self._fit()
        if done - self._base >= 64:
            # Values are discounted to a common origin that must not drift out of float32's range.
            scale = np.float32(self.gamma ** (self._base - done))
            self._base = done
            self.values *= scale
            self._candidates *= scale
        self._discount_layers()

    def on_access(self, access: LayerAccess) -> None:
        i, width = self.position[access.layer], self.width
        experts = access.experts
        if self._request_started[i]:
            self._start_request(i)
        if max(access.token_counts, default=0) > 1:
            self._absorb_many(i, access)
            return
        at = self._filled[i]
        # At first every token teaches much.
        if at == self._batch or (at == _FIRST_BATCH and self._pass < _EARLY):
            self._learn(i)
            at = 0
        self._filled[i] = at + 1
        self._decode_width = len(experts)
        indices = np.array([*experts, *self._previous], np.intp)
        sources = self._sources[i, at]
        sources[indices] = 1
        block = self._batches[i, at]
        block[_USES] = sources[:width]
        mixer = self._mixer(len(experts), len(self._previous))
        np.dot(mixer, self._follows[i].take(indices, axis=0), out=block[_OWN:])
        doubt, doubt_before = self._doubt[i], 1.0
        doubt_own = sum([doubt[expert] for expert in experts]) / len(experts) if experts else 1.0
        if self._previous:
            doubt_before = sum([doubt[source] for source in self._previous]) / len(self._previous)
        kept = self._total[i] * SLOW
        self._total[i] = total = kept + 1
        step, kept, gain = self._step, kept / total, 1 / total
        step[4:, 4] = (kept, kept * doubt_own, kept * (1 - RECENT) * doubt_own, kept * doubt_before)
        step[4:, _USES] = (gain, gain * doubt_own, gain * (1 - RECENT) * doubt_own, gain * doubt_before)
        features = self._batches[i, at + 1, :FEATURES]
        np.dot(step, block, out=features)
        self._previous = [expert + width for expert in experts]
        self._value(i, features)

    def _mixer(self, own: int, before: int) -> Array:
        """Takes the means over the experts of this layer and of the one before; one product for both."""
        mixer = self._mixers.get((own, before))
        if mixer is None:
            mixer = self._mixers[own, before] = np.zeros((2, own + before), np.float32)
            mixer[0, :own] = 1 / max(own, 1)
            mixer[1, own:] = 1 / max(before, 1)
        return mixer

    def _value(self, i: int, features: Array) -> None:
        """Turn estimates into values that compare across layers: discounted by when the layer runs next."""
        ranked = self._ranked
        np.dot(self._ranking[i], features, out=ranked)
        np.maximum(ranked[0], ranked[1], out=self.values[i])
        self.refresh(i)

    def _discount_layers(self) -> None:
        count = len(self.layers)
        discount = self.gamma ** (self._pass - self._base + np.arange(count) / count)
        self._ranking[:, 0] = self._weights * discount[:, None]
        # An estimate can be negative, a use cannot; the old frequency orders what is left at the bottom.
        self._ranking[:, 1, 3] = 0.02 * discount

    def _absorb_many(self, i: int, access: LayerAccess) -> None:
        """A pass over many tokens: its counts stand for as many single tokens of the same mix.

        Order within the pass is not known, so nothing is learned from it but frequencies.
        """
        self._learn(i)
        experts = list(access.experts)
        counts = np.asarray(access.token_counts, np.float32)
        width = min(self._decode_width or len(experts), len(experts))
        tokens = max(float(counts.max()), float(counts.sum()) / width)
        share = counts / np.float32(tokens)
        features = self._batches[i, 0, :FEATURES]
        kept = DECAYS[:, None] ** np.float32(tokens)
        features[:4] *= kept
        features[:4, experts] += (1 - kept) * share
        old = self._total[i] * SLOW**tokens
        self._total[i] = total = old + tokens
        features[4] *= np.float32(old / total)
        features[4, experts] += counts / np.float32(total)
        mean = share / share.sum()
        features[5] = mean @ self._follows[i, experts]
        features[5] += features[4] * (mean @ np.array(self._doubt[i], np.float32)[experts])
        features[6] = features[7] = features[5]
        self._previous = []
        self._value(i, features)

    def _start_request(self, i: int) -> None:
        self._request_started[i] = False
        self._learn(i)
        features = self._batches[i, 0]
        features[:4] *= np.float32(REQUEST_SCALE)
        features[6] *= np.float32(REQUEST_SCALE)
        # What follows in the next request does not follow from this one.
        self._source_trace[i] = 0

    def _learn(self, i: int) -> None:
        """Account for the batch of tokens that layer ``i`` has collected."""
        count = self._filled[i]
        self._filled[i] = 0
        if not count:
            return
        sources = self._sources[i, :count]
        uses = sources[:, : self.width]
        later, powers = self._later[:count, :count], self._powers[:count]
        fading, last = powers[::-1], self._powers[count]
        scale = FORGET**count
        rows = self._batches[i, 1 : count + 1, :FEATURES].transpose(1, 0, 2).reshape(FEATURES, -1)
        self._gram[i] = self._gram[i] * scale + rows @ rows.T
        trace = self._feature_trace[i]
        gain = rows @ (later @ uses).reshape(-1) + trace @ (powers @ uses)
        self._moment[i] = self._moment[i] * scale + gain * (1 - self.gamma)
        trace *= last
        trace += fading @ rows.reshape(FEATURES, count, -1)
        self._batches[i, 0, :FEATURES] = self._batches[i, count, :FEATURES]
        self._learn_affinities(i, sources, uses, later, powers)
        self._source_trace[i] *= last
        self._source_trace[i] += fading @ sources
        sources.fill(0)
        # What fades for ever ends as denormal numbers, which processors compute a hundred times slower.
        for fading_values in (self._batches[i, 0, :FEATURES], trace, self._source_trace[i]):
            fading_values[np.abs(fading_values) < _NOTHING] = 0

    def _learn_affinities(self, i: int, sources: Array, uses: Array, later: Array, powers: Array) -> None:
        """The same identity as for the fit: uses now times the discounted past of their sources."""
        past = later.T @ sources
        past += powers[:, None] * self._source_trace[i]
        seen = self._seen[i]
        before = seen.copy()
        seen += sources.sum(axis=0)
        past *= np.float32(1 - self.gamma) / seen
        # Few sources were used lately; of a wide layer's matrix, most rows need not be touched.
        recent = np.flatnonzero((seen > before) | (self._source_trace[i] > _FADED))
        rows = self._follows[i].take(recent, axis=0)
        rows *= (before[recent] / seen[recent])[:, None]
        rows += past.take(recent, axis=1).T @ uses
        self._follows[i][recent] = rows
        self._doubt[i] = (np.float32(SHRINK) / seen).tolist()

    def _fit(self) -> None:
        eye = np.eye(FEATURES)
        common = np.linalg.solve(
            self._gram.sum(axis=0) + PRIOR_WEIGHT * eye, self._moment.sum(axis=0) + PRIOR_WEIGHT * PRIOR
        )
        solved: NDArray[Any] = np.linalg.solve(
            self._gram + LAYER_WEIGHT * eye, (self._moment + LAYER_WEIGHT * common)[..., None]
        )
        self._weights = solved[..., 0].astype(np.float32)

    def value(self, key: ExpertKey) -> float:
        """The estimated discounted use of ``key``, comparable with ``value`` of any other key now."""
        return float(self.values[self.position[key.layer], key.expert]) * self.gamma ** (
            self._base - self._pass
        )
