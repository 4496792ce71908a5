"""Attention of one token over latents as one native call."""

from __future__ import annotations

from dataclasses import dataclass

from moei_core.quant import native

if native.available():
    from moei_core.quant import _native

TURNS = ("halves", "neighbors_to_halves", "neighbors")
"""How the values that turn with the position are paired: the first half with the second; 2 i with 2 i + 1, which
become i and rotary / 2 + i, of cosines and sines the first half counting; the same in their places."""


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Weights and eps of an RMS norm."""

    weight: list[float]
    eps: float


@dataclass(frozen=True, slots=True)
class LatentProjections:
    """The matrices of such an attention. q_a and q_norm: None where ``q`` reads the hidden state.

    q_a: [low, hidden]. q_norm: [low]. q: [heads * (nope + rotary), low or hidden]. kv_a: [rank + rotary, hidden], in
    the same format as what reads the hidden state for q. kv_norm: [rank]. kv_b: for each head nope rows of its key,
    then value rows of its value, [.., rank]; floats, or Q8_0 in ``rows16`` with nope and value multiples of 16.
    o: [hidden, heads * value].
    """

    q_a: native.Linear | None
    q_norm: NormWeights | None
    q: native.Linear
    kv_a: native.Linear
    kv_norm: NormWeights
    kv_b: native.Linear
    o: native.Linear


class LatentAttention:
    """One token's attention, from the normed hidden state to the output projection, over a cache of latents.

    In float32 throughout: the query's and the latent's projections, normed; the last ``rotary`` values of each head of
    the query, and those beside the latent, turned; both join the cache, rounded to its type; softmax(scale q k) v with
    k and v as kv_b expands them, without expanding them: each query goes through its head's key rows backwards, and
    what it mixes of the latents through the value rows; output projection.
    """

    def __init__(
        self, projections: LatentProjections, heads: tuple[int, int, int, int], scale: float, turn: str
    ) -> None:
        """heads: number, nope, rotary, value. turn: of ``TURNS``. ValueError if the parts contradict each other."""
        native.isa()
        self._projections = parts = projections
        q_a = None if parts.q_a is None else parts.q_a.native
        q_norm = parts.q_norm or NormWeights([], 0.0)
        self.native = _native.LatentAttention(
            q_a,
            parts.q.native,
            parts.kv_a.native,
            parts.kv_b.native,
            parts.o.native,
            *heads,
            scale,
            turn,
            q_norm.weight,
            q_norm.eps,
            parts.kv_norm.weight,
            parts.kv_norm.eps,
        )

    def __call__(
        self, type: str, x: int, turn: tuple[int, int], cache: tuple[int, int, int, int], mask: int, out: int
    ) -> None:
        """As ``native.Attention``, but for cache and turn.

        cache: addresses of latents [capacity, rank] and of turned values [capacity, rotary], capacity, and how many
        tokens they hold. turn: addresses of cosines and sines [rotary]; where neighbors stay in their places, both
        that of float32 [rotary / 2, 2], cosine and sine.
        """
        self.native(type, x, *turn, *cache, mask, out)
