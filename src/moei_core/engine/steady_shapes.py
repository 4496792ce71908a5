"""Prompts of all lengths through few different shapes.

For 16-bit products oneDNN, which torch multiplies with, generates machine code for every shape it meets and never
frees all of it: .1 to .5 MB for each number of rows of each weight, .05 MB for each size of attention. A process that
reads prompts of many lengths grows by hundreds of megabytes, outside of any budget, and spends longer on preparing
than on multiplying. While ``SteadyShapes`` is active such products see rows of zeros more, up to one of few numbers;
what is computed from those rows is cut off again. Which numbers depends on the shapes alone, so the results do too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from moei_core.adapters.dense_clock import timed

FEW_ROWS = 4
"""Rows up to which products are left alone: there are few such numbers."""
_TILE, _STEP = 16, 64


def steady(rows: int) -> int:
    """The least of 16, 32, 48 and the multiples of 64 that is not below ``rows``."""
    step = _TILE if rows <= _STEP else _STEP
    return rows + -rows % step


def missing_rows(like: torch.Tensor, rows: int) -> int:
    """How many rows a product of ``rows`` rows like ``like`` should have more; 0 where shapes cost nothing."""
    return steady(rows) - rows if rows > FEW_ROWS and _prepared_by_shape(like) else 0


class SteadyShapes(TorchFunctionMode):
    """Active as a context: linear layers, matrix products and attention of 16-bit numbers see few shapes.

    All that torch does meanwhile is dense computing, as far as the thread's clock is concerned.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        way = _WAYS.get(func)
        if way is None or not args or not _prepared_by_shape(args[0]):
            way = func
        return timed(way, *args, **(kwargs or {}))


def _prepared_by_shape(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16) and tensor.device.type == "cpu"


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = input.numel() // max(1, input.shape[-1])
    missing = steady(rows) - rows
    if rows <= FEW_ROWS or not missing:
        return nn.functional.linear(input, weight, bias)
    padded = pad(input.reshape(rows, -1), (0, 0, 0, missing))
    return nn.functional.linear(padded, weight, bias)[:rows].view(*input.shape[:-1], -1)


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if right.dim() == 2:
        return _linear(left, right.t())
    if left.dim() < 3 or right.dim() < 3 or left.shape[-2] <= FEW_ROWS:
        return torch.matmul(left, right)
    # Attention written out: tokens are rows here, columns there, and in between in the product with the values.
    rows, between, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    more = steady(between) - between
    left = pad(left, (0, more, 0, steady(rows) - rows))
    right = pad(right, (0, steady(columns) - columns, 0, more))
    return torch.matmul(left, right)[..., :rows, :columns]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> torch.Tensor:
    queries, keys = query.shape[-2], key.shape[-2]
    width = value.shape[-1]
    if queries > 1 and width < key.shape[-1]:
        # torch has no fused kernel for values of another width than the keys': ten times the time.
        value = pad(value, (0, key.shape[-1] - width))
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, **more)[..., :width]
    rows, columns = steady(queries) - queries, steady(keys) - keys
    # Where there are more keys than queries torch's own causal mask would hide the last ones.
    if queries == 1 or (is_causal and queries != keys):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **more
        )
    if not is_causal and columns:
        if attn_mask is None:
            attn_mask = torch.ones((1, 1, 1, keys), dtype=torch.bool, device=query.device)
        hidden = False if attn_mask.dtype is torch.bool else -torch.inf
        attn_mask = pad(attn_mask.expand(*attn_mask.shape[:-1], keys), (0, columns), value=hidden)
    if attn_mask is not None and attn_mask.shape[-2] != 1:
        attn_mask = pad(attn_mask, (0, 0, 0, rows))
    query = pad(query, (0, 0, 0, rows))
    key, value = pad(key, (0, 0, 0, columns)), pad(value, (0, 0, 0, columns))
    padded = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, **more
    )
    return padded[..., :queries, :]


_WAYS: dict[Any, Callable[..., torch.Tensor]] = {
    nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.bmm: _matmul,
    nn.functional.scaled_dot_product_attention: _attention,
}
