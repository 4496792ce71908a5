"""Block formats against the ``gguf`` package, and what it leaves open: NaN, overflow, layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moei_core.errors import DamagedFileError, UnsupportedModelError
from moei_core.quant.formats import ENCODABLE_FORMATS, FORMATS, decode, transcode
from moei_core.quant.layouts import LAYOUTS, ROWS16, can_interleave, from_layout, to_layout

gguf = pytest.importorskip("gguf", reason="the gguf package is the reference")


def theirs(name: str) -> Any:
    return getattr(gguf.GGMLQuantizationType, name)


def encoded(name: str, values: np.ndarray) -> np.ndarray:
    return transcode("F32", values.astype("<f4").reshape(-1).view(np.uint8), name, "w")


def floats(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ties = rng.integers(-4, 5, (64, 64)).astype(np.float32)
    halves = rng.integers(-254, 255, (64, 64)).astype(np.float32) / 2
    halves[:, ::32] = 127
    zeros = floats(rng, (8, 96))
    zeros[2:4] = 0
    zeros[5, 32:64] = -0.0
    single = np.zeros((4, 64), np.float32)
    single[0, 3], single[1, 40] = 5, -7
    return {
        "normal": floats(rng, (37, 160)) * np.float32(0.02),
        "more than one chunk": floats(rng, (33, 4096)),
        "equal magnitudes of both signs": ties,
        "halfway between two quants": halves,
        "blocks of zeros": zeros,
        "one weight in a block": single,
        "largest": floats(rng, (16, 64)) * np.float32(1e5),
        "scales that are denormal as float16": floats(rng, (16, 64)) * np.float32(1e-6),
        "scales that round to zero as float16": floats(rng, (16, 64)) * np.float32(1e-9),
        "all magnitudes": floats(rng, (64, 64)) * np.logspace(-30, 4, 64, dtype=np.float32)[:, None],
    }


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("name", ENCODABLE_FORMATS)
def test_encode_and_decode_are_the_reference_bit_for_bit(name: str, case: str) -> None:
    values = cases()[case]
    ours = encoded(name, values).reshape(len(values), -1)
    assert np.array_equal(ours, gguf.quantize(values, theirs(name)))
    found = decode(name, ours, values.shape)
    assert np.array_equal(found.view(np.uint32), gguf.dequantize(ours, theirs(name)).view(np.uint32))


@pytest.mark.parametrize("name", ENCODABLE_FORMATS)
def test_the_error_of_a_weight_is_bounded_by_its_blocks_scale(name: str) -> None:
    values = floats(np.random.default_rng(2), (64, 256))
    error = np.abs(decode(name, encoded(name, values), values.shape) - values).reshape(-1, 32)
    largest = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
    # Half a step, or a whole one where Q4_0 has no quant for the far end of the range; and the scale's rounding.
    steps = {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8}[name]
    assert (error <= largest * (steps + 2**-11)).all()
    assert error.max() > 0


@given(
    values=arrays.arrays(np.float32, (3, 64), elements=st.floats(-8e6, 8e6, width=32, allow_subnormal=True)),
    name=st.sampled_from(ENCODABLE_FORMATS),
)
@settings(max_examples=200, deadline=None)
def test_fuzzed_weights_encode_as_the_reference(values: np.ndarray, name: str) -> None:
    largest = np.abs(values).reshape(-1, 32).max(axis=1)
    scale = (largest / (127 if name == "Q8_0" else 8)).astype(np.float32)
    if name == "Q4_0" and (scale > 65504).any():
        with pytest.raises(UnsupportedModelError):
            encoded(name, values)
        return
    ours = encoded(name, values).reshape(-1, FORMATS[name].block_nbytes)
    # Below 2^-128 the reference divides by zero in float32 and casts infinity; the weights are zero either way.
    defined = (scale == 0) | (scale > 2.0**-127)
    with np.errstate(all="ignore"):
        reference = gguf.quantize(values, theirs(name)).reshape(ours.shape)
    assert np.array_equal(ours[defined], reference[defined])
    assert not decode(name, ours[~defined], (int((~defined).sum()), 32)).any()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"])
def test_any_bytes_decode_as_the_reference(name: str) -> None:
    form = FORMATS[name]
    blocks = np.random.default_rng(3).integers(0, 256, (4000, form.block_nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = decode(name, blocks, (4000, form.block_size))
        expected = gguf.dequantize(blocks, theirs(name)).reshape(found.shape)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert nan.mean() < 0.2


def test_the_sizes_of_the_table_are_the_references() -> None:
    for name, form in FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[theirs(name)] == (form.block_size, form.block_nbytes)


@pytest.mark.parametrize("source", ["F16", "BF16", "F32"])
def test_encoding_reads_every_float_format(source: str) -> None:
    values = floats(np.random.default_rng(4), (5, 64))
    if source == "F16":
        raw = values.astype("<f2").view(np.uint8)
        values = values.astype("<f2").astype(np.float32)
    else:
        bits = values.view(np.uint32)
        if source == "BF16":
            bits &= np.uint32(0xFFFF0000)
            raw = (bits >> np.uint32(16)).astype("<u2").view(np.uint8)
        else:
            raw = values.view(np.uint8)
    assert np.array_equal(decode(source, raw.reshape(-1), values.shape), values)
    assert np.array_equal(transcode(source, raw.reshape(-1), "Q8_0", "w"), encoded("Q8_0", values))


@pytest.mark.parametrize("name", ENCODABLE_FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(name: str, bad: float) -> None:
    values = np.ones((3000, 64), np.float32)
    values[2999, 63] = bad
    with pytest.raises(DamagedFileError, match=r"model\.w"):
        transcode("F32", values.reshape(-1).view(np.uint8), name, "model.w")


@pytest.mark.parametrize("name", ENCODABLE_FORMATS)
def test_weights_beyond_the_scale_are_refused_by_name(name: str) -> None:
    values = np.full((1, 32), 3e38, np.float32)
    with pytest.raises(UnsupportedModelError, match=r"model\.w"):
        transcode("F32", values.reshape(-1).view(np.uint8), name, "model.w")


def test_which_shapes_a_format_holds() -> None:
    assert FORMATS["Q4_0"].holds((3, 64)) and not FORMATS["Q4_0"].holds((64, 3))
    assert not FORMATS["Q4_0"].holds(()) and FORMATS["BF16"].holds(()) and FORMATS["F32"].holds((3,))
    assert FORMATS["Q4_0"].nbytes((3, 64)) == 3 * 2 * 18 and FORMATS["BF16"].nbytes((3, 5)) == 30


@given(
    name=st.sampled_from(["Q8_0", "Q4_0"]), groups=st.integers(1, 4), columns=st.integers(1, 5), seed=st.integers(0, 9)
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_rows16_is_what_its_definition_says(name: str, groups: int, columns: int, seed: int) -> None:
    shape = (16 * groups, 32 * columns)
    nbytes = FORMATS[name].block_nbytes
    plain = np.random.default_rng(seed).integers(0, 256, FORMATS[name].nbytes(shape), dtype=np.uint8)
    for layout in LAYOUTS:
        assert np.array_equal(from_layout(layout, name, to_layout(layout, name, plain, shape), shape), plain)
    stored = to_layout(ROWS16, name, plain, shape)
    assert stored.size == plain.size
    for row in range(shape[0]):
        for column in range(columns):
            block = plain[(row * columns + column) * nbytes :][:nbytes]
            tile = stored[(row // 16 * columns + column) * 16 * nbytes :][: 16 * nbytes]
            assert np.array_equal(tile[row % 16 * 2 :][:2], block[:2])
            for piece in range((nbytes - 2) // 4):
                at = 32 + (piece * 16 + row % 16) * 4
                assert np.array_equal(tile[at : at + 4], block[2 + 4 * piece :][:4])


def test_what_can_be_interleaved() -> None:
    assert can_interleave("Q8_0", (32, 64))
    assert not can_interleave("Q8_0", (33, 64))
    assert not can_interleave("BF16", (32, 64))
    assert not can_interleave("Q8_0", (64,))
