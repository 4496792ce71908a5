"""Linear layers, norms and attention in the activations' own types, against float64 (E3) and themselves (E1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from moei_core.adapters.dense_linear import TYPES
from moei_core.quant import native
from tests.native.weights import (
    FORMATS,
    UNIT,
    block_size,
    decoded,
    in_order,
    orders,
    product_bound,
    stored_weights,
)

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
DTYPES = tuple(TYPES)


def half_steps(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The largest rounding error of values in a float type."""
    info = torch.finfo(dtype)
    return np.abs(values) * info.eps / 2 + info.smallest_normal * info.eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "order"), [(fmt, order) for fmt in FORMATS for order in orders(fmt)])
def test_a_linear_layer_is_within_its_bound_for_any_rows_and_threads(
    fmt: str, order: str, dtype: torch.dtype
) -> None:
    # Enough weights that several threads share them.
    rows, cols, tokens = 1030, 512 if block_size(fmt) > 1 else 500, 9
    rng = np.random.default_rng(1)
    stored = stored_weights(rng, fmt, rows, cols)
    kept = in_order(fmt, stored, rows, cols, order)
    bias = torch.from_numpy(rng.standard_normal(rows)).to(dtype)
    x = torch.from_numpy(rng.standard_normal((tokens, cols))).to(dtype)
    layer = native.Linear(
        native.Matrix(fmt, rows, cols, order), kept.ctypes.data, TYPES[dtype], bias.data_ptr()
    )

    def run(given: torch.Tensor) -> torch.Tensor:
        out = given.new_full((len(given), rows), torch.nan)
        layer(TYPES[dtype], given.data_ptr(), len(given), out.data_ptr())
        return out

    before = native.num_threads()
    native.set_num_threads(3)
    try:
        out = run(x)
        native.set_num_threads(1)
        assert torch.equal(out, run(x))
    finally:
        native.set_num_threads(before)
    assert torch.equal(out, torch.cat([run(x[t : t + 1]) for t in range(tokens)]))
    weights, inputs = decoded(fmt, stored, rows, cols), x.double().numpy()
    exact = inputs @ weights.T + bias.double().numpy()
    bound = (
        product_bound(fmt, weights, inputs) + np.abs(bias.double().numpy()) * 2 * UNIT + np.abs(exact) * UNIT
    )
    bound += half_steps(np.abs(exact) + bound, dtype)
    assert (np.abs(out.double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [16, 20, 32, 128])
def test_short_rows_give_the_same_bits_for_any_number_of_tokens(cols: int, dtype: torch.dtype) -> None:
    """Rows as short as an attention's heads are summed many at a time, in another pattern for each number of tokens."""
    rows, generator = 53, torch.Generator().manual_seed(cols)
    weight = torch.randn((rows, cols), generator=generator).to(dtype)
    x = torch.randn((7, cols), generator=generator).to(dtype)
    layer = native.Linear(native.Matrix(TYPES[dtype], rows, cols), weight.data_ptr())

    def run(given: torch.Tensor) -> torch.Tensor:
        out = given.new_empty((len(given), rows))
        layer(TYPES[dtype], given.data_ptr(), len(given), out.data_ptr())
        return out

    # Seven tokens: four and more go through the pattern of all matrices.
    expected = run(x)
    for count in (1, 2, 3):
        for first in range(7 - count + 1):
            assert torch.equal(run(x[first : first + count].contiguous()), expected[first : first + count])
    exact = x.double() @ weight.double().T
    assert torch.allclose(expected.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_round_as_torch_rounds(dtype: torch.dtype) -> None:
    """Every kind of number through a product with 1: ties, subnormals, overflow, infinities."""
    values = torch.randint(-(2**31), 2**31, (200000,), generator=torch.Generator().manual_seed(0))
    wide = values.to(torch.int32).view(torch.float32)
    special = [
        0.0,
        65504.0,
        65519.99,
        65520.0,
        2.0**-24,
        2.0**-25,
        3 * 2.0**-25,
        1.0 + 2.0**-11,
        1 + 3 * 2.0**-9,
    ]
    wide = torch.cat([wide[torch.isfinite(wide)], torch.tensor([*special, torch.inf, -torch.inf])])
    weight, one = wide.contiguous(), torch.ones(1, dtype=dtype)
    out = torch.empty(len(weight), dtype=dtype)
    native.Linear(native.Matrix("F32", len(weight), 1), weight.data_ptr())(
        TYPES[dtype], one.data_ptr(), 1, out.data_ptr()
    )
    assert torch.equal(out, weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 64, 1000])
def test_a_norm_is_within_rounding(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn((5, width), generator=generator) * 3).to(dtype)
    weight = torch.randn(width, generator=generator)
    out = torch.empty_like(x)
    native.RmsNorm(weight.tolist(), 1e-5)(TYPES[dtype], x.data_ptr(), 5, out.data_ptr())
    wide = x.double()
    exact = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()).numpy()
    bound = np.abs(exact) * (width / 16 + 24) * UNIT + half_steps(exact, dtype)
    assert (np.abs(out.double().numpy() - exact) <= bound).all()


