"""The words that every part of moei shares.

Naming follows transformers: ``num_experts``, ``num_experts_per_tok``, ``top_k_index``. ``layer`` is always
the decoder layer's index in the model (dense layers leave gaps), and an expert is always
``ExpertKey(layer, expert)`` in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert of the model: decoder layer index, then expert index within the layer."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


@cache
def layer_keys(layer: int, num_experts: int) -> tuple[ExpertKey, ...]:
    """All keys of a layer, by expert index. Interned: building keys anew costs more than deciding."""
    return tuple(ExpertKey(layer, expert) for expert in range(num_experts))


class Phase(IntEnum):
    """What a forward pass is for. The values are those of the trace format's ``phase`` tensor."""

    PREFILL = 0
    DECODE = 1


class ScoredExpert(NamedTuple):
    """A hint: ``key`` is expected with weight ``score`` (non-negative, comparable within a layer)."""

    key: ExpertKey
    score: float


class LayerAccess(NamedTuple):
    """One MoE layer of one forward pass, as one atomic event.

    experts: the distinct experts that the router chose, ascending.
    token_counts: how many tokens each of them serves, in the same order.
    hints: scored experts of later layers, computed by the engine from hidden states; data to the brain.
    order: for a single token the same experts as its router named them; empty where that is not known. It
        decides only what a plain LRU does with experts that were used at the same time.
    """

    layer: int
    experts: tuple[int, ...]
    token_counts: tuple[int, ...]
    phase: Phase
    hints: tuple[ScoredExpert, ...] = ()
    order: tuple[int, ...] = ()


class Wave(NamedTuple):
    """One step of a plan, carried out in the order of the fields.

    evict: residents whose slots are given up before anything is loaded.
    load: experts to bring in; each needs one slot.
    compute: experts to compute, in this order (all are in slots once ``load`` is done).
    release: experts of this wave that do not stay resident; their slots are free after computing.
    """

    evict: tuple[ExpertKey, ...]
    load: tuple[ExpertKey, ...]
    compute: tuple[ExpertKey, ...]
    release: tuple[ExpertKey, ...]


class DevicePlan(NamedTuple):
    """What a device with memory of its own does in one access, beside what RAM does.

    hits: experts that it holds, computed there.
    foreseen: experts that an earlier plan prefetched and the router has chosen; computed there.
    cancel: those that it has not chosen; their device slots are free.
    evict: residents whose device slots are given up before anything is copied.
    copy: experts that are copied from RAM, once they are there, and computed on the device.
    release: those of ``copy`` and ``foreseen`` that do not stay.
    promote: experts that are computed in RAM and copied meanwhile; residents from the next access on.
    prefetch: experts of later layers that RAM holds, to be copied in this order behind all that is wanted now. Each
        has a device slot until its router speaks.
    """

    hits: tuple[ExpertKey, ...]
    evict: tuple[ExpertKey, ...] = ()
    copy: tuple[ExpertKey, ...] = ()
    release: tuple[ExpertKey, ...] = ()
    promote: tuple[ExpertKey, ...] = ()
    foreseen: tuple[ExpertKey, ...] = ()
    cancel: tuple[ExpertKey, ...] = ()
    prefetch: tuple[ExpertKey, ...] = ()


class FetchPlan(NamedTuple):
    """What one ``LayerAccess`` makes the engine or the simulator do. ``hits``, ``misses`` count experts.

    cancel: prefetches and streamed experts, begun or not, that this access made pointless; drop them before
        loading.
    prefetch: what to move, in this order, while no demand load waits, until the next plan replaces the list.
        A load that has begun is reported by ``ExpertScheduler.start_load`` and ``finish_load``.
    prefetch_slots: how many slots are there for prefetches to arrive in from this plan on. Those of before that are
        too many are the residents' and the working set's again, once what the plan cancels is out of them.
    stream: what the next layer of a pass over many tokens almost certainly needs: to be read once nothing else
        is demanded, into slots that are free, and kept there, reported to nobody, until the next plan loads or
        cancels it.
    device: what a device does; the rest of the plan is then about the experts that it does not hold.
    """

    layer: int
    waves: tuple[Wave, ...]
    hits: int
    misses: int
    cancel: tuple[ExpertKey, ...] = ()
    prefetch: tuple[ExpertKey, ...] = ()
    stream: tuple[ExpertKey, ...] = ()
    prefetch_slots: int = 0
    device: DevicePlan | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a model's routed experts.

    num_experts: routed experts of each MoE layer, by decoder layer index, ascending.
    num_experts_per_tok: the largest top-k of any layer.
    expert_nbytes: bytes of one routed expert as stored, by layer.
    """

    model_type: str
    num_experts: Mapping[int, int]
    num_experts_per_tok: int
    hidden_size: int
    expert_nbytes: Mapping[int, int]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.num_experts)

    @property
    def total_experts(self) -> int:
        return sum(self.num_experts.values())

    @property
    def total_expert_nbytes(self) -> int:
        """Bytes of all routed experts of the model."""
        return sum(count * self.expert_nbytes[layer] for layer, count in self.num_experts.items())
