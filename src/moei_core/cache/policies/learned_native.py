"""The default policy with its arithmetic for single tokens in native code: the same decisions, to the bit.

An access of ``LearnedMixture`` is mostly the calls of numpy. The native part works on the same arrays, so what is rare
(a long prompt, a new request, the fit) stays in Python.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moei_core.cache.policies import learned
from moei_core.cache.policies.learned import LearnedMixture
from moei_core.quant import native
from moei_core.types import ExpertKey, LayerAccess

if native.available():
    from moei_core.quant import _native


class NativeMixture(LearnedMixture):
    """``LearnedMixture`` for where the native module is loaded."""

    def __init__(self, capacity: int, num_experts: Mapping[int, int]) -> None:
        super().__init__(capacity, num_experts)
        self._total = np.zeros(len(self.layers))
        arrays: dict[str, NDArray[Any]] = {
            "values": self.values,
            "absence": self._absence,
            "candidates": self._candidates,
            "batches": self._batches,
            "follows": self._follows,
            "seen": self._seen,
            "trust": self._trust,
            "source_trace": self._source_trace,
            "feature_trace": self._feature_trace,
            "gram": self._gram,
            "moment": self._moment,
            "weights": self._weights,
            "ranking": self._ranking,
            "floor": self._floor,
            "total": self._total,
            "delay": self._delay,
            "keep": self._keep,
            "gain": self._gain,
            "powers": self._powers,
            "forget": self._forget,
        }
        self._core = _native.LearnedMixture(
            arrays,
            self.keys,
            self.width,
            self._batch,
            self._sample.step,
            learned.SLOW,
            1 - self.gamma,
            self._doubt,
            learned._LEAST_SHARE,
            learned._FADED,
            learned._NOTHING,
        )
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._core.begin_pass(self._discount, self._full)

    def on_access(self, access: LayerAccess) -> None:
        i = self.position[access.layer]
        if self._request_started[i]:
            self._start_request(i)
        if self._is_long(access):
            self._absorb_many(i, access)
            self._core.break_off()
            return
        self._core.account(i, access.experts)

    def _learn(self, i: int) -> None:
        self._core.learn(i)

    def refresh(self, i: int) -> None:
        super().refresh(i)
        self._core.changed(i)

    def refresh_all(self) -> None:
        super().refresh_all()
        for i in range(len(self.layers)):
            self._core.changed(i)

    def insert(self, key: ExpertKey) -> None:
        self._core.insert(self.position[key.layer], key.expert)

    def remove(self, key: ExpertKey) -> None:
        self._core.remove(self.position[key.layer], key.expert)

    def victim(self, incoming: ExpertKey, excluded: Container[ExpertKey]) -> ExpertKey | None:
        return self._core.victim(self.position[incoming.layer], incoming.expert, excluded)
