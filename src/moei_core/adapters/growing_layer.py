"""One layer of a key-value cache that is allocated ahead, grows in steps, and can be cut back to any earlier length."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

_STEP = 256
"""Of which a layer's size is a multiple, since attention under a mask wants round numbers; it grows by half."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [batch, heads, tokens, head_dim] in buffers longer than what they hold.

    context: tokens that will come at most; beyond it nothing is taken ahead, since a budget counts on no more.
    place: None, or the place of a single token, a number [] that the device knows. Then a layer looks as transformers'
    static ones do: it gives the whole buffers, which it does not grow, and masks are made for all of them.
    """

    is_sliding = False

    def __init__(self, context: int = sys.maxsize) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length, self._context = 0, context
        # The end of what was written and is forgotten.
        self._stale = 0
        self.place: torch.Tensor | None = None
        self.keys: torch.Tensor
        self.values: torch.Tensor

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether masks must not depend on what the host knows."""
        return self.place is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:-2], 0, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:-2], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.place is not None:
            place = self.place.view(1)
            return self.keys.index_copy_(-2, place, key_states), self.values.index_copy_(
                -2, place, value_states
            )
        start, end = self._length, self._length + key_states.shape[-2]
        self._grow(end)
        self.keys[..., start:end, :] = key_states
        self.values[..., start:end, :] = value_states
        self._length = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def place_for_token(
        self, kv_heads: int, head_dim: int, like: torch.Tensor, value_dim: int | None = None
    ) -> tuple[int, int, int, int] | None:
        """Make room for one token of a batch of one, which the caller writes before it calls ``wrote_token``.

        Returns the addresses of keys and values [kv_heads, capacity, head_dim] (values with ``value_dim``, if that is
        another), the capacity and the token's place; None if what is held has another shape or type than ``like`` and
        the sizes say.
        """
        width = head_dim if value_dim is None else value_dim
        if not self.is_initialized:
            self.lazy_initialization(
                like.new_empty((1, kv_heads, 0, head_dim)), like.new_empty((1, kv_heads, 0, width))
            )
        capacity = self.keys.shape[2]
        if (
            self.keys.shape != (1, kv_heads, capacity, head_dim)
            or self.values.shape != (1, kv_heads, capacity, width)
            or self.keys.dtype != like.dtype
        ):
            return None
        self.make_room()
        return self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape[2], self._length

    def make_room(self, capacity: int = 0) -> None:
        """For one token more, which the caller writes before it calls ``wrote_token``. capacity: tokens at least."""
        self._grow(self._length + 1)
        if capacity > self.capacity:
            self._take(capacity)

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return int(self.keys.shape[-2])

    def _grow(self, needed: int) -> None:
        if needed > self.capacity:
            wanted = max(needed, min(self.capacity * 3 // 2, self._context))
            self._take(wanted + -wanted % _STEP)

    def _take(self, capacity: int) -> None:
        # Both or none: there may be memory for one only.
        keys = _larger(self.keys, self._length, capacity)
        self.keys, self.values = keys, _larger(self.values, self._length, capacity)
        self._stale = 0

    def wrote_token(self) -> None:
        """The token is there for which there was made room."""
        self._length += 1

    def get_seq_length(self) -> int:
        return self._length if self.place is None else self.place  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.place is not None:
            return self.keys.shape[-2], 0
        return super().get_mask_sizes(query_length)

    def cut_to(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        # A token at a fixed place may have been written and not be counted.
        self._stale = max(self._stale, self._length + 1)
        self._length = min(self._length, length)

    def clean(self) -> None:
        """Make numbers of what was forgotten, which may be none: masked attention will see it."""
        if self._stale > self._length:
            for buffer in (self.keys, self.values):
                buffer[..., self._length : self._stale, :].zero_()
        self._stale = 0


def _larger(buffer: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    # Masked attention multiplies what it masks by nothing: that must be numbers.
    larger = buffer.new_zeros((*buffer.shape[:-2], capacity, buffer.shape[-1]))
    larger[..., :used, :] = buffer[..., :used, :]
    return larger
