from typing import Any

from numpy import float32, int64, uint8
from numpy.typing import NDArray

FORMATS: dict[str, tuple[int, int]]
"""Name to (weights, bytes) of a block."""

class FfnLayout:
    def __init__(
        self,
        hidden: int,
        intermediate: int,
        gate_up_format: str,
        gate_up_order: str,
        gating: str,
        down_format: str,
        down_order: str,
        activation: str,
        alpha: float,
        limit: float,
        bias_format: str,
    ) -> None: ...

def isa() -> str: ...
def set_num_threads(threads: int) -> None: ...
def num_threads() -> int: ...
def moe_ffn(
    layout: FfnLayout,
    parts: NDArray[int64],
    offsets: NDArray[int64],
    rows: NDArray[int64],
    x: NDArray[float32],
    out: NDArray[float32],
) -> None: ...
def linear(format: str, order: str, address: int, x: NDArray[float32], out: NDArray[float32]) -> None: ...
def to_rows16(
    format: str, rows: int, cols: int, source: NDArray[Any], destination: NDArray[uint8]
) -> None: ...
def from_rows16(
    format: str, rows: int, cols: int, source: NDArray[Any], destination: NDArray[uint8]
) -> None: ...
def decode(format: str, source: NDArray[uint8], out: NDArray[float32]) -> None: ...
def all_finite(format: str, order: str, rows: int, cols: int, source: NDArray[uint8]) -> bool: ...
def workspace_nbytes(layout: FfnLayout, tokens: int, pairs: int, threads: int) -> int: ...
def release_workspace() -> None: ...
def read_bandwidth(buffer: NDArray[uint8], repeats: int) -> float: ...
