"""Predictions from the collection of past requests (MoE-Infinity, arXiv 2401.14361)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moei_core.predict.base import Event, LayerOrder, PassEvent, RequestEvent
from moei_core.predict.eam import (
    ExpertActivationMatrix,
    ExpertActivationMatrixCollection,
    Matcher,
    sum_of_squares,
)
from moei_core.types import LayerAccess, Phase, ScoredExpert, layer_keys

Array = NDArray[np.float32]


class EAMCPredictor(LayerOrder):
    """The m past requests whose activations were most alike so far predict the layers to come.

    match: "pass" compares the current pass's iEAM, "request" all that the request has shown so far.
    Scores are the normalised row times top-k, which estimates a probability, times layer proximity.
    """

    def __init__(
        self,
        num_experts: Mapping[int, int],
        *,
        capacity: int = 128,
        nearest: int = 3,
        match: str = "pass",
    ) -> None:
        super().__init__(num_experts)
        self.collections = {phase: ExpertActivationMatrixCollection(num_experts, capacity) for phase in Phase}
        self.matrix = ExpertActivationMatrix(num_experts)
        self._nearest, self._by_request = nearest, match == "request"
        self._phase = Phase.DECODE
        self._matcher: Matcher | None = None
        self._at = -1
        self._chosen: NDArray[np.intp] | None = None
        self._top_k = 1.0

    def observe(self, event: Event) -> None:
        if isinstance(event, LayerAccess):
            self._observe_access(event)
        elif isinstance(event, PassEvent):
            self.matrix.start_pass()
            if event.phase is not self._phase or not self._by_request or self._matcher is None:
                self._phase = event.phase
                self._matcher = self._fresh_matcher()
            self._at, self._chosen = -1, None
        else:
            self._observe_request(event)

    def _observe_request(self, event: RequestEvent) -> None:
        if event.start:
            self.matrix.start_request()
        else:
            for phase, collection in self.collections.items():
                collection.add(self.matrix.request[phase])
        self._matcher = None

    def _fresh_matcher(self) -> Matcher | None:
        collection = self.collections[self._phase]
        return collection.matcher() if collection.size else None

    def _observe_access(self, access: LayerAccess) -> None:
        experts, counts = self.matrix.record(access)
        self._at, self._chosen = self.position[access.layer], None
        tokens = max(access.token_counts, default=1)
        self._top_k = len(access.experts) if tokens == 1 else self._top_k
        if self._matcher is not None and access.experts:
            square = None
            if self._by_request:
                row = self.matrix.request[access.phase][self._at, experts]
                square = sum_of_squares(row) - sum_of_squares(row - counts)
            self._matcher.add_row(self._at, experts, counts, added_square=square)

    def row(self, i: int) -> Array | None:
        """pEAM[i]: the expected distribution over the experts of layer number ``i``; None: no evidence."""
        if self._matcher is None:
            return None
        if self._chosen is None:
            similarity = self._matcher.similarities()
            count = min(self._nearest, len(similarity))
            # Sorted by entry, so that the sum does not depend on how the partition orders equals.
            self._chosen = np.sort(np.argpartition(-similarity, count - 1)[:count])
        return self.collections[self._phase].combine(self._chosen, i)

    def predict(self, layer: int) -> Sequence[ScoredExpert]:
        i = self.position[layer]
        row = self.row(i)
        if row is None:
            return ()
        ahead = (i - self._at) % len(self.layers)
        proximity = 1 - ahead / len(self.layers)
        scores = np.minimum(row * np.float32(self._top_k), 1) * np.float32(proximity)
        return top(layer, scores, int(2 * self._top_k))


def top(layer: int, scores: Array, count: int) -> list[ScoredExpert]:
    """The ``count`` best positive scores, best first, ties by expert index."""
    order = np.argsort(-scores, kind="stable")[:count]
    keys = layer_keys(layer, len(scores))
    return [
        ScoredExpert(keys[expert], score)
        for expert, score in zip(order.tolist(), scores[order].tolist(), strict=True)
        if score > 0
    ]
