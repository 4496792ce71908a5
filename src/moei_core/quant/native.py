"""The native CPU kernels: products of weights as they are stored, without decoding them to memory first.

Everything here works on raw addresses and numpy arrays, releases the interpreter's lock and uses one thread pool
of the process. The result for an expert and a token depends only on the expert's bytes and the token's row: not
on the other tokens and experts of the call, their order, or the number of threads. ``docs/kernels.md`` has the
layouts, the accumulation order and the error bounds.

Where the extension was not built (no compiler) or cannot be loaded, importing this module still works,
``available()`` is false, and the caller computes with torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moei_core.errors import MoeiError, UsageError

try:
    from moei_core.quant import _native
    from moei_core.quant._native import ExpertParts as ExpertParts
except ImportError as error:
    _reason = f"The native kernels cannot be loaded: {error}."
else:
    _reason = ""

FLOAT_FORMATS = ("F32", "F16", "BF16")
ROWS16_FORMATS = ("Q8_0", "Q4_0", "MXFP4")
ORDERS = ("plain", "transposed", "rows16")
GATINGS = ("none", "separate", "concatenated", "interleaved")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu")
CLAMP_ALPHA, CLAMP_LIMIT = 1.702, 7.0
"""gpt-oss's constants of ``clamped_swiglu``."""
ROTATIONS = ("halves", "short", "neighbors")
"""i turns with i + rotary / 2, by cosines [rotary] or [rotary / 2]; 2i with 2i + 1, by the first half of [rotary]."""
PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
"""The columns of an expert's addresses (``ExpertFfn``)."""
_TILE_ROWS = 16


class NativeUnavailableError(MoeiError):
    """The native kernels were asked for and are not there."""


def available() -> bool:
    """Whether the kernels are built and loaded."""
    return not _reason


def unavailable_reason() -> str:
    """Why ``available()`` is false, in one sentence; empty when it is true."""
    return _reason


def isa() -> str:
    """The instruction set in use: ``amx_int8``, ``avx512``, ``avx2``, ``neon-dotprod``, ``neon`` or ``portable``.

    The environment variable MOEI_NATIVE_ISA chooses one; it is read once. UsageError if it cannot run here.
    """
    _require_native()
    try:
        return _native.isa()
    except RuntimeError as error:
        raise UsageError(
            "The native kernels cannot start.", f"{error}.", "Unset MOEI_NATIVE_ISA to choose automatically."
        ) from error


def set_num_threads(threads: int) -> None:
    """Threads of all further calls, the calling one counted. Results do not depend on it."""
    isa()
    try:
        _native.set_num_threads(threads)
    except ValueError as error:
        raise UsageError(f"The native kernels cannot use {threads} threads.", f"{error}.") from error


def num_threads() -> int:
    """Threads that a call uses, the calling one counted; all allowed processors unless set."""
    isa()
    return _native.num_threads()


