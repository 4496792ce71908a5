"""Decoding on a device as a few recordings: what transformers launches for a token is recorded once and done again.

A device computes a layer's dense part in a tenth of the time that launching it from Python takes. So the forward of
the whole model is recorded for one token, cut wherever experts are asked for: a piece ends with what a layer's router
chose, the next begins with what its experts gave. No family needs code of its own. (Pieces of CUDA graphs between
what cannot be captured: as compilers of inference servers do it; here at the experts interface.)

What is recorded cannot grow with the conversation: keys and values are their whole buffers under a mask, and the
token's place is a number on the device (``ConversationCache.fix``). That may round otherwise than transformers' own
way, so whether it is done is decided once, when a model is loaded, by trying it, and never by what memory there is.
Without a recording at hand the same operations are launched one by one: the same bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import ref

import torch
from torch import nn

from moei_core.adapters.base import ExpertsRuntime, NothingResident
from moei_core.adapters.early_router import EarlyRouters
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.engine.devices import Device
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.next_token_logits import NextTokenLogits
from moei_core.engine.recorded_operations import RecordedLayer, Recording

_PROMPT, _TOKENS = 8, 4
"""Tokens of the trial: at once, and then one by one."""
_AGREES = 0.03
"""Norm of the logits' difference, of their own: products under a mask may be other kernels, which round otherwise."""


class RecordedRuntime(ExpertsRuntime, Protocol):
    """An ``ExpertsRuntime`` that can run a layer whose router has been recorded."""

    def record_experts(self, layer: RecordedLayer, recording: Recording) -> None:
        """Record a piece of what can be done again for each token of ``layer``, if anything can, and note it there."""

    def run_recorded(self, layer: RecordedLayer) -> None:
        """The piece that ends with ``layer`` is queued: write what the experts give to its ``output``."""


