"""Prompts of many lengths: the same products, and no memory for each length."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from moei_core.adapters.dense_clock import DENSE_CLOCK, Timed
from moei_core.engine import steady_shapes
from moei_core.engine.steady_shapes import SteadyShapes, steady
from tests.core.stepped import SteppedClock

LENGTHS = (1, 2, 5, 16, 17, 63, 64, 65, 100, 200)
HEAD = 32


def random_numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(sum(shape)))


def same(compute: Callable[[], torch.Tensor]) -> None:
    expected = compute()
    with SteadyShapes():
        found = compute()
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_few_numbers_of_rows() -> None:
    assert len({steady(rows) for rows in range(1, 257)}) == 7
    assert all(0 <= steady(rows) - rows < 64 for rows in range(1, 1000))


@pytest.mark.parametrize("length", LENGTHS)
def test_products_of_weights(length: int) -> None:
    weight, bias = random_numbers(48, HEAD), random_numbers(48)
    same(lambda: linear(random_numbers(1, length, HEAD), weight, bias))
    same(lambda: linear(random_numbers(length, HEAD), weight))
    same(lambda: random_numbers(1, length, HEAD) @ weight.t())
    same(lambda: torch.matmul(random_numbers(length, HEAD), weight.t()))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("before", [0, 1, 64, 131])
def test_attention_written_out(length: int, before: int) -> None:
    keys = random_numbers(1, 2, before + length, HEAD)
    same(lambda: random_numbers(1, 2, length, HEAD) @ keys.transpose(2, 3))
    same(lambda: random_numbers(1, 2, length, before + length) @ keys)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("before", [0, 1, 64, 131])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "shared"])
def test_attention(length: int, before: int, mask: str) -> None:
    total = before + length
    query, keys = random_numbers(1, 4, length, HEAD), random_numbers(1, 4, total, HEAD)
    seen = torch.ones(1, 1, length, total, dtype=torch.bool).tril(before)
    masks = {
        "none": None,
        "bool": seen,
        "float": torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -torch.inf),
        "shared": (torch.arange(total) < max(1, total - 3)).view(1, 1, 1, total),
    }
    for values in (keys, keys[..., : HEAD // 2 + 3]):
        same(lambda values=values: scaled_dot_product_attention(query, keys, values, masks[mask], scale=0.3))


def test_narrow_values_have_the_fused_kernel() -> None:
    query, values = random_numbers(1, 4, 20, HEAD), random_numbers(1, 4, 20, HEAD // 2)
    with SteadyShapes(), torch.profiler.profile() as profile:
        scaled_dot_product_attention(query, query, values, is_causal=True)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {one.name for one in profile.events()}


@pytest.mark.parametrize("length", LENGTHS)
def test_causal_attention_with_shared_keys(length: int) -> None:
    query, keys = random_numbers(1, 4, length, HEAD), random_numbers(1, 2, length, HEAD)
    same(lambda: scaled_dot_product_attention(query, keys, keys, is_causal=True, enable_gqa=True))


def test_float32_is_left_alone() -> None:
    weight, numbers = torch.randn(48, HEAD), torch.randn(37, HEAD)
    expected = linear(numbers, weight)
    with SteadyShapes():
        assert torch.equal(linear(numbers, weight), expected)


class _Allocator(ctypes.Structure):
    """glibc's ``struct mallinfo2``; ``uordblks`` are the bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator counts what is in use")
def test_many_lengths_keep_no_memory() -> None:
    try:
        count = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("no mallinfo2")
    count.restype = _Allocator
    weight, draw = random_numbers(80, HEAD), random.Random(0)

    def grown(active: AbstractContextManager[object], sizes: list[tuple[int, int]]) -> int:
        before = count().uordblks
        with torch.inference_mode(), active:
            for queries, more in sizes:
                keys = random_numbers(1, 2, queries + more, HEAD)
                query = random_numbers(1, 2, queries, HEAD)
                seen = torch.ones(1, 1, queries, keys.shape[2], dtype=torch.bool)
                linear(query, weight)
                query @ keys.transpose(2, 3)
                scaled_dot_product_attention(query, keys, keys, seen)
        return int(count().uordblks) - before

    # Every shape that those below can become.
    met = [(rows, more) for rows in (5, 12, 17, 28, 33, *range(64, 257, 32)) for more in range(0, 513, 8)]
    grown(SteadyShapes(), met)
    sizes = [(draw.randrange(5, 257), draw.randrange(500)) for _ in range(200)]
    # Nothing, but for what the allocator's caches make of it; without, over 200 MB.
    assert grown(SteadyShapes(), sizes) < 4 << 20
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert grown(nullcontext(), sizes) > 40 << 20


def test_what_torch_does_meanwhile_is_dense_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteppedClock(monkeypatch)
    product = steady_shapes._WAYS[linear]

    def slowly(*arguments: Any, **named: Any) -> torch.Tensor:
        clock.nap(0.25)
        # Once, however deep it lies.
        return Timed(product)(*arguments, **named)

    monkeypatch.setitem(steady_shapes._WAYS, linear, slowly)
    before = DENSE_CLOCK.seconds
    rows = torch.ones((8, 16), dtype=torch.bfloat16)
    with SteadyShapes():
        for _ in range(3):
            linear(rows, rows)
    assert DENSE_CLOCK.seconds - before == 3 * 0.25
