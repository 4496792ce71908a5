"""The fused expert call against the memory's speed: a table, and one line of JSON.

    python benchmarks/kernels.py [--formats Q8_0,Q4_0] [--tokens 1,4,64,512] [--order rows16] [--threads 2]

For each format and model shape, experts with random weights fill ``--memory`` and every call takes other ones, so that
nothing is found in a cache. Ceiling: the longer of the time to read the chosen experts at the read bandwidth measured
beside each round over the same memory, and the time of the multiplications at the rate of the same kernel on a
matrix that stays in the first-level caches. Ratio: ceiling's time / time taken, the median over rounds that alternate
between both, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moei_core.quant import native

SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
}
"""Hidden size, intermediate size, experts, experts of a token."""


@dataclass
class Result:
    """One row of the table: medians over the rounds."""

    shape: str
    format: str
    order: str
    tokens: int
    milliseconds: float
    gigabytes: float
    read_gb_s: float
    gigabytes_s: float
    gmac_s: float
    ceiling_ms: float
    bound: str
    ratio: float
    ratio_min: float
    ratio_max: float


class Experts:
    """Experts of one shape side by side in memory, as many layers as fit."""

    def __init__(self, memory: NDArray[np.uint8], layout: native.FfnLayout, num_experts: int) -> None:
        self.layout, self.num_experts = layout, num_experts
        sizes = [layout.gate_up.nbytes, layout.gate_up.nbytes, layout.down.nbytes]
        self.nbytes = sum(sizes)
        stride = -(-self.nbytes // 4096) * 4096
        count = len(memory) // stride // num_experts * num_experts
        assert count, "the memory does not hold one layer"
        one = np.concatenate([random_weights(layout.gate_up)] * 2 + [random_weights(layout.down)])
        for i in range(count):
            memory[i * stride : i * stride + self.nbytes] = one
        starts = memory.ctypes.data + stride * np.arange(count, dtype=np.int64)
        offsets = np.cumsum([0, *sizes[:2]])
        self.parts = np.concatenate(
            [starts[:, None] + offsets, np.zeros((count, 3), np.int64)], axis=1
        ).reshape(-1, num_experts, 6)


def random_weights(matrix: native.Matrix) -> NDArray[np.uint8]:
    """Random quants (any byte is one) with scales of about 1 / cols, in the matrix's order of storage."""
    rng = np.random.default_rng(0)
    out = rng.integers(0, 256, matrix.nbytes, np.uint8)
    group = 16 if matrix.order == "rows16" else 1
    blocks = out.reshape(-1, native.Matrix(matrix.format, group, 32).nbytes)
    if matrix.format == "MXFP4":
        blocks[:, :group] = 127 - int(np.log2(matrix.cols))
        return out
    scales = rng.uniform(0.5, 1.5, (len(blocks), group)) / matrix.cols
    blocks[:, : 2 * group] = scales.astype(np.float16).view(np.uint8)
    return out