class _Recorder(NothingResident):
    """An ``ExpertsRuntime`` that ends a piece of the recording at each layer, and begins the next."""

    def __init__(self, recording: Recording, runtime: RecordedRuntime, routers: EarlyRouters | None) -> None:
        self._recording, self._runtime, self._routers = recording, runtime, routers
        self.pieces: list[Callable[[], None]] = []
        self.layers: list[RecordedLayer] = []

    def run_layer(
        self,
        module: nn.Module,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        recording = self._recording
        to_host = recording.to_host
        host = to_host(hidden_states), to_host(top_k_index), to_host(top_k_weights)
        self.pieces.append(recording.end())
        residual = None if self._routers is None else self._routers.kept(layer)
        at = RecordedLayer(module, layer, hidden_states, host, torch.empty_like(hidden_states), residual)
        self._runtime.record_experts(at, recording)
        if self._routers is not None:
            self._record_early(at, self._routers)
        self.layers.append(at)
        recording.begin()
        return at.output

    def _record_early(self, at: RecordedLayer, routers: EarlyRouters) -> None:
        recording = self._recording
        for norm in (True, False):
            if not routers.can_apply(at.layer, norm):
                continue
            recording.begin()
            try:
                host = recording.to_host(routers.early(at.layer, at.hidden_states, norm))
                at.early[norm] = recording.end(), host
            except RuntimeError as error:
                recording.abandon()
                if _lacks_memory(error):
                    raise
                # Then it is launched when it is asked for.


class _Echo(NothingResident):
    """A ``RecordedRuntime`` for trials: what it returns depends on all that it is given."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def run_layer(
        self,
        module: nn.Module,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        chosen = (top_k_index.to(torch.float32) % 7 * top_k_weights).mean(-1, keepdim=True)
        return hidden_states * chosen.to(hidden_states.dtype)

    def record_experts(self, layer: RecordedLayer, recording: Recording) -> None:
        return

    def run_recorded(self, layer: RecordedLayer) -> None:
        self._device.read_back()
        index, weights = map(self._device.bring, layer.host[1:])
        layer.output.copy_(self.run_layer(layer.module, layer.layer, layer.hidden_states, index, weights))


class DecodeGraphs:
    """The forward of one token of one model on a device, recorded for the buffers of one conversation at a time."""

    def __init__(
        self,
        adapter: TransformersAdapter,
        runtime: RecordedRuntime,
        device: Device,
        routers: EarlyRouters | None = None,
    ) -> None:
        """runtime: computes the experts, and is installed. routers: those that are applied early, if any."""
        self._adapter, self._runtime, self._device, self._routers = adapter, runtime, device, routers
        self._logits_after = NextTokenLogits(adapter.model)
        place = adapter.model.device
        with torch.inference_mode():
            self._token = torch.zeros((1, 1), dtype=torch.int64, device=place)
            self._place = torch.zeros((), dtype=torch.int64, device=place)
        # Of one conversation, which may end and give them back.
        self._buffers: list[ref[torch.Tensor]] = []
        self._pieces: list[Callable[[], None]] = []
        self._layers: list[RecordedLayer] = []
        self._logits: torch.Tensor | None = None
        self._tried = False
        self.why_not = self._try()
        self._tried = True

    @property
    def note(self) -> str:
        """What a person should know, if anything."""
        if self.why_not is None:
            return ""
        return f"Decoding on the GPU is launched step by step, which is slower: {self.why_not}."

    def takes(self, cache: ConversationCache) -> bool:
        """Whether a token that continues ``cache`` is computed here; a matter of the model, never of residency."""
        return self.why_not is None and cache.can_fix

    def forward(self, token: int, cache: ConversationCache) -> torch.Tensor:
        """The logits [vocabulary] after one more token, on the device. Raises: what the runtime raises."""
        try:
            cache.fix(self._place)
            self._token.fill_(token)
            self._place.fill_(len(cache.tokens))
            buffers = cache.buffers()
            if len(buffers) != len(self._buffers) or any(map(_is_not, buffers, self._buffers)):
                self._record(cache)
                self._buffers = [*map(ref, buffers)]
            found = self._repeat() if self._pieces else self._logits_after(self._token, cache)
            # The next token is written over it.
            logits = found.clone()
        finally:
            cache.release()
        cache.wrote_token()
        return logits

    def _repeat(self) -> torch.Tensor:
        for piece, at in zip(self._pieces, self._layers, strict=False):
            piece()
            if at.residual is not None and self._routers is not None:
                self._routers.keep(at.layer, at.residual)
            if self._routers is not None:
                self._routers.queue(at.layer, at.early)
            self._runtime.run_recorded(at)
        self._pieces[-1]()
        assert self._logits is not None
        return self._logits

    def _record(self, cache: ConversationCache) -> None:
        """For the buffers that ``cache`` has now. Raises: torch.OutOfMemoryError."""
        # Pieces of a token that failed may still be queued, and what they write on the host is given back here.
        self._device.mark().wait()
        self._forget()
        # While something is recorded, torch takes no memory out of its caches, and the last recording's is there.
        self._device.release(0)
        recording = self._device.record()
        recorder = _Recorder(recording, self._runtime, self._routers)
        with self._adapter.instead(recorder), _watching(self._routers):
            # What is given back meanwhile, as an earlier model's recordings may be, would end up in the recording.
            collects = gc.isenabled()
            gc.disable()
            try:
                recording.begin()
                logits = self._logits_after(self._token, cache)
                recorder.pieces.append(recording.end())
            except BaseException as error:
                recording.abandon()
                if _lacks_memory(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise torch.OutOfMemoryError(str(error)) from error
                if self._tried and isinstance(error, RuntimeError) and not _lacks_memory(error):
                    # It could be recorded when the model was loaded. Launching it gives the same bits.
                    return
                raise
            finally:
                if collects:
                    gc.enable()
        self._pieces, self._layers, self._logits = recorder.pieces, recorder.layers, logits

    def close(self) -> None:
        """Give back what recordings hold. Before the device is closed."""
        self._forget()
        self._device.release(0)

    def _forget(self) -> None:
        self._buffers, self._pieces, self._layers, self._logits = [], [], [], None

    def _try(self) -> str | None:
        """Why this model cannot be recorded; None: it can, and what it gives agrees with transformers' own way."""
        runtime = self._runtime
        self._runtime = _Echo(self._device)
        cache, own = (ConversationCache(self._adapter.config) for _ in range(2))
        vocabulary = self._adapter.config.get_text_config().vocab_size
        tokens = [number * 37 % vocabulary for number in range(_PROMPT + _TOKENS)]
        try:
            with torch.inference_mode(), self._adapter.instead(self._runtime):
                for start, end in [(0, _PROMPT), *((at, at + 1) for at in range(_PROMPT, len(tokens)))]:
                    expected = self._own_way(tokens[start:end], own)
                    if end - start > 1:
                        self._own_way(tokens[start:end], cache)
                        if not cache.can_fix:
                            return "its layers keep more than keys and values"
                        continue
                    found = self.forward(tokens[start], cache)
                    cache.commit(tokens[start:end])
                    difference = (found.float() - expected.float()).norm() / expected.float().norm()
                    if not bool(difference < _AGREES):
                        return f"recorded tokens differ by {float(difference):.2g} of their logits"
                # What the runtime records itself must be possible; what it gives is the engine's matter.
                self._runtime = runtime
                cache.fix(self._place)
                self._record(cache)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # What cannot be recorded says so with any type.
            line = next(iter(str(error).strip().splitlines()), "")
            return f"{type(error).__name__}: {line[:120]}"
        finally:
            self._runtime = runtime
            self._forget()
        return None

    def _own_way(self, tokens: list[int], cache: ConversationCache) -> torch.Tensor:
        logits = self._logits_after(torch.tensor([tokens], device=self._token.device), cache)
        cache.commit(tokens)
        return logits


@contextmanager
def _watching(routers: EarlyRouters | None) -> Iterator[None]:
    """While it is recorded, routers applied early see residual streams whether they are wanted now or not."""
    if routers is None:
        yield
        return
    before = routers.watching
    routers.watch(True)
    try:
        yield
    finally:
        routers.watch(before)


def _is_not(buffer: torch.Tensor, known: ref[torch.Tensor]) -> bool:
    return known() is not buffer


def _lacks_memory(error: BaseException) -> bool:
    """CUDA says it in its own words where it is not torch's allocator that asks."""
    asked = isinstance(error, RuntimeError) and "out of memory" in str(error)
    return asked or isinstance(error, torch.OutOfMemoryError)