@dataclass(frozen=True, slots=True)
class Matrix:
    """How a weight matrix of ``rows`` outputs and ``cols`` inputs is stored.

    format: as in safetensors (F32, F16, BF16) or GGUF (Q8_0, Q4_0, Q4_K, Q5_K, Q6_K, MXFP4).
    order: ``plain`` ([rows, cols] as in safetensors and GGUF), ``transposed`` (floats only) or ``rows16`` (tiles of 16
    interleaved rows, ``ROWS16_FORMATS`` only). UsageError for what no kernel computes.
    """

    format: str
    rows: int
    cols: int
    order: str = "plain"

    def __post_init__(self) -> None:
        _require_native()
        what = f"No native kernel for a {self.rows}x{self.cols} matrix of {self.format}, {self.order}."
        if self.format not in _native.FORMATS:
            raise UsageError(what, hint=f"The formats are {', '.join(_native.FORMATS)}.")
        if self.order not in ORDERS:
            raise UsageError(what, hint=f"The orders are {', '.join(ORDERS)}.")
        if self.rows < 1 or self.cols < 1:
            raise UsageError(what, "Both sizes must be positive.")
        if self.order == "transposed" and self.format not in FLOAT_FORMATS:
            raise UsageError(what, f"Only {', '.join(FLOAT_FORMATS)} may be transposed.")
        if self.order == "rows16" and self.format not in ROWS16_FORMATS:
            raise UsageError(what, f"Only {', '.join(ROWS16_FORMATS)} are interleaved.")
        if self.cols % self._block[0]:
            raise UsageError(
                what, f"{self.format} needs a multiple of {self._block[0]} inputs, not {self.cols}."
            )

    @property
    def _block(self) -> tuple[int, int]:
        return _native.FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix; ``rows16`` is padded with zero rows to a multiple of 16."""
        weights, nbytes = self._block
        rows = -(-self.rows // _TILE_ROWS) * _TILE_ROWS if self.order == "rows16" else self.rows
        return rows * (self.cols // weights) * nbytes


@dataclass(frozen=True, slots=True)
class FfnLayout:
    """The experts of a layer: ``down(activation(gate(x)) * up(x))``, all of one shape and format.

    gating: ``separate`` matrices, ``concatenated`` (gate's rows, then up's), ``interleaved`` (gate and up rows
    alternate, as in gpt-oss) or ``none`` (``down(activation(up(x)))``).
    activation: ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``relu``, or gpt-oss's ``clamped_swiglu``:
    (up + 1) * gate * sigmoid(alpha * gate), gate at most ``limit`` and up within +-``limit``.
    bias_format: of all biases, which may be absent. UsageError for what no kernel computes.
    """

    hidden_size: int
    intermediate_size: int
    gate_up_format: str
    down_format: str
    gating: str = "separate"
    gate_up_order: str = "plain"
    down_order: str = "plain"
    activation: str = "silu"
    alpha: float = CLAMP_ALPHA
    limit: float = CLAMP_LIMIT
    bias_format: str = "F32"

    def __post_init__(self) -> None:
        what = "No native kernel for these experts."
        if self.gating not in GATINGS:
            raise UsageError(what, f"Unknown gating {self.gating}.", f"There are {', '.join(GATINGS)}.")
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                what, f"Unknown activation {self.activation}.", f"There are {', '.join(ACTIVATIONS)}."
            )
        if self.activation == "clamped_swiglu" and self.gating == "none":
            raise UsageError(what, "clamped_swiglu needs a gate.")
        if self.bias_format not in FLOAT_FORMATS:
            raise UsageError(
                what, f"Biases in {self.bias_format}.", f"They may be {', '.join(FLOAT_FORMATS)}."
            )
        if (
            self.gating == "concatenated"
            and self.gate_up_order == "rows16"
            and self.intermediate_size % _TILE_ROWS
        ):
            raise UsageError(
                what,
                f"Concatenated and interleaved by 16 needs a multiple of {_TILE_ROWS} rows in each half.",
            )
        self.gate_up, self.down  # noqa: B018 - a matrix checks itself when made

    @property
    def gate_up(self) -> Matrix:
        """The stored matrix at an expert's ``gate`` address."""
        halves = 2 if self.gating in ("concatenated", "interleaved") else 1
        rows = halves * self.intermediate_size
        return Matrix(self.gate_up_format, rows, self.hidden_size, self.gate_up_order)

    @property
    def down(self) -> Matrix:
        """The stored matrix at an expert's ``down`` address."""
        return Matrix(self.down_format, self.hidden_size, self.intermediate_size, self.down_order)


