"""Attention over latents, against float64 with keys and values expanded (E3), and itself (E1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from moei_core.adapters.dense_linear import TYPES
from moei_core.quant import native
from moei_core.quant.native_latent import TURNS, LatentAttention, LatentProjections, NormWeights
from tests.native.weights import decoded, stored_weights

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
DTYPES = tuple(TYPES)
LOW, SCALE, EPS = 32, 0.2, 1e-6


class Case:
    """Random parts of an attention, stored as floats or in Q8_0 blocks, and their exact values."""

    def __init__(
        self,
        dtype: torch.dtype,
        turn: str = "halves",
        low: bool = False,
        blocks: bool = False,
        heads: int = 4,
        nope: int = 16,
        rotary: int = 8,
        value: int = 32,
        rank: int = 64,
        hidden: int = 96,
        position: int = 37,
    ) -> None:
        self.dtype, self.turn, self.sizes = dtype, turn, (heads, nope, rotary, value)
        self.rank, self.hidden, self.position, self.capacity = rank, hidden, position, position + 3
        self._generator, self._random = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self._kept: list[Any] = []
        shapes = {
            "q_a": (LOW, hidden),
            "q": (heads * (nope + rotary), LOW if low else hidden),
            "kv_a": (rank + rotary, hidden),
            "kv_b": (heads * (nope + value), rank),
            "o": (hidden, heads * value),
        }
        made = {name: self._matrix(*shape, blocks) for name, shape in shapes.items()}
        self.exact = {name: one[1] for name, one in made.items()}
        self.norms = {"q": self.some(LOW).float(), "kv": self.some(rank).float()}
        q_norm, kv_norm = (NormWeights(one.tolist(), EPS) for one in self.norms.values())
        self.low = low
        self.projections = LatentProjections(
            made["q_a"][0] if low else None,
            q_norm if low else None,
            made["q"][0],
            made["kv_a"][0],
            kv_norm,
            made["kv_b"][0],
            made["o"][0],
        )
        self.x, self.turns = self.some(hidden), self.some(2, rotary)
        if turn == "neighbors":
            self.turns = self.some(rotary // 2, 2).float()
        self.latents, self.turned = self.some(self.capacity, rank), self.some(self.capacity, rotary)

    def some(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def _matrix(self, rows: int, cols: int, blocks: bool) -> tuple[native.Linear, torch.Tensor]:
        if not blocks:
            weight = (self.some(rows, cols).float() * cols**-0.5).to(self.dtype)
            self._kept.append(weight)
            return native.Linear(
                native.Matrix(TYPES[self.dtype], rows, cols), weight.data_ptr()
            ), weight.double()
        stored = stored_weights(self._random, "Q8_0", rows, cols)
        # The scales, so that products have the size of the others'.
        scales = stored.reshape(-1, 34)[:, :2].copy().view(np.float16) * np.float16(cols**-0.5)
        stored.reshape(-1, 34)[:, :2] = scales.view(np.uint8)
        kept = native.to_rows16("Q8_0", rows, cols, stored)
        self._kept.append(kept)
        matrix = native.Matrix("Q8_0", rows, cols, "rows16")
        return native.Linear(matrix, kept.ctypes.data), torch.from_numpy(decoded("Q8_0", stored, rows, cols))

    def run(self, mask: torch.Tensor | None = None, threads: int = 1) -> Mapping[str, torch.Tensor]:
        """The kernel's result, and what it puts into the cache."""
        kernel = LatentAttention(self.projections, self.sizes, SCALE, self.turn)
        latents, turned, out = self.latents.clone(), self.turned.clone(), self.some(self.hidden)
        places = (self.turns.data_ptr(),) * 2
        if self.turn != "neighbors":
            places = self.turns[0].data_ptr(), self.turns[1].data_ptr()
        cache = latents.data_ptr(), turned.data_ptr(), self.capacity, self.position
        before = native.num_threads()
        native.set_num_threads(threads)
        try:
            seen = 0 if mask is None else mask.data_ptr()
            kernel(TYPES[self.dtype], self.x.data_ptr(), places, cache, seen, out.data_ptr())
        finally:
            native.set_num_threads(before)
        others = [place for place in range(self.capacity) if place != self.position]
        for after, as_it_was in ((latents, self.latents), (turned, self.turned)):
            torch.testing.assert_close(after[others], as_it_was[others], rtol=0, atol=0, equal_nan=True)
        return {"out": out, "latent": latents[self.position], "turned": turned[self.position]}

    def truth(
        self, cached: Mapping[str, torch.Tensor], mask: torch.Tensor | None = None
    ) -> Mapping[str, torch.Tensor]:
        """The same in float64, keys and values of all heads expanded. ``cached`` holds what the cache rounded."""
        heads, nope, rotary, value = self.sizes
        weight, x = self.exact, self.x.double()

        def normed(one: torch.Tensor, name: str) -> torch.Tensor:
            return one / (one.square().mean() + EPS).sqrt() * self.norms[name].double()

        def turn(one: torch.Tensor) -> torch.Tensor:
            turns = self.turns.double()
            if self.turn == "halves":
                first, second = one.chunk(2, -1)
                return one * turns[0] + torch.cat([-second, first], -1) * turns[1]
            cosine, sine = turns.unbind(-1) if self.turn == "neighbors" else turns[:, : rotary // 2]
            even, odd = one[..., 0::2], one[..., 1::2]
            pair = even * cosine - odd * sine, odd * cosine + even * sine
            return torch.stack(pair, -1).flatten(-2) if self.turn == "neighbors" else torch.cat(pair, -1)

        q = weight["q"] @ (normed(weight["q_a"] @ x, "q") if self.low else x)
        q = q.view(heads, nope + rotary)
        compressed = weight["kv_a"] @ x
        latent, turned = normed(compressed[: self.rank], "kv"), turn(compressed[self.rank :])
        latents, turns = (one[: self.position + 1].double() for one in (self.latents, self.turned))
        latents[-1], turns[-1] = cached["latent"].double(), cached["turned"].double()
        both = weight["kv_b"].view(heads, nope + value, self.rank)
        keys, values = (torch.einsum("hdr,tr->htd", one, latents) for one in (both[:, :nope], both[:, nope:]))
        scores = torch.einsum("hd,htd->ht", q[:, :nope], keys)
        scores = (scores + torch.einsum("hd,td->ht", turn(q[:, nope:]), turns)) * SCALE
        if mask is not None:
            scores[:, ~mask] = -torch.inf
        mixed = torch.einsum("ht,htd->hd", scores.softmax(-1), values)
        return {"out": weight["o"] @ mixed.reshape(-1), "latent": latent, "turned": turned}


def some_seen(count: int) -> torch.Tensor:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[-1] = True
    return mask


SIZES: list[dict[str, int]] = [
    {"position": 0},
    {"position": 700, "heads": 24, "rank": 96},
    {"position": 3000, "heads": 3, "rank": 512, "rotary": 64, "nope": 128, "value": 128},
    {"position": 65, "heads": 1, "rotary": 2, "hidden": 32},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_token_attends_as_with_expanded_keys_and_values(
    sizes: dict[str, int], turn: str, low: bool, dtype: torch.dtype, masked: bool
) -> None:
    case = Case(dtype, turn, low, **sizes)
    mask = some_seen(case.position + 1) if masked else None
    found = case.run(mask)
    for name, exact in case.truth(found, mask).items():
        # Float32 throughout, one rounding at the end.
        assert torch.allclose(found[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5), name
    again = case.run(mask, threads=3)
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_blocks_are_within_the_quantisation_of_their_inputs(
    sizes: dict[str, int], low: bool, dtype: torch.dtype
) -> None:
    case = Case(dtype, "neighbors", low, blocks=True, **sizes)
    mask = some_seen(case.position + 1)
    found = case.run(mask)
    for name, exact in case.truth(found, mask).items():
        error = (found[name].double() - exact).square().mean().sqrt()
        # Half a step of 127 for each of four products, of which two make scores of a size up to 10.
        assert error <= 0.03 * exact.square().mean().sqrt(), name
    again = case.run(mask, threads=3)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_what_is_no_number_stays_visible() -> None:
    for name in ("latents", "turned"):
        case = Case(torch.float32)
        getattr(case, name)[5, 3] = torch.nan
        assert torch.isnan(case.run()["out"]).all()


def test_parts_that_do_not_fit_are_refused() -> None:
    case = Case(torch.float32)
    parts = case.projections
    heads, nope, rotary, value = case.sizes

    def made(sizes: tuple[int, int, int, int] = case.sizes, turn: str = "halves", **changed: Any) -> None:
        values = {name: getattr(parts, name) for name in parts.__slots__}
        LatentAttention(LatentProjections(**{**values, **changed}), sizes, SCALE, turn)

    made()
    for sizes in (
        (heads, nope, rotary, value + 1),
        (heads, nope + 1, rotary, value),
        (0, nope, rotary, value),
    ):
        with pytest.raises(ValueError):
            made(sizes)
    with pytest.raises(ValueError):
        made((heads, nope + 1, rotary - 1, value))
    with pytest.raises(ValueError, match="turn"):
        made(turn="thirds")
    with pytest.raises(ValueError, match="norm"):
        made(kv_norm=NormWeights([1.0], EPS))
    with pytest.raises(ValueError):
        made(q_a=Case(torch.float32, low=True).projections.q_a)
    other = Case(torch.float32, blocks=True)
    with pytest.raises(ValueError, match="one format"):
        made(kv_a=other.projections.kv_a)
    rows, cols = other.exact["kv_b"].shape
    plain = np.zeros(rows * cols // 32 * 34, np.uint8)
    with pytest.raises(ValueError, match="stored otherwise"):
        made(kv_b=native.Linear(native.Matrix("Q8_0", rows, cols), plain.ctypes.data))
    kernel = LatentAttention(parts, case.sizes, SCALE, "halves")
    place = case.x.data_ptr()
    with pytest.raises(ValueError, match="room"):
        kernel("F32", place, (place, place), (place, place, 5, 5), 0, place)
