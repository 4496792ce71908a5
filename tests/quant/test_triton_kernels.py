"""The GPU kernels against the table of formats. Interpreted on the processor, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moei_core.quant.formats import FORMATS, decode
from moei_core.quant.layouts import LAYOUTS, to_layout

pytest.importorskip("triton", reason="triton is not installed: pip install 'moei[gpu]'")

from moei_core.quant import triton_kernels

PLACES = [pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [("BF16", "plain"), *((name, layout) for name in ("Q8_0", "Q4_0", "MXFP4") for layout in LAYOUTS)]


@pytest.fixture(autouse=True)
def only_where_it_runs(request: pytest.FixtureRequest) -> None:
    place = request.node.callspec.params["place"] if hasattr(request.node, "callspec") else ""
    if place == "cpu" and not triton_kernels.usable(torch.zeros(1)):
        pytest.skip("triton interprets only with TRITON_INTERPRET=1, which cannot be where it compiles")


def stored(name: str, layout: str, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes as stored, their exact values [out, in])."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if name == "BF16":
        raw = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy().reshape(-1)
    elif name == "MXFP4":
        blocks = np.random.default_rng(seed).integers(0, 256, (values.size // 32, 17), np.uint8)
        blocks[:, 0] = np.random.default_rng(seed).integers(122, 128, len(blocks))
        blocks[:2, 0] = [0, 1]  # subnormal scales
        raw = blocks.reshape(-1)
    else:
        encode = FORMATS[name].encode
        assert encode is not None
        raw = encode(values.reshape(-1, 32)).reshape(-1)
    return to_layout(layout, name, raw, shape), decode(name, raw, shape)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_decoded_values_are_exact(name: str, layout: str, place: str) -> None:
    shape = (48, 96)
    raw, values = stored(name, layout, shape, 0)
    found = torch.empty(shape, dtype=torch.float32, device=place)
    triton_kernels.decode(name, layout, shape, torch.from_numpy(raw.copy()).to(place), found)
    assert torch.equal(found.cpu(), torch.from_numpy(values))
    half = torch.empty(shape, dtype=torch.bfloat16, device=place)
    triton_kernels.decode(name, layout, shape, torch.from_numpy(raw.copy()).to(place), half)
    assert torch.equal(half.cpu(), torch.from_numpy(values).to(torch.bfloat16))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("columns", [96, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_products_of_many_experts_are_within_the_rounding_of_float32(
    name: str, layout: str, aligned: bool, columns: int, place: str
) -> None:
    """Against float64: the error of a sum of n float32 products is below n eps times the sum of magnitudes."""
    shape = (32, columns)
    gap = (
        16 if aligned else 2 if name == "BF16" else 7
    )  # bytes between matrices: they may begin nearly anywhere
    matrices = [stored(name, layout, shape, seed) for seed in range(4)]
    pieces, offsets = [], []
    for raw, _ in matrices:
        offsets.append(sum(map(len, pieces)) + gap)
        pieces += [np.full(gap, 0xFF, np.uint8), raw, np.full(-len(raw) % 16, 0xFF, np.uint8)]
        if not aligned:
            pieces.pop()
    memory = torch.from_numpy(np.concatenate(pieces)).to(place)
    inputs = torch.randn((4, columns), generator=torch.Generator().manual_seed(1))
    # Experts have two matrices each, one behind the other.
    chosen = [(0, 3), (0, 1), (2, 1), (1, 0), (2, 2)]
    weights = np.linspace(-1, 1, len(chosen), dtype=np.float32)
    pairs = torch.tensor(
        [
            [row for _, row in chosen],
            [2, 0, 1, 6, 4],
            weights.view(np.int32).tolist(),
            [offsets[expert] for expert, _ in chosen],
            [offsets[expert + 1] for expert, _ in chosen],
        ],
        device=place,
    )

    def product(pairs: torch.Tensor, first: int, *more: object) -> torch.Tensor:
        found = triton_kernels.few_rows(
            name, layout, shape, memory, pairs, first, inputs.to(place), *more, aligned=aligned
        )
        assert isinstance(found, torch.Tensor)
        return found

    found = product(pairs, 3, 2).cpu()
    for got, (expert, row) in zip(found.double(), chosen, strict=True):
        for half, matrix in zip(got.view(2, -1), (expert, expert + 1), strict=True):
            exact, x = torch.from_numpy(matrices[matrix][1]).double(), inputs[row].double()
            bound = columns * 2**-23 * (exact.abs() @ x.abs())
            assert ((half - exact @ x).abs() <= bound).all()
    single = product(pairs[:, 2:3].contiguous(), 3, 2)
    assert torch.equal(single[0].cpu(), found[2]), "a pair does not depend on its company"
    # The second matrix alone; what a pair gives goes to its row, weighted, and other rows stay as they are.
    by_pair = inputs[[row for _, row in chosen]].to(place)
    rows = torch.full((7, shape[0]), 7.0, device=place)
    triton_kernels.few_rows(name, layout, shape, memory, pairs, 4, by_pair, 1, rows, aligned)
    expected = torch.full((7, shape[0]), 7.0)
    expected[[2, 0, 1, 6, 4]] = found[:, shape[0] :] * torch.from_numpy(weights)[:, None]
    assert torch.equal(rows.cpu(), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_summed_in_their_order(dtype: torch.dtype, place: str) -> None:
    rows = torch.randn((3 * 5, 300), generator=torch.Generator().manual_seed(2)) * 10
    rows[0, 0] = torch.nan
    found = triton_kernels.sum_rows(rows.to(place), 5, torch.empty((3, 300), dtype=dtype, device=place))
    expected = rows.view(3, 5, 300)[:, 0].clone()
    for column in range(1, 5):
        expected += rows.view(3, 5, 300)[:, column]
    assert torch.equal(found.cpu().nan_to_num(9), expected.to(dtype).nan_to_num(9))


def test_kernels_compile_for_gpus_that_are_not_here() -> None:
    """To machine code, in a process of its own: here they are interpreted."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moei_core.quant import triton_kernels as kernels
def build(capability, kernel, types, constants):
    kinds = [*types.split(), *("constexpr" for _ in constants)]
    signature = dict(zip(kernel.arg_names, kinds, strict=True))
    source = ASTSource(kernel, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
first = dict(FIRST=3, INTO=False, IS_ALIGNED=True, WIDTH=256)
second = dict(FIRST=5, INTO=True, IS_ALIGNED=False, WIDTH=64)
for capability in (80, 90):
    for form in kernels.FORMATS.values():
        for layout in (0, 1):
            for kernel, types, more in (
                (kernels._few_rows, "*u8 *i64 *fp32 *fp32 i32 i32", first),
                (kernels._few_rows, "*u8 *i64 *fp32 *fp32 i32 i32", second),
                (kernels._decode, "*u8 *bf16 i32", {}),
                (kernels._decode, "*u8 *fp32 i32", {}),
            ):
                build(capability, kernel, types, {"FORMAT": form, "LAYOUT": layout, **more})
    for kind in ("bf16", "fp32", "fp16"):
        build(capability, kernels._sum_rows, f"*fp32 *{kind} i32", {"COUNT": 6, "STEP": 256})
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_what_it_does_not_take() -> None:
    assert triton_kernels.takes("Q8_0", (64, 64)) and triton_kernels.takes("BF16", (64, 64))
    for name, shape in (("Q4_K", (64, 256)), ("Q8_0", (40, 64)), ("BF16", (64, 40)), ("BF16", (64,))):
        assert not triton_kernels.takes(name, shape)
