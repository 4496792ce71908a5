"""Matrix products of every format and order against float64 products of the stored values (contract E3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moei_core.errors import UsageError
from moei_core.quant import native
from tests.native.weights import (
    FORMATS,
    INTEGER_FORMATS,
    block_size,
    decoded,
    orders,
    product_bound,
    run_linear,
    stored_weights,
)

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


@pytest.mark.parametrize(("fmt", "order"), [(fmt, order) for fmt in FORMATS for order in orders(fmt)])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_product_is_within_its_bound_and_does_not_depend_on_the_batch(
    fmt: str, order: str, data: st.DataObject
) -> None:
    rows = data.draw(st.integers(1, 50), "rows")
    cols = data.draw(st.integers(1, 5 if block_size(fmt) > 1 else 90), "blocks") * block_size(fmt)
    tokens = data.draw(st.integers(1, 12), "tokens")
    scale = data.draw(st.sampled_from([1.0, 1e-20, 1e-39, 1e20]), "magnitude")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
    stored = stored_weights(rng, fmt, rows, cols)
    x = (rng.standard_normal((tokens, cols)) * scale).astype(np.float32)
    weights = decoded(fmt, stored, rows, cols)

    out = run_linear(fmt, stored, rows, x, order)

    error = np.abs(out - x.astype(np.float64) @ weights.T)
    assert (error <= product_bound(fmt, weights, x.astype(np.float64))).all()
    alone = np.concatenate([run_linear(fmt, stored, rows, x[t : t + 1], order) for t in range(tokens)])
    assert out.tobytes() == alone.tobytes()
    if order == "rows16":
        assert out.tobytes() == run_linear(fmt, stored, rows, x, "plain").tobytes()


@pytest.mark.parametrize("fmt", INTEGER_FORMATS)
def test_zero_blocks_and_extreme_scales(fmt: str) -> None:
    stored = stored_weights(np.random.default_rng(0), fmt, 16, 128).reshape(16, 4, -1)
    if fmt == "MXFP4":
        stored[:, :, 0] = [0, 1, 2, 240]  # two subnormal scales, the smallest normal one, a huge one
    else:
        for block, scale in enumerate([0.0, 65504.0, 6e-8, -65504.0]):
            stored[:, block, :2] = np.array([scale], np.float16).view(np.uint8)
    flat = stored.reshape(-1)
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    x[1] = 0
    x[2, :64] = 0
    weights = decoded(fmt, flat, 16, 128)
    for order in orders(fmt):
        out = run_linear(fmt, flat, 16, x, order)
        assert (np.abs(out - x @ weights.T) <= product_bound(fmt, weights, x.astype(np.float64))).all()
        assert not out[1].any()


@pytest.mark.parametrize("fmt", INTEGER_FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_no_numbers_stay_visible(fmt: str, bad: float) -> None:
    stored = stored_weights(np.random.default_rng(0), fmt, 20, 64)
    x = np.ones((2, 64), np.float32)
    x[1, 40] = bad
    out = run_linear(fmt, stored, 20, x, "rows16")
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("fmt", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"])
def test_decoding_equals_gguf(fmt: str) -> None:
    stored = stored_weights(np.random.default_rng(2), fmt, 40, 512)
    assert np.array_equal(native.decode(fmt, stored, 40 * 512), decoded(fmt, stored, 40, 512).reshape(-1))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(INTEGER_FORMATS), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_interleaving_is_lossless_and_as_documented(fmt: str, rows: int, blocks: int, seed: int) -> None:
    cols, nbytes = 32 * blocks, native.Matrix(fmt, 1, 32).nbytes
    scale = 1 if fmt == "MXFP4" else 2
    stored = np.random.default_rng(seed).integers(0, 256, rows * blocks * nbytes, np.uint8)
    packed = native.to_rows16(fmt, rows, cols, stored)
    assert packed.nbytes == native.Matrix(fmt, rows, cols, "rows16").nbytes
    assert np.array_equal(native.from_rows16(fmt, rows, cols, packed), stored)
    tiles = packed.reshape(-1, blocks, 16 * nbytes)
    for row in range(rows):
        tile, block = tiles[row // 16], stored.reshape(rows, blocks, nbytes)[row]
        lane = row % 16
        assert np.array_equal(tile[:, scale * lane : scale * (lane + 1)], block[:, :scale])
        pieces = tile[:, 16 * scale :].reshape(blocks, -1, 16, 4)[:, :, lane]
        assert np.array_equal(pieces.reshape(blocks, -1), block[:, scale:])


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_that_are_no_numbers_are_found(fmt: str) -> None:
    cols = 2 * max(block_size(fmt), 8)
    stored = stored_weights(np.random.default_rng(3), fmt, 3, cols)
    matrix = native.Matrix(fmt, 3, cols)
    assert native.all_finite(matrix, stored)
    end = {"F32": 4, "F16": 2, "BF16": 2, "Q6_K": 2}.get(fmt)
    if end is not None:
        top = stored[-end:].view(np.float32 if fmt == "F32" else np.uint16)
        top[:] = np.nan if fmt == "F32" else 0x7F80 if fmt == "BF16" else 0x7E00
    elif fmt == "MXFP4":
        stored[17] = 255
    else:
        stored[0:2] = np.array([np.inf], np.float16).view(np.uint8)
    assert not native.all_finite(matrix, stored)
    if "rows16" in orders(fmt):
        packed = native.to_rows16(fmt, 3, cols, stored)
        assert not native.all_finite(native.Matrix(fmt, 3, cols, "rows16"), packed)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("Q8_0", 16, 40), "multiple of 32"),
        (("Q4_K", 16, 128), "multiple of 256"),
        (("Q9_9", 16, 32), "Q8_0"),
        (("Q8_0", 16, 32, "sideways"), "rows16"),
        (("Q8_0", 16, 32, "transposed"), "transposed"),
        (("BF16", 16, 32, "rows16"), "interleaved"),
        (("F32", 0, 32), "positive"),
    ],
)
def test_what_no_kernel_computes_is_refused(arguments: tuple[object, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        native.Matrix(*arguments)  # type: ignore[arg-type]
    assert len(caught.value.lines()) <= 3


def test_wrong_shapes_are_refused() -> None:
    stored = np.zeros(16 * 34, np.uint8)
    out = np.zeros((1, 16), np.float32)
    matrix = native.Matrix("Q8_0", 16, 32)
    for x, result in [((1, 64), (1, 16)), ((1, 32), (1, 17)), ((2, 32), (1, 16))]:
        with pytest.raises(ValueError):
            native.linear(matrix, stored.ctypes.data, np.zeros(x, np.float32), np.zeros(result, np.float32))
    with pytest.raises(ValueError):
        native.linear(matrix, 0, np.zeros((1, 32), np.float32), out)
    with pytest.raises(ValueError):
        native.to_rows16("Q8_0", 16, 32, stored[:-1])
    with pytest.raises(ValueError):
        native.decode("Q8_0", stored, 33)
