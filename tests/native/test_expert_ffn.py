"""The fused expert call: every activation and way of gating against float64, and the same bits however it is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moei_core.errors import UsageError
from moei_core.quant import native
from tests.native.weights import (
    FORMATS,
    UNIT,
    Bytes,
    Doubles,
    block_size,
    decoded,
    in_order,
    orders,
    product_bound,
    stored_weights,
)

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())

Floats = NDArray[np.float32]


def _sigmoid(x: Doubles) -> Doubles:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))


ACTIVATIONS: dict[str, Callable[[Doubles], Doubles]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "clamped_swiglu": lambda x: np.minimum(x, 7) * _sigmoid(1.702 * np.minimum(x, 7)),
}
STEEPEST = 1.2
"""No activation above changes faster than this."""


@dataclass
class Expert:
    """One expert's stored parts, kept alive, and what they mean."""

    addresses: list[int] = field(default_factory=list)
    kept: list[NDArray[np.generic]] = field(default_factory=list)
    values: dict[str, Doubles] = field(default_factory=dict)


def make_expert(rng: np.random.Generator, layout: native.FfnLayout, biases: bool) -> Expert:
    hidden, middle = layout.hidden_size, layout.intermediate_size
    expert = Expert()

    def keep(fmt: str, stored: Bytes, rows: int, cols: int, order: str) -> int:
        expert.kept.append(in_order(fmt, stored, rows, cols, order))
        return expert.kept[-1].ctypes.data

    def bias(size: int) -> NDArray[np.float32]:
        return (rng.standard_normal(size) if biases else np.zeros(size)).astype(np.float32)

    gate, up = (stored_weights(rng, layout.gate_up_format, middle, hidden) for _ in range(2))
    down = stored_weights(rng, layout.down_format, hidden, middle)
    gate_bias, up_bias, down_bias = bias(middle), bias(middle), bias(hidden)
    joined, joined_bias = {
        "none": ([up], [up_bias]),
        "separate": ([gate, up], [gate_bias, up_bias]),
        "concatenated": ([np.concatenate([gate, up])], [np.concatenate([gate_bias, up_bias])]),
        "interleaved": (
            [np.stack([gate.reshape(middle, -1), up.reshape(middle, -1)], 1).reshape(-1)],
            [np.stack([gate_bias, up_bias], 1).reshape(-1)],
        ),
    }[layout.gating]
    matrix = layout.gate_up
    weights = [keep(matrix.format, part, matrix.rows, hidden, matrix.order) for part in joined]
    weights = [*([*weights, 0])[:2], keep(layout.down_format, down, hidden, middle, layout.down_order)]
    bias_addresses = [0, 0, 0]
    if biases:
        all_biases = [*joined_bias, *([np.zeros(0, np.float32)] if len(joined_bias) == 1 else []), down_bias]
        expert.kept += all_biases
        bias_addresses = [part.ctypes.data if part.size else 0 for part in all_biases]
    expert.addresses = weights + bias_addresses
    expert.values = {
        "gate": decoded(layout.gate_up_format, gate, middle, hidden),
        "up": decoded(layout.gate_up_format, up, middle, hidden),
        "down": decoded(layout.down_format, down, hidden, middle),
        "gate_bias": gate_bias.astype(np.float64),
        "up_bias": up_bias.astype(np.float64),
        "down_bias": down_bias.astype(np.float64),
    }
    return expert


def reference(layout: native.FfnLayout, expert: Expert, x: Floats) -> tuple[Doubles, Doubles]:
    """The exact result of the stored values, [tokens, hidden], and how far the kernels may be from it."""
    weights, inputs = expert.values, x.astype(np.float64)
    activation = ACTIVATIONS[layout.activation]

    def projected(name: str, inputs: Doubles, fmt: str, error: Doubles | float) -> tuple[Doubles, Doubles]:
        exact = inputs @ weights[name].T + weights[f"{name}_bias"]
        return exact, product_bound(fmt, weights[name], inputs, error) + UNIT * np.abs(exact)

    up, up_error = projected("up", inputs, layout.gate_up_format, 0.0)
    if layout.gating == "none":
        middle, error = activation(up), STEEPEST * up_error
    else:
        gate, gate_error = projected("gate", inputs, layout.gate_up_format, 0.0)
        if layout.activation == "clamped_swiglu":
            up = np.clip(up, -7, 7) + 1
        middle = activation(gate) * up
        error = STEEPEST * gate_error * (np.abs(up) + up_error) + np.abs(activation(gate)) * up_error
    # The activation itself: a dozen roundings, and gelu_tanh's cube steepens those of its argument.
    error = error + 64 * UNIT * np.abs(middle) + 1e-6 * (layout.activation == "gelu_tanh") + 1e-30
    wider = product_bound(layout.down_format, weights["down"], np.abs(middle) + error, error)
    exact, _ = projected("down", middle, layout.down_format, error)
    return exact, wider + UNIT * np.abs(exact)


