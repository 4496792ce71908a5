"""``ExpertSizes``: what experts of unequal layers take, in one unit: slots of the largest expert.

Files such as Q4_K_M store some layers in more bits than others, and models may have experts of several widths (MoDSE,
arXiv 2409.12210). Budgets, governors and traces count slots; only who keeps bytes must know that several small experts
take no more than a few large ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """nbytes: of one expert's memory, by layer. num_experts: routed experts, by layer."""

    nbytes: Mapping[int, int]
    num_experts: Mapping[int, int]

    @property
    def largest(self) -> int:
        """Bytes of a slot."""
        return max(self.nbytes.values())

    @property
    def smallest(self) -> int:
        """Bytes of the smallest expert."""
        return min(self.nbytes.values())

    @property
    def total(self) -> int:
        """Experts in all."""
        return sum(self.num_experts.values())

    @property
    def whole(self) -> int:
        """Slots whose memory holds all experts."""
        return -(-self._total_nbytes // self.largest)

    def experts(self, slots: int) -> int:
        """How many experts the memory of so many slots holds if no layer has more of them than its share."""
        return min(self.total, slots * self.largest * self.total // self._total_nbytes)

    @property
    def _total_nbytes(self) -> int:
        return sum(count * self.nbytes[layer] for layer, count in self.num_experts.items())


def slots_for(num_experts: Mapping[int, int], sizes: ExpertSizes | None) -> int:
    """Slots for all experts. num_experts: by layer. sizes: None where a slot is for one expert, whatever its size."""
    return sum(num_experts.values()) if sizes is None else sizes.whole


def experts_in(slots: int, sizes: ExpertSizes | None) -> int:
    """How many experts stay in ``slots``, on average where they are unequal."""
    return slots if sizes is None else sizes.experts(slots)
