"""Routing that follows a recorded trace: its experts in place of the router's, whose weights are kept; its hints, too.

For measuring real routing on weights whose own routing means nothing. The text that comes out means nothing
either, and every report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from moei_core.engine.hints import Hinter
from moei_core.errors import UsageError
from moei_core.trace.format import Trace
from moei_core.trace.hints import hints_of_token
from moei_core.types import ExpertKey, ModelSpec, ScoredExpert


class Routed(Protocol):
    """What can be made to follow a trace: an ``ExpertRuntime``."""

    routing: ForcedRouting | None
    hinter: Hinter | None


def check_fits(trace: Trace, num_experts: Sequence[int], num_experts_per_tok: int) -> None:
    """Whether a model of so many experts in each MoE layer can follow ``trace``. Raises: UsageError."""
    if len(num_experts) > len(trace.moe_layers) or set(num_experts) != {trace.num_experts}:
        raise UsageError(
            f"The trace of {trace.model} does not fit this model.",
            f"It has {len(trace.moe_layers)} MoE layers of {trace.num_experts} experts; the model has "
            f"{len(num_experts)} of {', '.join(map(str, sorted(set(num_experts))))}.",
            f"Use a model of {trace.num_experts} experts a layer and at most {len(trace.moe_layers)} MoE layers.",
        )
    if trace.experts.shape[2] > num_experts_per_tok:
        raise UsageError(
            f"The trace of {trace.model} does not fit this model.",
            f"It chooses {trace.experts.shape[2]} experts a token, the model only {num_experts_per_tok}.",
            "Use a trace of the same top-k or less.",
        )


class ForcedRouting:
    """Replaces each layer's ``top_k_index``. The n-th token of all forward passes takes the trace's n-th row;
    at the end the trace starts again."""

    def __init__(self, trace: Trace, spec: ModelSpec) -> None:
        """The model's n-th MoE layer follows the trace's n-th. Raises: UsageError if they do not fit."""
        check_fits(trace, list(spec.num_experts.values()), spec.num_experts_per_tok)
        self._trace, self._experts = trace, trace.experts
        self._position = {layer: number for number, layer in enumerate(spec.num_experts)}
        self._layers = tuple(spec.num_experts)
        self._none = trace.num_experts
        self._start = self._end = 0
        self._forced: torch.Tensor | None = None
        self._numbers = {layer: number for number, layer in enumerate(trace.moe_layers)}
        self._hinted, self._hints = -1, dict[int, tuple[ScoredExpert, ...]]()

    @property
    def hint_distances(self) -> tuple[int, ...]:
        """How many MoE layers ahead the trace's hints are for."""
        return tuple(sorted(set(self._trace.hint_distances))) or (1,)

    def forward_pass(self, tokens: int) -> None:
        """A pass over the next ``tokens`` tokens starts, again if the one before did not end."""
        self._end, self._forced = self._start + tokens, None

    def end_pass(self) -> None:
        """The pass is complete."""
        self._start = self._end

    def top_k_index(self, layer: int, chosen: torch.Tensor) -> torch.Tensor:
        """The trace's experts for one layer of this pass, in the shape [tokens, top_k] of ``chosen``."""
        # At once for all layers of a pass: what following a trace takes is measured as the engine's time.
        if self._forced is None or self._forced.shape[1:] != chosen.shape:
            self._forced = self._of_pass(chosen)
        return self._forced[self._position[layer]]

    def _of_pass(self, chosen: torch.Tensor) -> torch.Tensor:
        """The trace's experts of this pass, [layers, tokens, top_k]."""
        rows = np.arange(self._start, self._start + chosen.shape[0]) % len(self._experts)
        experts = np.asarray(self._experts[rows, : len(self._layers)]).astype(np.int64)
        forced = torch.full((len(self._layers), *chosen.shape), self._none, dtype=chosen.dtype)
        forced[..., : experts.shape[2]] = torch.from_numpy(experts).transpose(0, 1)
        return forced.to(chosen.device)

    def hints(self, layer: int) -> tuple[ScoredExpert, ...]:
        """What the trace says that the single token of this pass hints at ``layer``."""
        if self._hinted != self._start:
            self._hinted = self._start
            self._hints = hints_of_token(self._trace, self._start % len(self._experts))
        numbers, layers = self._numbers, self._layers
        return tuple(
            ScoredExpert(ExpertKey(layers[numbers[hint.key.layer]], hint.key.expert), hint.score)
            for hint in self._hints.get(self._position[layer], ())
            if numbers[hint.key.layer] < len(layers)
        )


class _ForcedHints:
    """A ``Hinter`` that computes what the model's own does, which takes its time, and says what the trace says."""

    def __init__(self, own: Hinter, routing: ForcedRouting) -> None:
        self._own, self._routing = own, routing
        self.watch, self.close = own.watch, own.close

    @property
    def distances(self) -> tuple[int, ...]:
        return self._routing.hint_distances

    def hints(
        self, layer: int, hidden_states: torch.Tensor, chosen: tuple[int, ...]
    ) -> tuple[ScoredExpert, ...]:
        self._own.hints(layer, hidden_states, chosen)
        return self._routing.hints(layer)


def follow(runtime: Routed, spec: ModelSpec, trace: Trace) -> None:
    """Let a model route as ``trace`` says. The trace's hints, if it has any, take the place of the model's.

    Raises: UsageError if they do not fit.
    """
    routing = runtime.routing = ForcedRouting(trace, spec)
    if runtime.hinter is not None and trace.hints_experts is not None:
        runtime.hinter = _ForcedHints(runtime.hinter, routing)