def run(layout: native.FfnLayout, experts: list[Expert], tokens: list[list[int]], x: Floats) -> list[Floats]:
    """Each expert's results for its tokens (rows of ``x``), all in one call."""
    offsets = np.cumsum([0, *map(len, tokens)])
    out = np.full((offsets[-1], layout.hidden_size), np.nan, np.float32)
    parts = np.array([expert.addresses for expert in experts], np.int64)
    rows = np.array([row for own in tokens for row in own], np.int64)
    ffn = native.ExpertFfn(layout)
    ffn(parts, offsets, rows, x, out)
    # The same to other rows, each times a weight, and nothing else is written.
    rng = np.random.default_rng(len(rows))
    places, weights = rng.permutation(len(rows) + 3), rng.standard_normal(len(rows), np.float32)
    placed = np.full((len(rows) + 3, layout.hidden_size), 7, np.float32)
    ffn(parts, offsets, rows, x, placed, places[:-3].copy(), weights)
    assert np.array_equal(placed[places[:-3]], out * weights[:, None], equal_nan=True)
    assert (placed[places[-3:]] == 7).all()
    return np.split(out, offsets[1:-1])


def layouts() -> list[native.FfnLayout]:
    """Every format, order, activation and gating, each activation and gating with every order."""
    if not native.available():
        return []
    made = []
    for fmt in FORMATS:
        for order in orders(fmt):
            for index, activation in enumerate(ACTIVATIONS):
                size = max(64, block_size(fmt)) if block_size(fmt) > 1 else 37
                gating = native.GATINGS[(index + 1) % 4 or 1]
                base = native.FfnLayout(
                    size,
                    2 * size,
                    fmt,
                    fmt,
                    gating,
                    gate_up_order=order,
                    down_order=order,
                    activation=activation,
                )
                made += [base]
    for gating in native.GATINGS:
        made.append(native.FfnLayout(64, 96, "Q4_0", "Q8_0", gating, "rows16", "plain", "gelu"))
        made.append(native.FfnLayout(33, 45, "BF16", "F32", gating, "transposed", "plain", "silu"))
    return made


@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: "-".join(map(str, _name(layout))))
def test_an_expert_is_within_its_bound_alone_and_together(layout: native.FfnLayout) -> None:
    rng = np.random.default_rng(5)
    biases = layout.gating != "separate" or layout.activation == "gelu"
    experts = [make_expert(rng, layout, biases) for _ in range(3)]
    x = rng.standard_normal((70, layout.hidden_size)).astype(np.float32)
    tokens = [list(range(69, -1, -1)), [], [3, 3, 68]]
    together = run(layout, experts, tokens, x)
    for expert, own, out in zip(experts[::2], tokens[::2], together[::2], strict=True):
        exact, bound = reference(layout, expert, x[own])
        assert (np.abs(out - exact) <= bound).all()
    alone = [run(layout, [experts[0]], [[row]], x[: row + 1])[0] for row in tokens[0]]
    assert together[0].tobytes() == b"".join(part.tobytes() for part in alone)


def _name(layout: native.FfnLayout) -> tuple[str, ...]:
    return layout.gate_up_format, layout.gate_up_order, layout.gating, layout.activation


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_bits_depend_on_nothing_but_the_expert_and_the_row(data: st.DataObject) -> None:
    fmt = data.draw(st.sampled_from(["Q8_0", "Q4_0", "MXFP4", "BF16", "F16"]), "format")
    order = data.draw(st.sampled_from(orders(fmt)), "order")
    step = block_size(fmt)
    hidden, middle = (
        data.draw(st.integers(1, 5 if step > 1 else 70), name) * step for name in ("hidden", "middle")
    )
    layout = native.FfnLayout(hidden, middle, fmt, fmt, gate_up_order=order, down_order=order)
    rng = np.random.default_rng(data.draw(st.integers(0, 999), "seed"))
    count = data.draw(st.integers(1, 20), "tokens")
    x = rng.standard_normal((count, hidden)).astype(np.float32)
    experts = [make_expert(rng, layout, False) for _ in range(data.draw(st.integers(1, 4), "experts"))]
    tokens = [data.draw(st.lists(st.integers(0, count - 1), max_size=12)) for _ in experts]
    before = native.num_threads()
    try:
        native.set_num_threads(1)
        first = run(layout, experts, tokens, x)
        native.set_num_threads(data.draw(st.integers(1, 4), "threads"))
        shuffled = data.draw(st.permutations(range(len(experts))), "permutation")
        second = run(layout, [experts[i] for i in shuffled], [tokens[i][::-1] for i in shuffled], x)
    finally:
        native.set_num_threads(before)
    for i, out in zip(shuffled, second, strict=True):
        assert out[::-1].tobytes() == first[i].tobytes()


