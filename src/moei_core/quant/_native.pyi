from collections.abc import Container, Sequence
from typing import Any

from numpy import float32, int64, uint8
from numpy.typing import NDArray

from moei_core.types import ExpertKey

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
    places: NDArray[int64] | None,
    weights: NDArray[float32] | None,
) -> None: ...

class ExpertParts:
    def __init__(
        self, gate: int, up: int, down: int, gate_bias: int, up_bias: int, down_bias: int
    ) -> None: ...

def moe_token(
    layout: FfnLayout, experts: list[ExpertParts], weights: list[float], type: str, x: int, out: int
) -> None: ...
def expert_rows(
    layout: FfnLayout, experts: list[ExpertParts], rows: list[int], type: str, x: int, outputs: int
) -> None: ...
def weigh_rows(hidden: int, weights: list[float], type: str, outputs: int, out: int) -> None: ...

class Weights:
    def __init__(
        self, format: str, order: str, address: int, rows: int, cols: int, bias_format: str, bias: int
    ) -> None: ...

def linear(weights: Weights, type: str, x: int, tokens: int, out: int) -> None: ...

class Attention:
    def __init__(
        self,
        q: Weights,
        k: Weights,
        v: Weights,
        o: Weights,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary: int,
        scale: float,
        eps: float,
        q_norm: list[float],
        k_norm: list[float],
        sinks: list[float],
        clip: float,
        rotation: str,
        turn_type: str,
        /,
    ) -> None: ...
    def __call__(
        self,
        type: str,
        x: int,
        cosine: int,
        sine: int,
        keys: int,
        values: int,
        capacity: int,
        position: int,
        mask: int,
        out: int,
        /,
    ) -> None: ...

class RmsNorm:
    def __init__(self, weight: list[float], eps: float, /) -> None: ...
    def __call__(self, type: str, x: int, rows: int, out: int, /) -> None: ...

class Router:
    def __init__(
        self,
        weights: Weights,
        top_k: int,
        scale: float,
        normed: bool,
        rounded: bool,
        wide: bool,
        sorted: bool,
        late: bool,
        /,
    ) -> None: ...
    def __call__(self, type: str, x: int, rows: int, logits: int, experts: int, weights: int, /) -> None: ...
    def early(self, norm: RmsNorm | None, type: str, x: int, /) -> list[int]: ...

class ExpertTable:
    def __init__(self, layout: FfnLayout, experts: list[ExpertParts], /) -> None: ...

class LatentAttention:
    def __init__(
        self,
        q_a: Weights | None,
        q: Weights,
        kv_a: Weights,
        kv_b: Weights,
        o: Weights,
        heads: int,
        nope: int,
        rotary: int,
        value: int,
        scale: float,
        turn: str,
        q_norm: list[float],
        q_eps: float,
        kv_norm: list[float],
        kv_eps: float,
        /,
    ) -> None: ...
    def __call__(
        self,
        type: str,
        x: int,
        cosine: int,
        sine: int,
        latents: int,
        turned: int,
        capacity: int,
        position: int,
        mask: int,
        out: int,
        /,
    ) -> None: ...

class Layer:
    def __init__(
        self,
        attention: Attention | LatentAttention,
        input_norm: RmsNorm,
        behind_norm: RmsNorm,
        router: Router,
        shared: FfnLayout | None,
        parts: ExpertParts | None,
        /,
    ) -> None: ...
    def __call__(
        self,
        type: str,
        x: int,
        cosine: int,
        sine: int,
        keys: int,
        values: int,
        capacity: int,
        position: int,
        mask: int,
        out: int,
        experts: int,
        weights: int,
        normed: int,
        table: ExpertTable | None,
        /,
    ) -> int: ...

def to_rows16(
    format: str, rows: int, cols: int, source: NDArray[Any], destination: NDArray[uint8]
) -> None: ...
def from_rows16(
    format: str, rows: int, cols: int, source: NDArray[Any], destination: NDArray[uint8]
) -> None: ...
def join_mxfp4(
    order: str,
    rows: int,
    cols: int,
    memory: NDArray[uint8],
    scales_at: int,
    blocks_at: int,
    destination: int,
) -> None: ...
def decode(format: str, source: NDArray[uint8], out: NDArray[float32]) -> None: ...
def all_finite(format: str, order: str, rows: int, cols: int, source: NDArray[uint8]) -> bool: ...
def workspace_nbytes(layout: FfnLayout, tokens: int, pairs: int, threads: int) -> int: ...
def release_workspace() -> None: ...
def read_bandwidth(buffer: NDArray[uint8], repeats: int) -> float: ...

class LearnedMixture:
    def __init__(
        self,
        arrays: dict[str, NDArray[Any]],
        keys: list[tuple[ExpertKey, ...]],
        width: int,
        batch: int,
        step: int,
        slow: float,
        horizon_share: float,
        doubt: float,
        least_share: float,
        faded: float,
        nothing: float,
    ) -> None: ...
    def begin_pass(self, discount: float, full: int) -> None: ...
    def break_off(self) -> None: ...
    def account(self, i: int, experts: Sequence[int]) -> None: ...
    def learn(self, i: int) -> None: ...
    def insert(self, i: int, expert: int) -> None: ...
    def remove(self, i: int, expert: int) -> None: ...
    def changed(self, i: int) -> None: ...
    def victim(self, i: int, expert: int, excluded: Container[ExpertKey]) -> ExpertKey | None: ...
