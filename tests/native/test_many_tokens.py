"""Every instruction set against the portable kernels, bit for bit, where tokens are many; odd shapes too."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from moei_core.quant import native
from tests.native.test_runtime import ISAS
from tests.native.weights import INTEGER_FORMATS, Bytes, in_order, orders, run_linear, stored_weights

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())

CASES = 40
PROGRAM = "from tests.native.test_many_tokens import report; report()"
LARGEST_EXPONENT = 0xFE


def extreme_weights(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> Bytes:
    """Any quants, the smallest of each format often; some blocks' scales are zero, tiny or huge."""
    stored = stored_weights(rng, fmt, rows, cols)
    scale = 1 if fmt == "MXFP4" else 2
    blocks = stored.reshape(-1, native.Matrix(fmt, 1, 32).nbytes)
    blocks[:, scale:] = rng.integers(0, 256, blocks[:, scale:].shape, np.uint8)
    blocks[rng.random(len(blocks)) < 0.1, scale:] = 0x80 if fmt == "Q8_0" else 0
    chosen = rng.random(len(blocks)) < 0.2
    if fmt == "MXFP4":
        blocks[chosen, 0] = rng.choice([0, 1, 2, 90, LARGEST_EXPONENT], chosen.sum())
    else:
        scales = rng.choice([0.0, -0.0, 6e-8, -6e-5, 65504.0, -65504.0], chosen.sum()).astype(np.float16)
        blocks[chosen, :2] = scales.view(np.uint8).reshape(-1, 2)
    return stored


def activations(rng: np.random.Generator, tokens: int, cols: int) -> NDArray[np.float32]:
    """Rows of very different sizes; some blocks are zero, some hold only their extremes, and one value is no number."""
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    x *= rng.choice(np.float32([1, 1, 1, 1e-20, 1e-36, 1e-39, 1e15]), (tokens, 1))
    blocks = x.reshape(tokens, -1, 32)
    blocks[rng.random(blocks.shape[:2]) < 0.1] = 0
    ends = rng.random(blocks.shape[:2]) < 0.1
    blocks[ends] = np.where(rng.random(blocks[ends].shape) < 0.5, np.float32(-3), np.float32(3))
    if tokens > 1 and rng.random() < 0.3:
        x[rng.integers(tokens), rng.integers(cols)] = rng.choice(np.float32([np.nan, np.inf]))
    return x


def _digest(values: NDArray[np.float32]) -> str:
    # Which of its bits a NaN has is nobody's business.
    return hashlib.sha256(np.where(np.isnan(values), np.float32(np.nan), values).tobytes()).hexdigest()


def _product(rng: np.random.Generator, fmt: str) -> str:
    rows, cols = int(rng.integers(1, 200)), 32 * int(rng.integers(1, 80))
    tokens = int(rng.choice([rng.integers(1, 20), rng.integers(20, 150), 8, 16, 64, 72]))
    stored, x = extreme_weights(rng, fmt, rows, cols), activations(rng, tokens, cols)
    found = {_digest(run_linear(fmt, stored, rows, x, order)) for order in orders(fmt)}
    return f"{fmt} {rows}x{cols}, {tokens} tokens: {' '.join(sorted(found))}"


def _experts(rng: np.random.Generator, fmt: str) -> str:
    gating = str(rng.choice(["none", "separate", "concatenated", "interleaved"]))
    hidden, middle = 32 * int(rng.integers(1, 40)), 32 * int(rng.integers(1, 12))
    order = str(rng.choice(["plain", "rows16"]))
    layout = native.FfnLayout(hidden, middle, fmt, fmt, gating, order, order, "relu")
    kept, parts = [], []
    for _ in range(3):
        stored = [
            stored_weights(rng, fmt, m.rows, m.cols) for m in (layout.gate_up, layout.gate_up, layout.down)
        ]
        kept += [
            in_order(fmt, data, m.rows, m.cols, order)
            for data, m in zip(stored, (layout.gate_up, layout.gate_up, layout.down), strict=True)
        ]
        gate, up, down = (one.ctypes.data for one in kept[-3:])
        parts.append([gate, up if gating == "separate" else 0, down, 0, 0, 0])
    counts = [int(rng.integers(0, 100)), int(rng.integers(5, 20)), int(rng.integers(0, 3))]
    x = rng.standard_normal((30, hidden)).astype(np.float32)
    rows = rng.integers(0, 30, sum(counts))
    out = np.full((sum(counts), hidden), np.nan, np.float32)
    native.ExpertFfn(layout)(np.array(parts), np.cumsum([0, *counts]), rows, x, out)
    return f"{fmt} {hidden}x{middle}, {gating}, {order}, {counts} tokens: {_digest(out)}"


def report() -> None:
    """One line a case, the same cases whatever computes them; run in a process that has chosen its instruction set."""
    print(native.isa())
    rng = np.random.default_rng(7)
    native.set_num_threads(2)
    for _ in range(CASES):
        for fmt in INTEGER_FORMATS:
            print(_product(rng, fmt))
    for _ in range(CASES // 4):
        for fmt in INTEGER_FORMATS:
            print(_experts(rng, fmt))


@cache
def lines(isa: str) -> list[str]:
    """What ``report`` says with this instruction set; skips the test where it cannot run."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "MOEI_NATIVE_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "cannot run here" in done.stderr:
        pytest.skip(f"this processor, its kernel or this build has no {isa}")
    assert done.returncode == 0, done.stderr
    name, *rest = done.stdout.splitlines()
    assert name == isa
    return rest


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "portable"])
def test_many_tokens_have_the_bits_of_the_portable_kernels(isa: str) -> None:
    expected, found = lines("portable"), lines(isa)
    assert len(found) == len(expected) > 3 * CASES
    assert [(one, other) for one, other in zip(expected, found, strict=True) if one != other] == []


def test_what_is_not_granted_is_not_used() -> None:
    """Where the kernel refuses the tiles' registers (a thread's stack for signals is too small), AVX-512 computes."""
    if native.isa() != "amx_int8" and "MOEI_NATIVE_ISA" not in os.environ:
        pytest.skip("no amx_int8 here")
    program = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("nbytes", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
small = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(small), None) == 0
from moei_core.quant import native
print(native.isa())
"""
    env = {name: value for name, value in os.environ.items() if name != "MOEI_NATIVE_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60
    )
    if "AssertionError" in done.stderr:
        pytest.skip("the kernel takes no stack so small")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "avx512"
