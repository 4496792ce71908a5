"""MoE-Infinity's activation-aware replacement (arXiv 2401.14361)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moei_core.cache.policies.base import ValuePolicy
from moei_core.predict.base import PassEvent, RequestEvent
from moei_core.predict.eamc import EAMCPredictor
from moei_core.types import LayerAccess

EPSILON = 1e-3


class ActivationAware(ValuePolicy):
    """Evict argmin of (pEAM[l][e] + eps) / sum(pEAM[l]) x (1 - l / L) over one pool.

    pEAM comes from the past requests most like this one; the request's own counts so far are added, as in
    the paper, where the cache follows the current sequence. Early layers are kept, since a prefetch has the
    least time and evidence there. A row is revalued when its layer runs, not at every eviction: the
    prediction hardly changes within a pass, and a scan over the cache would cost more than a miss.
    """

    def __init__(
        self,
        capacity: int,
        num_experts: Mapping[int, int],
        *,
        collection: int = 128,
        nearest: int = 3,
        match: str = "request",
    ) -> None:
        super().__init__(capacity, num_experts, per_layer=False)
        self.predictor = EAMCPredictor(num_experts, capacity=collection, nearest=nearest, match=match)

    def on_request(self) -> None:
        self.predictor.observe(RequestEvent(start=True))

    def on_request_end(self) -> None:
        self.predictor.observe(RequestEvent(start=False))

    def on_access(self, access: LayerAccess) -> None:
        i = self.position[access.layer]
        if i == 0:
            # The first layer of a pass opens it; the pass's phase is that of its accesses.
            self.predictor.observe(PassEvent(access.phase))
        self.predictor.observe(access)
        own = self.predictor.matrix.request[access.phase][i]
        total = float(own.sum())
        expected = self.predictor.row(i)
        share = own / np.float32(total) if total else own
        if expected is not None:
            share = share + expected
        self.values[i] = (share + np.float32(EPSILON)) * np.float32(1 - i / len(self.layers))
        self.refresh(i)
