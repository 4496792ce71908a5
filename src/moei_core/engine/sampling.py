"""Choosing the next token: the distribution of transformers' logits processors, without going over the vocabulary
more often than needed.

What ``generate`` applies one after the other to all scores (repetition penalty, temperature, top-k, top-p, min-p) is
applied to ever fewer candidates here. The draw inverts the cumulative distribution with one random number, where
``generate`` draws one for every word of the vocabulary: the same distribution, other draws for the same seed.
"""

from __future__ import annotations

import torch

from moei_core.config import GenerationSettings
from moei_core.errors import MoeiError

_BLOCK = 128
_GREEDY = 1e-6
"""A temperature below which only the best score counts. Far below it, scores divided by it are no numbers."""


class Sampler:
    """Draws tokens by one ``GenerationSettings``; a seed makes the draw repeatable."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._settings = settings
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def next_token(self, tokens: list[int], logits: torch.Tensor) -> int:
        """The token after ``tokens``. logits: [vocabulary], any float type. Raises: MoeiError if none is a number."""
        if self._settings.temperature < _GREEDY:
            return int(self._scores(tokens, logits).argmax())
        candidates, probabilities = self.distribution(tokens, logits)
        steps = probabilities.cumsum(0, dtype=torch.float64)
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64) * steps[-1]
        # Rounding could lead past the end, and an improbable number to a candidate of probability 0.
        place = min(int(torch.searchsorted(steps, drawn, right=True)), len(steps) - 1)
        return place if candidates is None else int(candidates[place])

    def distribution(
        self, tokens: list[int], logits: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(the tokens that may follow, ascending, or None for all; their probabilities, float32).

        Raises: MoeiError if the scores are no numbers.
        """
        settings = self._settings
        scores = self._scores(tokens, logits)
        if settings.temperature != 1:
            scores = scores / settings.temperature
        candidates: torch.Tensor | None = None
        if settings.top_k and settings.top_k < len(scores):
            candidates = _top_k(scores, settings.top_k)
            scores = scores[candidates]
        probabilities = scores.softmax(0)
        if settings.top_p < 1:
            stay = _top_p(probabilities, settings.top_p)
            candidates = stay if candidates is None else candidates[stay]
            probabilities = probabilities[stay] / probabilities[stay].sum()
        if settings.min_p:
            stay = (probabilities >= settings.min_p * probabilities.max()).nonzero()[:, 0]
            candidates = stay if candidates is None else candidates[stay]
            probabilities = probabilities[stay] / probabilities[stay].sum()
        return candidates, probabilities

    def _scores(self, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        """``logits`` in float32; those of tokens that were there before are moved towards improbable."""
        penalty = self._settings.repetition_penalty
        scores = logits.to(torch.float32, copy=penalty != 1)
        if penalty != 1:
            seen = torch.tensor(tokens)
            scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        if not torch.isfinite(scores.max()):
            raise MoeiError(
                "The model's last result is not a number.",
                "Its weights or the precision that it computes in overflow.",
                "Try --dtype float32, or pull the model again.",
            )
        return scores


def _top_k(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending places of the ``count`` largest scores, and of all that equal the last of them."""
    whole = len(scores) // _BLOCK
    if whole < count:
        return (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    # So many blocks have a maximum of at least ``bound``, so the scores looked for are not below it.
    bound = scores[: whole * _BLOCK].view(whole, _BLOCK).amax(1).topk(count).values[-1]
    few = (scores >= bound).nonzero()[:, 0]
    values = scores[few]
    return few[values >= values.topk(count).values[-1]]


def _top_p(probabilities: torch.Tensor, share: float) -> torch.Tensor:
    """Ascending places of the fewest most probable ones that together have at least ``share``."""
    # The least probable ones that are together less than the rest go anyway: no need to sort them.
    rest, bound, below = 1 - share, float(probabilities.max()), 2.0
    while below >= rest and bound > 0:
        bound /= 256
        places = (probabilities >= bound).nonzero()[:, 0]
        kept = probabilities[places]
        below = max(0.0, 1.0 - float(kept.sum(dtype=torch.float64)))
    ascending, order = kept.sort()
    stay = ascending.cumsum(0) > rest - (below if bound else 0)
    stay[-1] = True
    return places[order[stay]].sort().values