def attention(
    heads: int, kv_heads: int, head_dim: int, rotary: int, hidden: int, position: int, dtype: torch.dtype,
    normed: bool, mask: torch.Tensor | None, threads: int = 1, wide: bool = False, sinks: bool = False,
    clip: float = math.inf, rotation: str = "halves", turn_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(result, exact result in float64, new key, its exact value)."""
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    widths = [(heads * head_dim, hidden), (kv_heads * head_dim, hidden), (kv_heads * head_dim, hidden)]
    weights = [some(*shape, scale=shape[1] ** -0.5) for shape in (*widths, (hidden, heads * head_dim))]
    layers = [native.Linear(native.Matrix(TYPES[dtype], *w.shape), w.data_ptr()) for w in weights]
    # A norm of each head, or (wide) of all heads of q and all of k.
    norms = tuple(some(head_dim * (many if wide else 1)).float() for many in (heads, kv_heads))
    sink = torch.randn(heads, generator=generator) * 2 if sinks else torch.empty(0)
    capacity, x = position + 3, some(hidden)
    keys, values = some(kv_heads, capacity, head_dim), some(kv_heads, capacity, head_dim)
    turns = rotary // 2 if rotation == "short" else rotary
    cosine, sine, out = some(turns).to(turn_dtype or dtype), some(turns).to(turn_dtype or dtype), some(hidden)
    kernel = native.Attention(
        tuple(layers),  # type: ignore[arg-type]
        (heads, kv_heads, head_dim, rotary),
        head_dim**-0.5,
        (norms[0].tolist(), norms[1].tolist()) if normed else None,
        1e-6,
        sink.tolist(),
        clip,
        rotation,
        TYPES[turn_dtype or dtype],
    )
    k, v = keys.clone(), values.clone()
    before = native.num_threads()
    native.set_num_threads(threads)
    try:
        kernel(
            TYPES[dtype], x.data_ptr(), (cosine.data_ptr(), sine.data_ptr()),
            (k.data_ptr(), v.data_ptr(), capacity, position), 0 if mask is None else mask.data_ptr(), out.data_ptr(),
        )  # fmt: skip
    finally:
        native.set_num_threads(before)
    # The rest of the cache is as it was.
    others = [place for place in range(capacity) if place != position]
    for after, as_it_was in ((k, keys), (v, values)):
        torch.testing.assert_close(after[:, others], as_it_was[:, others], rtol=0, atol=0, equal_nan=True)

    exact_weights = [w.double() for w in weights]
    q_new, k_new, v_new = (w @ x.double() for w in exact_weights[:3])
    if normed:
        q_new, k_new = (
            (one / (one.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()).flatten()
            for one, norm in zip(
                (q_new, k_new) if wide else (q_new.view(-1, head_dim), k_new.view(-1, head_dim)),
                norms,
                strict=True,
            )
        )
    q_new, k_new, v_new = (one.clamp(-clip, clip).view(-1, head_dim) for one in (q_new, k_new, v_new))
    assert math.isinf(clip) or (v_new == clip).any()
    assert torch.allclose(v[:, position].double(), v_new, rtol=torch.finfo(dtype).eps, atol=1e-5)

    def turned(one: torch.Tensor) -> torch.Tensor:
        part, rest = one[:, :rotary].clone(), one[:, rotary:]
        half, second = rotary // 2, 0 if rotation != "halves" else rotary // 2
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if rotation == "neighbors" else (i, half + i)
            low, high = part[:, a].clone(), part[:, b].clone()
            part[:, a] = low * cosine[i].double() - high * sine[i].double()
            part[:, b] = high * cosine[second + i].double() + low * sine[second + i].double()
        return torch.cat([part, rest], -1)

    q_new, k_new = turned(q_new), turned(k_new)
    all_k, all_v = keys[:, : position + 1].double(), values[:, : position + 1].double()
    # What the cache holds is rounded to its type.
    all_k[:, position], all_v[:, position] = k[:, position].double(), v[:, position].double()
    group = heads // kv_heads
    scores = torch.einsum("hd,hpd->hp", q_new, all_k.repeat_interleave(group, 0)) * head_dim**-0.5
    if mask is not None:
        scores[:, ~mask] = -torch.inf
    if sinks:
        scores = torch.cat([scores, sink.double()[:, None]], -1)
    shares = scores.softmax(-1)[:, : position + 1]
    mixed = torch.einsum("hp,hpd->hd", shares, all_v.repeat_interleave(group, 0))
    return out, exact_weights[3] @ mixed.reshape(-1), k[:, position], k_new


CASES: list[dict[str, Any]] = [
    {"heads": 4, "kv_heads": 2, "head_dim": 16, "rotary": 16, "hidden": 48, "position": 0, "normed": False},
    {"heads": 8, "kv_heads": 1, "head_dim": 32, "rotary": 8, "hidden": 96, "position": 37, "normed": True},
    {"heads": 40, "kv_heads": 2, "head_dim": 64, "rotary": 64, "hidden": 64, "position": 700, "normed": True},
    {"heads": 3, "kv_heads": 3, "head_dim": 128, "rotary": 2, "hidden": 128, "position": 20, "normed": False},
    {"heads": 8, "kv_heads": 1, "head_dim": 64, "rotary": 64, "hidden": 64, "position": 1535, "normed": False,
     "sinks": True, "rotation": "short"},
    {"heads": 6, "kv_heads": 2, "head_dim": 32, "rotary": 16, "hidden": 64, "position": 511, "normed": True,
     "wide": True, "clip": 0.7},
    {"heads": 5, "kv_heads": 1, "head_dim": 20, "rotary": 20, "hidden": 48, "position": 1100, "normed": False,
     "rotation": "neighbors", "turn_dtype": torch.float32},
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_one_token(case: dict[str, Any], dtype: torch.dtype, masked: bool) -> None:
    mask = None
    if masked:
        mask = torch.rand(case["position"] + 1, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[-1] = True
    out, exact, key, exact_key = attention(**case, dtype=dtype, mask=mask)
    relative = torch.finfo(dtype).eps
    assert torch.allclose(key.double(), exact_key, rtol=relative, atol=1e-5)
    # Float32 throughout, one rounding at the end.
    assert torch.allclose(out.double(), exact, rtol=relative, atol=2e-5)
    again, *_ = attention(**case, dtype=dtype, mask=mask, threads=3)
    assert torch.equal(out, again)


@pytest.mark.parametrize("shown", [1, 40, 128, 600])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_sliding_window_reads_what_it_shows(shown: int, sinks: bool) -> None:
    """What lies before the window is nothing at all: neither its numbers nor how much of it there is play a part."""
    case = CASES[4] | {"sinks": sinks, "position": 1700}
    mask = torch.zeros(1701, dtype=torch.bool)
    mask[-shown:] = True
    generator = torch.randn

    def with_nan(*arguments: Any, **options: Any) -> torch.Tensor:
        values = generator(*arguments, **options)
        if values.shape == (1, 1703, 64):
            values[:, : 1700 - shown - 16] = torch.nan
        return values

    out, exact, *_ = attention(**case, dtype=torch.float32, mask=mask)
    assert torch.allclose(out.double(), exact, rtol=1e-6, atol=2e-5)
    torch.randn = with_nan
    try:
        without, *_ = attention(**case, dtype=torch.float32, mask=mask)
    finally:
        torch.randn = generator
    assert torch.equal(without, out)


def test_what_is_no_number_stays_visible() -> None:
    case = CASES[2] | {"dtype": torch.float32, "mask": None}
    generator = torch.randn

    def with_nan(*arguments: Any, **options: Any) -> torch.Tensor:
        values = generator(*arguments, **options)
        if values.shape == (2, 703, 64):
            values[0, 5, 3] = torch.nan
        return values

    torch.randn = with_nan
    try:
        out, *_ = attention(**case)
    finally:
        torch.randn = generator
    assert torch.isnan(out).all()


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = torch.zeros(64, 64)
    square = native.Linear(native.Matrix("F32", 64, 64), weight.data_ptr())
    four = (square, square, square, square)
    for heads in [(4, 3, 16, 16), (4, 4, 8, 8), (4, 4, 16, 15), (4, 4, 16, 18), (0, 0, 16, 16)]:
        with pytest.raises(ValueError):
            native.Attention(four, heads, 1.0)
    for other in (
        {"norms": ([1.0] * 15, [1.0] * 16)},
        {"norms": ([1.0] * 64, [1.0] * 16)},
        {"sinks": [1.0] * 3},
        {"clip": 0.0},
        {"rotation": "quarters"},
        {"turn_type": "Q8_0"},
    ):
        with pytest.raises(ValueError):
            native.Attention(four, (4, 4, 16, 16), 1.0, **other)
    kernel = native.Attention(four, (4, 4, 16, 16), 1.0)
    place = weight.data_ptr()
    with pytest.raises(ValueError, match="room"):
        kernel("F32", place, (place, place), (place, place, 5, 5), 0, place)
    with pytest.raises(ValueError, match="floats"):
        square("Q8_0", place, 1, place)
    with pytest.raises(ValueError):
        native.Linear(native.Matrix("F32", 64, 64), 0)