class ExpertFfn:
    """The fused call: all experts of a layer that a forward pass chose, each on its own tokens."""

    def __init__(self, layout: FfnLayout) -> None:
        isa()
        self.layout = layout
        self.native = _native.FfnLayout(
            layout.hidden_size,
            layout.intermediate_size,
            layout.gate_up_format,
            layout.gate_up_order,
            layout.gating,
            layout.down_format,
            layout.down_order,
            layout.activation,
            layout.alpha,
            layout.limit,
            layout.bias_format,
        )

    def __call__(
        self,
        parts: NDArray[np.int64],
        offsets: NDArray[np.int64],
        rows: NDArray[np.int64],
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        places: NDArray[np.int64] | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """Compute ``out``; a norm after the expert is the caller's. ValueError if the shapes contradict each other.

        parts: [experts, 6] addresses in the order of ``PARTS``, 0 where the layout has no such part; concatenated and
        interleaved weights (and biases) are at ``gate`` (``gate_bias``), ungated ones too. Any alignment.
        offsets: [experts + 1]; expert e serves the pairs offsets[e]..offsets[e + 1]. rows: [pairs], the row of ``x`` of
        each. x: [tokens, hidden_size]. out: [pairs, hidden_size], or [any, hidden_size], of which pair p writes row
        places[p], its output times weights[p]. The memory at the addresses must stay until the call returns.
        """
        _native.moe_ffn(self.native, parts, offsets, rows, x, out, places, weights)

    def token(self, experts: list[ExpertParts], weights: list[float], type: str, x: int, out: int) -> None:
        """One token: the experts' outputs times their weights, summed in the order given, rounded once to ``type``.

        The same bits as ``__call__`` and float32 sums of its rows. x, out: addresses of [hidden_size] of the float
        format ``type``. ValueError without experts, or if weights or addresses are missing.
        """
        _native.moe_token(self.native, experts, weights, type, x, out)

    def workspace_nbytes(self, tokens: int, pairs: int, threads: int | None = None) -> int:
        """Bytes that a call of this size works in. They are kept for the next call (``release_workspace``)."""
        threads = num_threads() if threads is None else threads
        return _native.workspace_nbytes(self.native, tokens, pairs, threads)


def release_workspace() -> None:
    """Give back the memory that calls keep between them."""
    _require_native()
    _native.release_workspace()


def linear(weight: Matrix, address: int, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """out[tokens, rows] = x[tokens, cols] times the transposed matrix at ``address``. ValueError for other shapes."""
    if x.shape != (len(x), weight.cols) or out.shape != (len(x), weight.rows):
        raise ValueError(f"{x.shape} to {out.shape} does not fit a {weight.rows}x{weight.cols} matrix")
    for array in (x, out):
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            raise TypeError("Activations must be float32 arrays without gaps.")
    Linear(weight, address)("F32", x.ctypes.data, len(x), out.ctypes.data)


class Linear:
    """A weight matrix in memory and its bias, ready to be multiplied with. The memory must stay as long as this."""

    def __init__(self, weight: Matrix, address: int, bias_format: str = "F32", bias: int = 0) -> None:
        """address, bias: of the first byte; a bias of 0 is none. ValueError if the weight's address is missing."""
        isa()
        self.native = _native.Weights(
            weight.format, weight.order, address, weight.rows, weight.cols, bias_format, bias
        )

    def __call__(self, type: str, x: int, tokens: int, out: int) -> None:
        """out[tokens, rows] = x[tokens, cols] times the transposed weight, plus the bias.

        type: the float format of both. x, out: addresses of contiguous rows. Sums are float32; rounded once.
        """
        _native.linear(self.native, type, x, tokens, out)


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 and rounded once."""

    def __init__(self, weight: list[float], eps: float) -> None:
        _require_native()
        self.native = _native.RmsNorm(weight, eps)

    def __call__(self, type: str, x: int, rows: int, out: int) -> None:
        """type: the float format of x and out, which are addresses of contiguous [rows, len(weight)]."""
        self.native(type, x, rows, out)


class Attention:
    """Grouped-query attention of one token, from the normed hidden state to the output projection.

    In float32 throughout: q, k, v = projections of x; q and k normed (if there are norms), each head or all together;
    q, k, v kept within +-clip; the first ``rotary`` values of q's and k's heads turned (``ROTATIONS``); k and v join
    the cache, rounded to its type; softmax(scale q k) v, a sink being one more score, of no value; output projection.
    """

    def __init__(
        self,
        projections: tuple[Linear, Linear, Linear, Linear],
        heads: tuple[int, int, int, int],
        scale: float,
        norms: tuple[list[float], list[float]] | None = None,
        eps: float = 0.0,
        sinks: Sequence[float] = (),
        clip: float = math.inf,
        rotation: str = "halves",
        turn_type: str = "F32",
    ) -> None:
        """projections: q, k, v (of one format) and output. heads: number for q, number for k and v, head_dim, rotary.

        norms: weights of q's and k's norm, both [head_dim] or as wide as all heads. sinks: none, or one for each head.
        turn_type: the float format of cosines and sines. ValueError if the shapes contradict each other.
        """
        isa()
        q, k, v, o = (one.native for one in projections)
        q_norm, k_norm = norms or ([], [])
        self._projections = projections
        rest = list(sinks), clip, rotation, turn_type
        self.native = _native.Attention(q, k, v, o, *heads, scale, eps, q_norm, k_norm, *rest)

    def __call__(
        self, type: str, x: int, turn: tuple[int, int], cache: tuple[int, int, int, int], mask: int, out: int
    ) -> None:
        """type: the float format of everything but the mask. x, out: addresses of [hidden].

        turn: addresses of cosines and sines. cache: addresses of keys and values [kv_heads, capacity, head_dim],
        capacity, and how many tokens they hold; this one becomes the next. mask: address of a byte for each token,
        this one included, that is 0 where it is not seen; 0: all are seen. ValueError if there is no room in the cache.
        """
        self.native(type, x, *turn, *cache, mask, out)


def to_rows16(
    format: str, rows: int, cols: int, source: NDArray[np.uint8], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The bytes of a ``rows`` matrix in ``rows16`` order; lossless. UsageError if not of ``ROWS16_FORMATS``.

    source, out: bytes, one dimension, not overlapping; out is allocated if not given (``Matrix.nbytes``).
    """
    return _convert(True, Matrix(format, rows, cols), Matrix(format, rows, cols, "rows16"), source, out)


def from_rows16(
    format: str, rows: int, cols: int, source: NDArray[np.uint8], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The inverse of ``to_rows16``."""
    return _convert(False, Matrix(format, rows, cols, "rows16"), Matrix(format, rows, cols), source, out)


def _convert(
    packing: bool, before: Matrix, after: Matrix, source: NDArray[np.uint8], out: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    _require_native()
    result = np.empty(after.nbytes, np.uint8) if out is None else out
    convert = _native.to_rows16 if packing else _native.from_rows16
    convert(before.format, before.rows, before.cols, source, result)
    return result


def join_mxfp4(
    weight: Matrix, slot: NDArray[np.uint8], scales_at: int, blocks_at: int, destination: int
) -> None:
    """What ``moei_core.quant.mxfp4.join`` does, in C++. ValueError if the places do not suit each other."""
    _require_native()
    _native.join_mxfp4(weight.order, weight.rows, weight.cols, slot, scales_at, blocks_at, destination)


def decode(format: str, source: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
    """The first ``count`` weights (whole blocks) that ``source`` holds in row order, as float32."""
    _require_native()
    out = np.empty(count, np.float32)
    _native.decode(format, source, out)
    return out


def all_finite(weight: Matrix, source: NDArray[np.uint8]) -> bool:
    """False if any weight or scale is a NaN or an infinity: such weights must be refused, not computed with."""
    _require_native()
    return _native.all_finite(weight.format, weight.order, weight.rows, weight.cols, source)


def read_bandwidth(buffer: NDArray[np.uint8], repeats: int = 1) -> float:
    """Bytes per second at which ``num_threads()`` threads read ``buffer``, the best of several vector loops.

    buffer: bytes that were written once, a mebibyte or more; to measure memory, twice the last-level cache or more."""
    isa()
    return _native.read_bandwidth(buffer, repeats)


def _require_native() -> None:
    if _reason:
        raise NativeUnavailableError(
            "The native kernels are not there.",
            _reason,
            "Install a C++20 compiler and then moei again to build them.",
        )
