"""``TraceWriter``: records a live run. The engine calls it for each access; writing happens at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from moei_core.errors import MoeiError
from moei_core.trace.format import Trace, TraceEvent, write_trace
from moei_core.types import Phase, ScoredExpert

_GROW = 1024


class TraceWriter:
    """Collects forward passes in memory (layers x top-k bytes a token) and writes one file in ``close``.

    Per forward pass: ``begin_pass``, then ``record`` for each MoE layer, in order. ``begin_sequence`` and
    ``begin_request`` open a conversation and a turn; a request that ended without a token leaves no trace.
    """

    def __init__(
        self,
        path: str | Path,
        model: str,
        num_experts: Mapping[int, int],
        num_experts_per_tok: int,
        *,
        hints: int = 0,
        hint_distances: tuple[int, ...] = (1,),
        source: str = "",
        note: str = "",
    ) -> None:
        """num_experts: by decoder layer. hints: how many experts predicted for a layer are kept, from each of
        ``hint_distances`` MoE layers before it."""
        self._path, self._model, self._source, self._note = Path(path), model, source, note
        self._num_experts = dict(num_experts)
        self._position = {layer: i for i, layer in enumerate(num_experts)}
        self._top_k, self._count = num_experts_per_tok, max(num_experts.values())
        self._type: Any = np.uint8 if self._count < 256 else np.uint16
        self._experts = self._empty(_GROW, num_experts_per_tok)
        # One group of columns for each distance.
        self._hint_columns = {distance: at * hints for at, distance in enumerate(hint_distances)}
        self._hints = hints
        columns = hints * len(hint_distances)
        self._hint_experts = self._empty(_GROW, columns) if hints else None
        self._hint_scores = np.zeros((_GROW, len(num_experts), columns), np.float16) if hints else None
        self._tokens = 0
        self._end = 0
        self._rows = self._experts[:0]
        self._steps = 0
        self._phases: list[int] = []
        self._passes: list[int] = []
        self._requests: list[int] = []
        self._sequences: list[int] = []
        self._events: list[tuple[int, int, int, int]] = []

    def begin_sequence(self) -> None:
        """A conversation starts."""
        self._sequences.append(self._end)

    def begin_request(self) -> None:
        """A turn starts."""
        self._requests.append(self._end)

    def begin_pass(self, phase: Phase, tokens: int) -> None:
        """A forward pass over ``tokens`` tokens starts."""
        self._tokens, self._end = self._end, self._end + tokens
        self._passes.append(self._tokens)
        self._steps += 1
        self._phases.append(int(phase))
        while self._end > len(self._experts):
            # Doubling keeps the copying below one byte for each byte recorded.
            self._experts = np.concatenate([self._experts, self._empty(len(self._experts), self._top_k)])
            if self._hint_experts is not None and self._hint_scores is not None:
                more = self._empty(len(self._hint_experts), self._hint_experts.shape[2])
                self._hint_experts = np.concatenate([self._hint_experts, more])
                self._hint_scores = np.concatenate([self._hint_scores, np.zeros_like(self._hint_scores)])
        self._rows = self._experts[self._tokens : self._end]

    def record(self, layer: int, top_k_index: NDArray[Any]) -> None:
        """One MoE layer of the pass. top_k_index: [tokens, k] integers, as the router chose them."""
        none = self._num_experts[layer]
        if none != self._count:
            # A narrower layer's own sign for no expert is another number than the file's.
            top_k_index = np.where(top_k_index < none, top_k_index, self._count)
        self._rows[:, self._position[layer], : top_k_index.shape[1]] = top_k_index
        self._steps += 1

    def record_hints(self, layer: int, hints: tuple[ScoredExpert, ...]) -> None:
        """What was predicted at ``layer`` of this pass for later ones. Kept of single-token passes only."""
        if hints and self._hint_experts is not None and self._end == self._tokens + 1:
            self._keep_hints(layer, hints)

    def event(self, kind: TraceEvent, a: int = 0, b: int = 0) -> None:
        """Something that depended on the machine happened after what was recorded so far."""
        self._events.append((self._steps, int(kind), a, b))

    def _keep_hints(self, layer: int, hints: tuple[ScoredExpert, ...]) -> None:
        assert self._hint_experts is not None and self._hint_scores is not None
        used: dict[int, int] = {}
        for hint in hints:
            target = self._position[hint.key.layer]
            start = self._hint_columns[target - self._position[layer]]
            count = used[target] = used.get(target, 0) + 1
            if count <= self._hints:
                column = start + count - 1
                self._hint_experts[self._tokens, target, column] = hint.key.expert
                self._hint_scores[self._tokens, target, column] = hint.score

    def trace(self) -> Trace:
        """What has been recorded so far."""
        end = self._end
        passes = np.asarray([*self._passes, end], np.int64)
        phase = np.repeat(np.asarray(self._phases, np.uint8), np.diff(passes))

        def offsets(starts: list[int]) -> NDArray[np.int64]:
            return np.asarray([*sorted({0, *(start for start in starts if start < end)}), end], np.int64)

        sequences = offsets(self._sequences)
        return Trace(
            model=self._model,
            num_experts=self._count,
            num_experts_per_tok=self._top_k,
            moe_layers=tuple(self._num_experts),
            experts=self._experts[:end],
            sequence_offsets=sequences,
            pass_offsets=passes,
            request_offsets=offsets([*self._requests, *sequences.tolist()]),
            phase=phase,
            hints_experts=None if self._hint_experts is None else self._hint_experts[:end],
            hints_scores=None if self._hint_scores is None else self._hint_scores[:end],
            hint_distances=tuple(d for d in self._hint_columns for _ in range(self._hints)),
            events=np.asarray(self._events, np.int64).reshape(-1, 4) if self._events else None,
            source=self._source,
            note=self._note,
        )

    def close(self) -> bool:
        """Write the file, unless no token was recorded. Returns whether there is one. Raises: MoeiError, OSError."""
        if not self._end:
            return False
        try:
            write_trace(self.trace(), self._path)
        except SafetensorError as error:
            why = f"{error}."
            raise MoeiError(
                f"{self._path} cannot be written.", why, "Make room, or name another disk."
            ) from error
        return True

    def _empty(self, tokens: int, width: int) -> NDArray[Any]:
        return np.full((tokens, len(self._num_experts), width), self._count, self._type)
