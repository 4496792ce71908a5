"""The model's own forward over tokens that continue a conversation: one call for prompts, tokens and recordings."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moei_core.engine.kv_cache import ConversationCache


class NextTokenLogits:
    """Calls ``model``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # Not the number 1: that takes a strided view of the hidden states, for which torch reorders the whole output
        # head, as large as the head itself and as slow as copying it.
        self._last = torch.tensor([-1], device=model.device)

    def __call__(self, tokens: torch.Tensor, cache: ConversationCache) -> torch.Tensor:
        """The logits [vocabulary] after ``tokens`` [1, tokens], on the model's device."""
        output = self._model(
            input_ids=tokens, past_key_values=cache.cache, use_cache=True, logits_to_keep=self._last
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits
