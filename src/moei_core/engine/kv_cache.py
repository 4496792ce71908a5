"""A key-value cache that is allocated ahead, grows in steps, and can be cut back to any earlier length.

transformers' own layers concatenate at every token and cannot be cropped once a sliding window has been
reached; this one keeps every position, also for sliding-window layers (their mask hides what is out of the
window), so a turn can reuse any prefix of the turns before.
"""

from __future__ import annotations

import sys

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moei_core.adapters.growing_layer import GrowingLayer


class ConversationCache:
    """The key-value cache of one conversation, and the tokens whose states it holds.

    ``tokens`` are those of completed forward passes: a pass that failed half-way leaves layers of different
    lengths, and ``roll_back`` cuts them all to what ``tokens`` says. can_cut: whether all can be cut.
    """

    def __init__(self, config: PretrainedConfig, context: int = sys.maxsize) -> None:
        """context: tokens of the conversation at most; memory is taken ahead for no more."""
        self._config, self._context = config, context
        self.tokens: list[int] = []
        self.cache = self._fresh()

    def _fresh(self) -> Cache:
        layers = [
            GrowingLayer(self._context) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer
            for layer in DynamicCache(config=self._config).layers
        ]
        self.can_cut = all(isinstance(layer, GrowingLayer) for layer in layers)
        return Cache(layers=layers)

    def reuse_prefix(self, tokens: list[int]) -> int:
        """Keep the longest common prefix with ``tokens``, less the last one (its logits are needed).

        Returns how many tokens need no computing. Layers with a running state (linear attention) cannot be
        cut: unless ``tokens`` continues what is held, they start anew.
        """
        limit = min(len(self.tokens), len(tokens) - 1)
        common = next((i for i in range(limit) if self.tokens[i] != tokens[i]), limit)
        self._cut_to(common)
        return len(self.tokens)

    def commit(self, tokens: list[int]) -> None:
        """The pass over ``tokens`` has completed."""
        self.tokens.extend(tokens)

    @property
    def can_fix(self) -> bool:
        """Whether ``fix`` can be called: each layer holds keys and values already."""
        return self.can_cut and all(getattr(layer, "is_initialized", False) for layer in self.cache.layers)

    def fix(self, place: torch.Tensor) -> None:
        """Until ``release`` all layers are of one fixed size, with room for one token, at ``place`` (a number [])."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, GrowingLayer)]
        for layer in layers:
            layer.make_room()
        # Memory may have ended in the middle of the last time that they grew.
        capacity = max(layer.capacity for layer in layers)
        for layer in layers:
            layer.make_room(capacity)
            layer.clean()
            layer.place = place

    def buffers(self) -> list[torch.Tensor]:
        """Where the keys of all layers lie; they move when they grow, and values with them."""
        return [layer.keys for layer in self.cache.layers if isinstance(layer, GrowingLayer)]

    def release(self) -> None:
        """Undo ``fix``."""
        for layer in self.cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.place = None

    def wrote_token(self) -> None:
        """The token is in all layers."""
        for layer in self.cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.wrote_token()

    def roll_back(self) -> None:
        """Undo a pass that did not complete."""
        if self.can_cut:
            self._cut_to(len(self.tokens))
        else:
            self.clear()

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self.tokens = []
        self.cache = self._fresh()

    def _cut_to(self, length: int) -> None:
        if not self.can_cut:
            if length < len(self.tokens):
                self.clear()
            return
        for layer in self.cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.cut_to(length)
        del self.tokens[length:]