def test_biases_of_other_formats_and_unaligned_parts() -> None:
    layout = native.FfnLayout(64, 64, "BF16", "BF16", bias_format="BF16")
    expert = make_expert(np.random.default_rng(6), replace(layout, bias_format="F32"), biases=True)
    x = np.random.default_rng(7).standard_normal((2, 64)).astype(np.float32)
    # The same biases cut to bfloat16, and every part at an odd address.
    parts = [np.asarray(part) for part in expert.kept]
    parts = [*parts[:3], *(np.ascontiguousarray(part.view(np.uint16)[1::2]) for part in parts[3:])]
    moved = [np.concatenate([np.zeros(1, np.uint8), part.view(np.uint8)]) for part in parts]
    cut = {
        name: (part.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        for name, part in zip(("gate_bias", "up_bias", "down_bias"), parts[3:], strict=True)
    }
    odd = Expert([part.ctypes.data + 1 for part in moved], [*moved], {**expert.values, **cut})
    exact, bound = reference(layout, odd, x)
    assert (np.abs(run(layout, [odd], [[0, 1]], x)[0] - exact) <= bound).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gating": "twice"}, "interleaved"),
        ({"activation": "swish"}, "silu"),
        ({"activation": "clamped_swiglu", "gating": "none"}, "gate"),
        ({"bias_format": "Q8_0"}, "BF16"),
        ({"intermediate_size": 72}, "multiple of 32"),
        (
            {
                "gating": "concatenated",
                "intermediate_size": 24,
                "down_format": "F32",
                "gate_up_order": "rows16",
            },
            "16",
        ),
    ],
)
def test_layouts_that_no_kernel_computes_are_refused(changes: dict[str, str | int], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        replace(native.FfnLayout(64, 64, "Q8_0", "Q8_0"), **changes)  # type: ignore[arg-type]
    assert len(caught.value.lines()) <= 3


def test_calls_that_contradict_themselves_are_refused() -> None:
    layout = native.FfnLayout(32, 32, "F32", "F32")
    ffn, expert = native.ExpertFfn(layout), make_expert(np.random.default_rng(0), layout, False)
    parts = np.array([expert.addresses], np.int64)
    x, out = np.zeros((2, 32), np.float32), np.zeros((2, 32), np.float32)
    offsets, rows, ones = np.array([0, 2]), np.array([0, 1]), np.ones(2, np.float32)
    ffn(parts, offsets, rows, x, out)
    missing = parts.copy()
    missing[0, 1] = 0
    for wrong in (
        (parts[:, :5].copy(), offsets, rows, x, out),
        (parts, np.array([0, 1]), rows, x, out),
        (parts, np.array([0, 3, 2]), rows, x, out),
        (np.repeat(parts, 2, 0), np.array([0, 3, 2]), rows, x, out),
        (parts, offsets, np.array([0, 2]), x, out),
        (parts, offsets, np.array([-1, 0]), x, out),
        (parts, offsets, rows, x[:, :16].copy(), out),
        (parts, offsets, rows, x, out[:1]),
        (missing, offsets, rows, x, out),
        (parts, offsets, rows, x, out, rows),
        (parts, offsets, rows, x, out, np.array([0, 2]), ones),
        (parts, offsets, rows, x, out, np.array([-1, 0]), ones),
        (parts, offsets, rows, x, out, rows[:1].copy(), ones),
        (parts, offsets, rows, x, out, rows, ones[:1].copy()),
    ):
        with pytest.raises(ValueError):
            ffn(*wrong)
    for wrong_type in (
        (parts, offsets, rows, x.astype(np.float64), out),
        (parts, offsets, rows, x, out.astype(np.float64)),
        (parts, offsets, rows, x, np.zeros((32, 2), np.float32).T),
    ):
        with pytest.raises(TypeError):
            ffn(*wrong_type)  # type: ignore[arg-type]