def chosen_calls(
    experts: Experts, tokens: int, top_k: int, rng: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Arguments of calls that together touch every expert about once before one returns."""
    calls = []
    per_layer = max(1, experts.num_experts // (top_k * tokens))
    for layer in experts.parts:
        order = rng.permutation(experts.num_experts)
        for i in range(per_layer):
            if tokens * top_k <= experts.num_experts:
                own = order[i * tokens * top_k : (i + 1) * tokens * top_k].reshape(tokens, top_k)
            else:
                own = np.argsort(rng.random((tokens, experts.num_experts)), axis=1)[:, :top_k]
            used, counts = np.unique(own, return_counts=True)
            rows = np.concatenate([np.flatnonzero((own == expert).any(axis=1)) for expert in used])
            calls.append((np.ascontiguousarray(layer[used]), np.cumsum([0, *counts]), rows))
    return calls


def peak_gmac_s(matrix_format: str, order: str, tokens: int) -> float:
    """10^9 multiplications a second on a matrix that all threads keep in their own caches."""
    matrix = native.Matrix(matrix_format, 16 * 32 * native.num_threads(), 1024, order)
    weights, x = random_weights(matrix), np.ones((tokens, 1024), np.float32)
    out = np.empty((tokens, matrix.rows), np.float32)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        native.linear(matrix, weights.ctypes.data, x, out)
        best = min(best, time.perf_counter() - start)
    return matrix.rows * matrix.cols * tokens / best / 1e9


def measure(
    shape: str, fmt: str, order: str, tokens: int, memory: NDArray[np.uint8], rounds: int, seconds: float
) -> Result:
    """One row of the table."""
    hidden, intermediate, num_experts, top_k = SHAPES[shape]
    layout = native.FfnLayout(hidden, intermediate, fmt, fmt, gate_up_order=order, down_order=order)
    experts, ffn = Experts(memory, layout, num_experts), native.ExpertFfn(layout)
    rng = np.random.default_rng(1)
    calls = chosen_calls(experts, tokens, top_k, rng)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    out = np.empty((tokens * top_k, hidden), np.float32)
    peak = peak_gmac_s(fmt, order, max(tokens, 64))
    macs = 3 * hidden * intermediate * tokens * top_k
    rows = []
    at = 0
    for done in range(rounds + 1):
        read = native.read_bandwidth(memory)
        taken, nbytes, count = 0.0, 0, 0
        while taken < seconds or count == 0:
            arguments = calls[at % len(calls)]
            at += 1
            start = time.perf_counter()
            ffn(*arguments, x, out)
            taken += time.perf_counter() - start
            nbytes += len(arguments[0]) * experts.nbytes
            count += 1
        if done:  # the first round warms up
            rows.append((taken / count, nbytes / count, read))
    ceilings = [max(nbytes / read, macs / peak / 1e9) for _, nbytes, read in rows]
    ratios = [ceiling / row[0] for ceiling, row in zip(ceilings, rows, strict=True)]
    took, nbytes, read = (statistics.median(column) for column in zip(*rows, strict=True))
    ceiling = statistics.median(ceilings)
    return Result(
        shape, fmt, order, tokens, took * 1e3, nbytes / 1e9, read / 1e9, nbytes / took / 1e9, macs / took / 1e9,
        ceiling * 1e3, "memory" if nbytes / read >= macs / peak / 1e9 else "compute",
        statistics.median(ratios), min(ratios), max(ratios),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default="Q8_0,Q4_0")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,4,64,512")
    parser.add_argument("--order", default="rows16", choices=("plain", "rows16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=3.0, help="GiB of weights (default 3)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.4, help="of calls in a round")
    options = parser.parse_args()
    native.set_num_threads(options.threads)
    memory = np.ones(int(options.memory * 2**30), np.uint8)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    print(
        f"{platform.processor() or platform.machine()}, {native.isa()}, {options.threads} threads, commit {commit}"
    )
    print(
        f"{'shape':17}{'format':>7}{'order':>8}{'tokens':>7}{'ms':>9}{'GB/s':>7}{'read':>7}{'GMAC/s':>8}"
        f"{'ceiling ms':>11}{'bound':>8}{'ratio':>7}  (least, most)"
    )
    results = []
    for shape in options.shapes.split(","):
        for fmt in options.formats.split(","):
            for tokens in map(int, options.tokens.split(",")):
                r = measure(shape, fmt, options.order, tokens, memory, options.rounds, options.seconds)
                print(
                    f"{r.shape:17}{r.format:>7}{r.order:>8}{r.tokens:7}{r.milliseconds:9.2f}{r.gigabytes_s:7.1f}"
                    f"{r.read_gb_s:7.1f}{r.gmac_s:8.0f}{r.ceiling_ms:11.2f}{r.bound:>8}{r.ratio:7.2f}"
                    f"  ({r.ratio_min:.2f}, {r.ratio_max:.2f})",
                    flush=True,
                )
                results.append(asdict(r))
    print(json.dumps({"commit": commit, "isa": native.isa(), "threads": options.threads, "results": results}))


if __name__ == "__main__":
    main()
