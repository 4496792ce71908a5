"""A decoder layer of one token as one native call: what its modules compute one after the other.

Each step rounds as the module's own native call does, so that both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moei_core.quant import native
from moei_core.quant.native_latent import LatentAttention

if native.available():
    from moei_core.quant import _native


@dataclass(frozen=True, slots=True)
class RouterKind:
    """What routers differ in.

    normed: the chosen weights are divided by their sum. scale: what they are multiplied with then. rounded: they end in
    the type of the activations. wide: logits stay float32. sorted: most weight first, otherwise as torch.topk leaves
    them when it need not sort. late: the largest logits are chosen first, and the softmax is over these alone.
    """

    normed: bool
    rounded: bool
    wide: bool = False
    sorted: bool = True
    scale: float = 1.0
    late: bool = False


class Router:
    """Softmax over all experts, the largest few of them, as torch computes it in float32 from the logits."""

    def __init__(self, weight: native.Linear, top_k: int, kind: RouterKind) -> None:
        """ValueError unless 0 < top_k <= experts."""
        self._weight = weight
        self.native = _native.Router(
            weight.native, top_k, kind.scale, kind.normed, kind.rounded, kind.wide, kind.sorted, kind.late
        )

    def __call__(self, type: str, x: int, rows: int, logits: int, experts: int, weights: int) -> None:
        """type: the float format of x and logits. The others are addresses of contiguous rows.

        x: [rows, hidden]. logits: [rows, experts], float32 if they stay so. experts: int64 [rows, top_k], of equal ones
        those that torch.topk chooses. weights: float32 [rows, top_k].
        """
        self.native(type, x, rows, logits, experts, weights)

    def early(self, norm: native.RmsNorm | None, type: str, x: int) -> list[int]:
        """The experts that it chooses for one row, [hidden] at the address, through ``norm`` if there is one."""
        return self.native.early(None if norm is None else norm.native, type, x)


class ExpertTable:
    """All experts of a layer, by number; their memory must stay as long as this is used."""

    def __init__(self, ffn: native.ExpertFfn, experts: Sequence[native.ExpertParts]) -> None:
        self.native = _native.ExpertTable(ffn.native, list(experts))


class Layer:
    """sum = x + attention(norm(x)), then sum + (experts(norm(sum)) + shared(norm(sum))), for one token."""

    def __init__(
        self,
        attention: native.Attention | LatentAttention,
        input_norm: native.RmsNorm,
        behind_norm: native.RmsNorm,
        router: Router,
        shared: tuple[native.ExpertFfn, native.ExpertParts] | None = None,
    ) -> None:
        """behind_norm: the one behind the attention. shared: an expert that serves every token.

        ValueError if the parts do not fit together.
        """
        self._parts = attention, input_norm, behind_norm, router, shared
        ffn, parts = shared or (None, None)
        self._native = _native.Layer(
            attention.native,
            input_norm.native,
            behind_norm.native,
            router.native,
            None if ffn is None else ffn.native,
            parts,
        )

    def route(
        self,
        type: str,
        x: int,
        turn: tuple[int, int],
        cache: tuple[int, int, int, int],
        mask: int,
        out: int,
        chosen: tuple[int, int],
        normed: int,
    ) -> None:
        """The layer up to its router. type, x, turn, cache, mask: see ``native.Attention``.

        out, normed: where ``sum`` and its norm go, [hidden]. chosen: addresses of experts, int64 [top_k], and of their
        weights, float32 [top_k]. ValueError if there is no room in the cache.
        """
        self._native(type, x, *turn, *cache, mask, out, *chosen, normed, None)

    def run(
        self,
        type: str,
        x: int,
        turn: tuple[int, int],
        cache: tuple[int, int, int, int],
        mask: int,
        out: int,
        chosen: tuple[int, int],
        table: ExpertTable,
    ) -> int:
        """The whole layer; ``out`` is its result. Returns the nanoseconds that the experts took.

        The experts' outputs are summed in ascending order of experts. ValueError also if ``table`` does not fit.
        """
        return self._native(type, x, *turn, *cache, mask, out, *chosen, 0, table.native)


def expert_rows(
    ffn: native.ExpertFfn,
    experts: list[native.ExpertParts],
    rows: list[int],
    type: str,
    x: int,
    outputs: int,
) -> None:
    """What some of a token's experts make of it, each in its row: with ``weigh_rows`` the bits of ``ExpertFfn.token``.

    type: the float format of x, the address of [hidden_size]. outputs: the address of float32 [.., hidden_size].
    ValueError without experts, or if rows or addresses are missing.
    """
    _native.expert_rows(ffn.native, experts, rows, type, x, outputs)


def weigh_rows(hidden_size: int, weights: list[float], type: str, outputs: int, out: int) -> None:
    """The rows of ``outputs``, float32 [len(weights), hidden_size], times their weights, summed in order.

    out: the address of [hidden_size] of the float format ``type``, rounded once. ValueError if an address is missing.
    """
    _native.weigh_rows(hidden_size, weights, type, outputs, out)
