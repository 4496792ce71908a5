"""Choosing the next token: transformers' own logits processors, in the order in which ``generate`` has them."""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moei_core.config import GenerationSettings


class Sampler:
    """Draws tokens by one ``GenerationSettings``; a seed makes the draw repeatable."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._greedy = settings.temperature == 0
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)
        self._processors = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if self._greedy:
            return
        if settings.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            self._processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._processors.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p:
            self._processors.append(MinPLogitsWarper(settings.min_p))

    def next_token(self, tokens: list[int], logits: torch.Tensor) -> int:
        """The token after ``tokens``. logits: [vocabulary], any float type."""
        scores = logits.to(torch.float32)[None]
        if len(self._processors):
            scores = self._processors(torch.tensor([tokens]), scores)  # type: ignore[arg-type]
        if self._greedy:
            return int(scores.argmax(dim=-1))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
