"""The default policy: a mixture of histories and affinities, fitted online to the discounted future use.

The value of an expert is ``w . features``, an estimate of how much it will be used soon. Evidence:

* its own history: decayed frequencies at several speeds, cut at each new request, a slow popularity, and how
  long ago it was last used, whatever came before (LRU and LFU are corners of this space: LRFU, IEEE
  Transactions on Computers 2001);
* which experts tend to follow those that the same layer has just chosen, now and a few tokens back. This is
  learned from all requests, so it works from the first token of a short one, where history says nothing;
* which experts tend to follow those of the layer before, in the same token (affinity: ExFlow, arXiv
  2401.08383).

``w`` is the least-squares solution for the discounted future use. No future is needed: the sum over tokens of
feature x discounted future use equals the sum over tokens of use x discounted past feature, so both the fit
and the affinities are updated when a use happens. Each layer has its own ``w``, drawn towards one common to
all layers, which is drawn towards weights that held on every trace measured (``docs/policies.md``).

Decisions are the same on every machine. Matrix libraries sum in an order of their own, so a product goes
through one only where every partial sum is exact: uses are 0 or 1, and discounts and the features of the fit
are rounded to multiples of ``GRID`` so that sums need no more digits than the number type has. All else is
done element by element, or summed by numpy in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moei_core.cache.policies.base import ValuePolicy
from moei_core.cache.policies.same_numbers import GRID, on_grid, power, powers, solve
from moei_core.types import ExpertKey, LayerAccess, Phase

Array = NDArray[np.float32]

DECAYS = (0.5, 0.8, 0.93, 0.98)
SLOW = 0.9995
REQUEST_SCALE = 0.3
"""What a new request leaves of the request's own features: a new subject makes the old history stale."""
PRIOR = np.array([0.013, 0.18, -0.125, 0.617, -0.69, 0.95, 0.8, -0.12, 0.0], np.float64)
"""Weights before any evidence, in the order of the features."""
PRIOR_WEIGHT = 100.0
LAYER_WEIGHT = 50.0
FORGET = 0.9999
SHRINK = 5.0
"""An affinity seen n times counts n / (n + SHRINK); the rest is popularity."""
RECENT = 0.8
AGE = 0.95
"""A use counts so much less with every token, and only the last one counts."""
AGE_DOUBT = 20.0
"""How much more strongly its weight is drawn towards 0: it must show, as it does where nothing but recency tells. Where
a pass has several tokens it would lose half a point otherwise."""
FEW = {Phase.PREFILL: 8, Phase.DECODE: 32}
"""A pass over no more tokens is one step to learn from: several users' tokens or drafts, or the end of a prompt."""
FEATURES = len(PRIOR)
_FREQUENCIES, _SLOW, _OWN, _BEFORE, _OWN_RECENT, _AGE = slice(0, 4), 4, 5, 6, 7, 8
_FIRST_FITS = 8
_FADED = 1e-3
_NOTHING = 1e-20
_FIRST_BATCH, _EARLY = 16, 256
_FIT_EVERY = 32
_RENEW = 64
_SAMPLE = 128
_LEAST_SHARE = 0.02


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
        self._powers = on_grid(powers(self.gamma, batch).astype(np.float32))
        # later[s, t]: how much a use at t counts for a feature at s < t.
        gap = np.arange(batch)[None, :] - np.arange(batch)[:, None]
        self._later = np.where(gap > 0, self._powers[np.maximum(gap - 1, 0)], np.float32(0))
        self._forget = powers(FORGET, batch)
        # Features by token of the batch; the last entry holds those that the batch started from.
        self._batches = np.zeros((layers, batch + 1, FEATURES, width), np.float32)
        parts = (slice(0, _OWN), slice(_OWN, _OWN_RECENT), _SLOW, _OWN, _BEFORE, _OWN_RECENT, _AGE)
        self._views = [
            [(block[at - 1], block[at], *(block[at, part] for part in parts)) for at in range(batch)]
            for block in self._batches
        ]
        self._keep = np.array([[*DECAYS, 1, 0, 0, RECENT, AGE]], np.float32).T
        self._gain = np.array([[1 - decay for decay in DECAYS] + [1]], np.float32).T
        self._total: list[float] | NDArray[np.float64] = [0.0] * layers
        self._sources = np.zeros((layers, batch, 2 * width), np.float32)
        self._filled = [0] * layers
        # The fit looks at so many experts of a layer: of a wide one they are evidence enough, and cost less.
        self._sample = slice(None, None, max(1, width // _SAMPLE))
        self._feature_trace = np.zeros((layers, FEATURES, width), np.float64)[:, :, self._sample].copy()
        self._source_trace = np.zeros((layers, 2 * width), np.float32)
        # follows[i, s]: discounted uses of each expert of layer i after s, which is an expert of layer i or,
        # shifted by width, one of the layer before it. Times trust it is an estimate of the use, shrunk
        # towards 0 by how rarely s was seen.
        self._follows = np.zeros((layers, 2 * width, width), np.float32)
        self._seen = np.full((layers, 2 * width), SHRINK, np.float32)
        self._trust = np.full((layers, 2 * width), (1 - self.gamma) / SHRINK, np.float32)
        # What the shrinking takes from a trust of 1, and popularity has to give.
        self._doubt = SHRINK / (1 - self.gamma)
        self._doubts = np.zeros((2, 1), np.float32)
        self._means: dict[tuple[int, int], Array] = {}
        self._gram = np.zeros((layers, FEATURES, FEATURES), np.float64)
        self._moment = np.zeros((layers, FEATURES), np.float64)
        self._weights = np.tile(PRIOR.astype(np.float32), (layers, 1))
        # The weights, and the floor below which no estimate falls, both times the discount of the layer.
        self._ranking = np.zeros((layers, FEATURES, 1), np.float32)
        self._floor = np.zeros(layers, np.float32)
        self._delay = powers(round(self.gamma ** (1 / layers), 9), layers - 1)
        self._discount = 1.0
        self._products = np.zeros((FEATURES, width), np.float32)
        self._added, self._added_pair = self._products[:_OWN], self._products[:2]
        self._pass = 0
        self._full = _FIRST_BATCH
        self._request_started = [False] * layers
        self._previous: list[int] = []
        self._decode_width = 0
        self._discount_layers()

    def on_request(self) -> None:
        self._request_started = [True] * len(self.layers)

    def on_pass(self) -> None:
        self._pass += 1
        done = self._pass
        if done % _FIT_EVERY == 0 or (done < 4 * _FIT_EVERY and done % _FIRST_FITS == 0):
            self._fit()
        self._discount *= self.gamma
        if done % _RENEW == 0:
            # Values are discounted to a common origin that must not drift out of float32's range.
            self.values /= np.float32(self._discount)
            self.refresh_all()
            self._discount = 1.0
        # At first every token teaches much.
        self._full = _FIRST_BATCH if done < _EARLY else self._batch
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._previous = []
        self._discount_layers()
        if self._filled.count(self._full) == len(self._filled):
            self._learn_together(slice(None), self._full)

    def on_access(self, access: LayerAccess) -> None:
        i, width, experts = self.position[access.layer], self.width, access.experts
        if self._request_started[i]:
            self._start_request(i)
        if self._is_long(access):
            self._absorb_many(i, access)
            self._previous = []
            return
        at = self._filled[i]
        if at == self._full:
            self._learn(i)
            at = 0
        self._filled[i] = at + 1
        own = len(experts)
        indices = np.array([*experts, *self._previous], np.intp)
        sources = self._sources[i, at]
        sources[indices] = 1
        kept = self._total[i] * SLOW
        self._total[i] = total = kept + 1
        old, features, histories, affinities, popularity, own_row, before_row, recent, age = self._views[i][
            at
        ]
        self._keep[_SLOW, 0], self._gain[_SLOW, 0] = kept / total, 1 / total
        np.multiply(old, self._keep, features)
        np.add(recent, old[_OWN], recent)
        added, added_pair = self._added, self._added_pair
        np.multiply(sources[:width], self._gain, added)
        np.add(histories, added, histories)
        age[indices[:own]] = 1
        trust = self._trust[i].take(indices)
        trust *= self._mean(own, len(self._previous))
        follows = self._follows[i].take(indices, 0)
        np.multiply(follows, trust[:, None], follows)
        np.add.reduce(follows[:own], 0, None, own_row)
        np.add.reduce(follows[own:], 0, None, before_row)
        trusts, doubts = trust.tolist(), self._doubts
        doubts[0, 0] = self._doubt * sum(trusts[:own]) if own else 1.0
        doubts[1, 0] = self._doubt * sum(trusts[own:]) if self._previous else 1.0
        np.multiply(popularity, doubts, added_pair)
        np.add(affinities, added_pair, affinities)
        self._previous = [expert + width for expert in experts]
        self._value(i, features)

    def _is_long(self, access: LayerAccess) -> bool:
        """Whether ``access`` is of more tokens than one step can stand for. Notes how many experts a single one has."""
        if max(access.token_counts, default=0) > 1:
            return self._tokens(access) > FEW[access.phase]
        self._decode_width = len(access.experts)
        return False

    def _tokens(self, access: LayerAccess) -> int:
        """How many tokens a pass over many has, as far as its counts show."""
        width = min(self._decode_width or len(access.experts), len(access.experts))
        return max(max(access.token_counts), round(sum(access.token_counts) / width))

    def _mean(self, own: int, before: int) -> Array:
        """Takes the means over the experts of this layer and of the one before, in one product."""
        mean = self._means.get((own, before))
        if mean is None:
            parts = [1 / max(own, 1)] * own + [1 / max(before, 1)] * before
            mean = self._means[own, before] = np.array(parts, np.float32)
        return mean

    def _value(self, i: int, features: Array) -> None:
        """Turn estimates into values that compare across layers: discounted by when the layer runs next."""
        products, values = self._products, self.values[i]
        np.multiply(features, self._ranking[i], products)
        np.add.reduce(products, 0, None, values)
        # An estimate can be negative, a use cannot; the old frequency orders what is left at the bottom.
        np.maximum(values, np.multiply(features[3], self._floor[i], products[0]), out=values)
        self.refresh(i)

    def _discount_layers(self) -> None:
        discount = self._delay * self._discount
        np.multiply(self._weights, discount[:, None], out=self._ranking[:, :, 0])
        np.multiply(discount, _LEAST_SHARE, out=self._floor)

    def _absorb_many(self, i: int, access: LayerAccess) -> None:
        """A pass over many tokens: its counts stand for as many single tokens of the same mix.

        Order within the pass is not known, so nothing is learned from it but frequencies.
        """
        self._learn(i)
        experts = list(access.experts)
        counts = np.asarray(access.token_counts, np.float32)
        tokens = self._tokens(access)
        share = counts / np.float32(tokens)
        features = self._batches[i, -1]
        kept = np.array([[power(decay, tokens)] for decay in DECAYS], np.float32)
        features[_FREQUENCIES] *= kept
        features[_FREQUENCIES, experts] += (1 - kept) * share
        old = self._total[i] * power(SLOW, tokens)
        self._total[i] = total = old + tokens
        features[_SLOW] *= np.float32(old / total)
        features[_SLOW, experts] += counts / np.float32(total)
        # Expected, of a last use among tokens that each have it with the same probability.
        likely = np.minimum(share, np.float32(1))
        features[_AGE] *= np.float32(power(AGE, tokens))
        last = likely / (1 - np.float32(AGE) * (1 - likely))
        features[_AGE, experts] = np.maximum(features[_AGE, experts], last)
        trust = self._trust[i, experts] * share / share.sum()
        follows = self._follows[i, experts]
        follows *= trust[:, None]
        np.add.reduce(follows, axis=0, out=features[_OWN])
        features[_OWN] += features[_SLOW] * np.float32(float(trust.sum()) * self._doubt)
        features[_BEFORE] = features[_OWN]
        features[_OWN_RECENT] = features[_OWN] / np.float32(1 - RECENT)
        self._value(i, features)

    def _start_request(self, i: int) -> None:
        self._request_started[i] = False
        self._learn(i)
        features = self._batches[i, -1]
        features[_FREQUENCIES] *= np.float32(REQUEST_SCALE)
        features[_OWN_RECENT] *= np.float32(REQUEST_SCALE)
        features[_AGE] *= np.float32(REQUEST_SCALE)
        # What follows in the next request does not follow from this one.
        self._source_trace[i] = 0

    def _learn(self, i: int) -> None:
        """Account for the tokens that layer ``i`` has collected."""
        if self._filled[i]:
            self._learn_together(slice(i, i + 1), self._filled[i])

    def _learn_together(self, these: slice, count: int) -> None:
        """The same for neighbouring layers that have collected ``count`` tokens each. Each is for itself, but what
        numpy takes for one layer of a small model is mostly the call."""
        layers = self._filled[these] = [0] * len(self._filled[these])
        sources = self._sources[these, :count]
        uses = sources[:, :, : self.width]
        later, powers = self._later[:count, :count], self._powers[:count]
        fading, last = powers[::-1], self._powers[count]
        # In multiples of GRID: sums of products of these are exact in float64.
        rows = self._batches[these, :count, :, self._sample] * (1 / GRID)
        np.rint(rows, out=rows)
        rows, sampled = rows.swapaxes(1, 2).astype(np.float64, order="C"), uses[:, :, self._sample]
        flat, trace = rows.reshape(len(layers), FEATURES, -1), self._feature_trace[these]
        gram, moment = self._gram[these], self._moment[these]
        gram *= self._forget[count]
        gram += flat @ flat.swapaxes(1, 2) * GRID**2
        gain = flat @ (later @ sampled).reshape(len(layers), -1, 1)
        gain += trace @ (powers @ sampled)[:, :, None]
        moment *= self._forget[count]
        moment += gain[:, :, 0] * (GRID * (1 - self.gamma))
        trace *= last
        trace += fading.astype(np.float64) @ rows
        np.rint(trace, out=trace)
        past = self._source_trace[these]
        self._learn_affinities(these, sources, uses, later, powers)
        past[:] = on_grid(past * last + fading @ sources)
        sources.fill(0)
        start = self._batches[these, -1]
        start[:] = self._batches[these, count - 1]
        # What fades for ever ends as denormal numbers, which processors compute a hundred times slower.
        start[np.abs(start) < _NOTHING] = 0

    def _learn_affinities(
        self, these: slice, sources: Array, uses: Array, later: Array, powers: Array
    ) -> None:
        """The same identity as for the fit: uses now times the discounted past of their sources."""
        traces, now = self._source_trace[these], sources.sum(axis=1)
        # Few sources were used lately; of a wide layer's matrix, most rows need not be touched.
        near = (now > 0) | (traces > _FADED)
        for at, follows in enumerate(self._follows[these]):
            recent = np.flatnonzero(near[at])
            past = later.T @ sources[at].take(recent, axis=1)
            past += on_grid(powers[:, None] * traces[at].take(recent))
            follows[recent] += past.T @ uses[at]
        seen = self._seen[these]
        seen += now
        np.divide(1 - self.gamma, seen, out=self._trust[these])

    def _fit(self) -> None:
        eye = np.eye(FEATURES)
        eye[_AGE, _AGE] = AGE_DOUBT
        common = solve(
            self._gram.sum(axis=0, keepdims=True) + PRIOR_WEIGHT * eye,
            self._moment.sum(axis=0, keepdims=True) + PRIOR_WEIGHT * PRIOR,
        )
        solved = solve(self._gram + LAYER_WEIGHT * eye, self._moment + LAYER_WEIGHT * common)
        self._weights[:] = solved

    def value(self, key: ExpertKey) -> float:
        """The estimated discounted use of ``key``, comparable with ``value`` of any other key now."""
        return float(self.values[self.position[key.layer], key.expert]) / self._discount
