"""The generation loop: chunked prefill, then one token at a time, stopping only between tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from moei_core.config import PREFILL_CHUNK, GenerationSettings
from moei_core.engine.decode_graphs import DecodeGraphs
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.next_token_logits import NextTokenLogits
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.sampling import Sampler
from moei_core.engine.statistics import RuntimeStatistics
from moei_core.engine.steady_shapes import SteadyShapes
from moei_core.errors import DoesNotFitError, InterruptedTurnError
from moei_core.types import Phase


@dataclass(slots=True)
class GenerationTimes:
    """Seconds that the parts of one turn have taken so far, and the tokens that went through them.

    prefill_layers: MoE layers that passes over the prompt have come to, in all passes together.
    prefill_work, prefill_misses: what of the runtime's work and of the cache's misses fell to the prompt.
    """

    prefilled_tokens: int = 0
    prefill_layers: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sampling_s: float = 0.0
    prefill_work: RuntimeStatistics = field(default_factory=RuntimeStatistics)
    prefill_misses: int = 0
    token_s: list[float] = field(default_factory=list)


class Generator:
    """Generates from token ids with one model, one runtime and one conversation's cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        runtime: ExpertRuntime,
        cache: ConversationCache,
        should_stop: Callable[[], bool],
        chunk: int = PREFILL_CHUNK,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """should_stop: asked between tokens, and at every layer of a prefill, which may take long.

        chunk: tokens of a prompt that go through the model at once. graphs: compute single tokens on a device.
        """
        self._logits_after = NextTokenLogits(model)
        self._runtime = runtime
        self._cache = cache
        self._should_stop = should_stop
        self._chunk = chunk
        self._graphs = graphs
        self._place = model.device

    def tokens(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        end_tokens: frozenset[int],
        times: GenerationTimes,
        context: int,
    ) -> Iterator[int]:
        """Yield the reply's tokens, an end token (the last one) included.

        Ends after an end token, ``settings.max_new_tokens``, at ``context`` tokens in all, or when asked to
        stop. Raises: InterruptedTurnError when stopped during prefill; what the runtime raises. The cache
        always holds exactly the passes that completed.
        """
        sampler = Sampler(settings)
        history = list(prompt)
        logits = self._prefill(history[len(self._cache.tokens) :], times)
        for count in range(1, settings.max_new_tokens + 1):
            started = time.perf_counter()
            token = sampler.next_token(history, logits)
            times.sampling_s += time.perf_counter() - started
            history.append(token)
            yield token
            if token in end_tokens or count == settings.max_new_tokens or len(history) >= context:
                return
            if self._should_stop():
                return
            started = time.perf_counter()
            try:
                logits = self._forward([token], Phase.DECODE)
            finally:
                elapsed = time.perf_counter() - started
                times.decode_s += elapsed
            times.token_s.append(elapsed)

    def _prefill(self, tokens: list[int], times: GenerationTimes) -> torch.Tensor:
        def at_a_layer() -> None:
            times.prefill_layers += 1
            if self._should_stop():
                raise InterruptedTurnError("Stopped before the first token.")

        started, before, misses = time.perf_counter(), self._runtime.snapshot(), self._runtime.misses
        self._runtime.before_access = at_a_layer
        try:
            for start in range(0, len(tokens), self._chunk):
                chunk = tokens[start : start + self._chunk]
                logits = self._forward(chunk, Phase.PREFILL)
                times.prefilled_tokens += len(chunk)
        finally:
            self._runtime.before_access = None
            times.prefill_s += time.perf_counter() - started
            times.prefill_work = self._runtime.statistics.minus(before)
            times.prefill_misses = self._runtime.misses - misses
        return logits

    def _forward(self, tokens: list[int], phase: Phase) -> torch.Tensor:
        """Logits [vocabulary] after ``tokens``. Raises: DoesNotFitError if a device has too little memory for it."""
        for last in (False, True):
            try:
                logits = self._pass(tokens, phase)
                break
            except torch.OutOfMemoryError as error:
                # What the error's frames hold of the device's memory, they hold as long as the error.
                failure = error.with_traceback(None)
            # Other programs may take a device's memory at any time; experts can do with less of it.
            if last or not self._cache.can_cut or not self._runtime.make_room():
                raise _out_of_memory() from failure
        self._runtime.end_pass()
        self._cache.commit(tokens)
        return logits

    def _pass(self, tokens: list[int], phase: Phase) -> torch.Tensor:
        self._runtime.forward_pass(phase, len(tokens))
        shapes = SteadyShapes() if len(tokens) > 1 else nullcontext()
        try:
            with torch.inference_mode(), shapes:
                if phase is Phase.DECODE and self._graphs is not None and self._graphs.takes(self._cache):
                    logits = self._graphs.forward(tokens[0], self._cache)
                else:
                    logits = self._logits_after(torch.tensor([tokens], device=self._place), self._cache)
                logits = self._runtime.to_host(logits)
        except BaseException:
            try:
                self._runtime.abandon_pass()
            finally:
                self._cache.roll_back()
            raise
        return logits


def _out_of_memory() -> DoesNotFitError:
    return DoesNotFitError(
        "The GPU's memory is not enough for this pass.",
        "Other programs use it too, and experts cannot give more of it back.",
        "Close them, or ask for less: --context, --vram, or --device cpu. The conversation is as it was.",
    )
