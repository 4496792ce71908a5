"""Hints of the engine as a predictor, and the mixture that weighs predictors by their recent record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moei_core.predict.base import Event, ExpertPredictor, LayerOrder, PassEvent
from moei_core.predict.eamc import EAMCPredictor
from moei_core.predict.markov import MarkovPredictor, PopularityPredictor
from moei_core.types import ExpertKey, LayerAccess, ScoredExpert


class HintPredictor(LayerOrder):
    """What the engine computed from hidden states: the next router applied early, or a learned stride MLP.

    (Pre-gated MoE, arXiv 2308.12066; ProMoE, arXiv 2410.22134.) To the brain these are
    data; a later hint for a layer replaces an earlier one.
    """

    needs_hints = True
    learns = False

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        super().__init__(num_experts)
        self._hints: dict[int, list[ScoredExpert]] = {}

    def observe(self, event: Event) -> None:
        if not isinstance(event, LayerAccess):
            if not isinstance(event, PassEvent):
                self._hints.clear()
            return
        self._hints.pop(event.layer, None)
        fresh: dict[int, list[ScoredExpert]] = {}
        for hint in event.hints:
            fresh.setdefault(hint.key.layer, []).append(hint)
        self._hints.update(fresh)

    def predict(self, layer: int) -> Sequence[ScoredExpert]:
        return sorted(self._hints.get(layer, ()), key=_likeliest_first)


class MixedPredictor(LayerOrder):
    """Weighs its parts by how well each has lately predicted the next layer.

    The record of a part is the decayed mean of its squared error over the experts of a layer (Brier score);
    weights are (1 + excess error) to the power of -``SHARPNESS``. Judged on every ``SAMPLE``-th pass, to keep it cheap.
    """

    SAMPLE = 4
    SHARPNESS = 8
    DECAY = 0.98

    def __init__(
        self, num_experts: Mapping[int, int], parts: Sequence[ExpertPredictor] | None = None
    ) -> None:
        super().__init__(num_experts)
        self.parts: list[ExpertPredictor] = (
            list(parts)
            if parts is not None
            else [
                HintPredictor(num_experts),
                MarkovPredictor(num_experts),
                EAMCPredictor(num_experts, match="request"),
                PopularityPredictor(num_experts),
            ]
        )
        self.needs_hints = any(part.needs_hints for part in self.parts)
        self._errors = np.full(len(self.parts), 0.5)
        self._weights: list[float] = []
        self._pending: dict[int, list[Sequence[ScoredExpert]]] = {}
        self._pass = 0

    def observe(self, event: Event) -> None:
        if isinstance(event, LayerAccess):
            self._judge(event)
        elif isinstance(event, PassEvent):
            self._pass += 1
        else:
            self._pending.clear()
        for part in self.parts:
            part.observe(event)
        if isinstance(event, LayerAccess) and self._pass % self.SAMPLE == 0:
            for layer in self.layers_after(event.layer, 1):
                self._pending[layer] = [part.predict(layer) for part in self.parts]

    def _judge(self, access: LayerAccess) -> None:
        predictions = self._pending.pop(access.layer, None)
        if predictions is None or max(access.token_counts, default=1) > 1:
            return
        self._weights = []
        chosen = set(access.experts)
        for at, scored in enumerate(predictions):
            error = float(len(chosen))
            for key, score in scored:
                truth = 1.0 if key.expert in chosen else 0.0
                error += (min(score, 1.0) - truth) ** 2 - truth
            self._errors[at] += (1 - self.DECAY) * (error / max(len(chosen), 1) - self._errors[at])

    @property
    def weights(self) -> list[float]:
        """The share of each part in the scores, in the order of ``parts``."""
        if not self._weights:
            # Powers of two by squaring: exp and pow round differently between machines.
            raw = 1 / (1 + (self._errors - self._errors.min()))
            for _ in range(self.SHARPNESS.bit_length() - 1):
                raw = raw * raw
            self._weights = (raw / raw.sum()).tolist()
        return self._weights

    def candidates(self) -> Sequence[ExpertPredictor]:
        """The mixture and each of its parts."""
        return (self, *self.parts)

    def predict(self, layer: int) -> Sequence[ScoredExpert]:
        scores: dict[ExpertKey, float] = {}
        longest = 0
        for part, weight in zip(self.parts, self.weights, strict=True):
            scored = part.predict(layer)
            longest = max(longest, len(scored))
            for key, score in scored:
                scores[key] = scores.get(key, 0.0) + weight * (score if score < 1.0 else 1.0)
        return sorted(map(ScoredExpert, scores, scores.values()), key=_likeliest_first)[:longest]


def _likeliest_first(expert: ScoredExpert) -> tuple[float, ExpertKey]:
    return -expert.score, expert.key


class NoisePredictor(LayerOrder):
    """Confident and wrong: random experts with score 1. What the prefetch controller must survive."""

    def __init__(self, num_experts: Mapping[int, int], seed: int = 0) -> None:
        super().__init__(num_experts)
        self._seed, self._events = seed, 0

    def observe(self, event: Event) -> None:
        self._events += 1

    def predict(self, layer: int) -> Sequence[ScoredExpert]:
        # Drawn from what has happened, so that asking twice does not change the answer.
        random = np.random.default_rng((self._seed, self._events, layer))
        count = self.num_experts[layer]
        chosen = random.choice(count, min(8, count), replace=False)
        return [ScoredExpert(ExpertKey(layer, expert), 1.0) for expert in sorted(chosen.tolist())]
