"""What a token costs beside reading weights: measured on a model whose weights are next to nothing.

In a real model each layer's weights go through the processor's caches and push out what Python and torch need for the
next one, which makes that up to five times as slow. So here as many bytes are read between the steps of a layer.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from moei_core.adapters.native_layer import leave_attention_to_torch
from moei_core.config import PREFILL_CHUNK, ExpertBudget, GenerationSettings
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.next_token_logits import NextTokenLogits
from moei_core.engine.sampling import Sampler
from moei_core.hardware.memory import resident_memory
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.bandwidth import make_buffer
from moei_core.hardware.profile import FrameworkCost, LayerCost
from moei_core.types import Phase

_VOCABULARY = 100_000
_WARM_UP = 4
_LEAST = 5
_BUFFER = 1 << 29
"""More than the caches of most processors hold."""
_LAYER_NBYTES = (0, 8 << 20, 32 << 20, 128 << 20)
"""Weights of a layer that one token reads: from those of the smallest models to Mixtral's in 4 bits."""


class _LayerClock:
    """Seconds between the start of the first and the end of the last decoder layer of each pass.

    In the meantime it reads memory as a layer's weights are read, and leaves out what that takes: one half before
    attention, the other before the experts.
    """

    def __init__(self, model: LoadedModel) -> None:
        network: Any = model.adapter.model
        layers = network.base_model.layers
        self.nbytes = 0
        """To be read in each layer."""
        self.reading_s = 0.0
        self.seconds: list[float] = []
        self._runtime = model.runtime
        self._buffer = make_buffer(_BUFFER)
        self._at = 0
        self._started = 0.0
        self._hooks = [layers[0].register_forward_pre_hook(self._start)]
        self._hooks += [layer.register_forward_pre_hook(self._read) for layer in layers]
        self._hooks += [layers[-1].register_forward_hook(self._stop)]
        self._runtime.before_access = self._read

    def _start(self, *_: Any) -> None:
        self._started, self.reading_s = time.perf_counter(), 0.0

    def _read(self, *_: Any) -> None:
        words = self.nbytes // 2 // self._buffer.itemsize
        if not words:
            return
        started = time.perf_counter()
        if self._at + words > len(self._buffer):
            self._at = 0
        self._buffer[self._at : self._at + words].max()
        self._at += words
        self.reading_s += time.perf_counter() - started

    def _stop(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started - self.reading_s)

    def remove(self) -> None:
        self._runtime.before_access = None
        for hook in self._hooks:
            hook.remove()


def measure_framework(folder: Path, tokens: int = 12, allowance: Allowance | None = None) -> FrameworkCost:
    """Run the model in ``folder``, with every expert resident: one prompt chunk, and ``tokens`` tokens in each setting.

    allowance: with less time than that there are fewer tokens, but ``_LEAST``.
    torch has one thread meanwhile, since waking others is part of what products are measured to take.
    Raises: what loading a model raises.
    """
    before = torch.get_num_threads()
    with LoadedModel(
        folder, LoadOptions(experts=ExpertBudget(fraction=1.0), context=512, device="cpu")
    ) as model:
        torch.set_num_threads(1)
        clock = _LayerClock(model)
        try:
            return _measure(model, clock, tokens, allowance or Allowance(math.inf))
        finally:
            clock.remove()
            torch.set_num_threads(before)


def _measure(model: LoadedModel, clock: _LayerClock, tokens: int, allowance: Allowance) -> FrameworkCost:
    runtime, spec, logits_after = model.runtime, model.spec, NextTokenLogits(model.adapter.model)
    layers, vocabulary = len(spec.num_experts), model.adapter.config.get_text_config().vocab_size
    cache = ConversationCache(model.adapter.config, model.context)
    chunk = min(PREFILL_CHUNK, model.context // 2)

    def run(ids: list[int], phase: Phase) -> tuple[float, float, float]:
        """(all of a pass, its layers, its experts), in seconds."""
        runtime.forward_pass(phase, len(ids))
        experts_before, started = runtime.statistics.expert_compute_s, time.perf_counter()
        with torch.inference_mode():
            logits_after(torch.tensor([ids]), cache)
        elapsed = time.perf_counter() - started - clock.reading_s
        runtime.end_pass()
        cache.commit(ids)
        return elapsed, clock.seconds[-1], runtime.statistics.expert_compute_s - experts_before

    def steps(nbytes: int, share: Allowance) -> list[tuple[float, float, float]]:
        clock.nbytes = nbytes
        found: list[tuple[float, float, float]] = []
        for number in range(_WARM_UP + tokens):
            if number >= _WARM_UP + _LEAST and share.over:
                break
            found.append(run([11 * number % vocabulary], Phase.DECODE))
        return found[_WARM_UP:]

    def settings(share: Allowance) -> list[list[tuple[float, float, float]]]:
        count = len(_LAYER_NBYTES)
        return [steps(nbytes, share.part(1 / (count - i))) for i, nbytes in enumerate(_LAYER_NBYTES)]

    def layer_seconds(found: list[tuple[float, float, float]]) -> float:
        return statistics.median((inner - experts) / layers for _, inner, experts in found)

    prompt = [(7 * number + 3) % vocabulary for number in range(chunk)]
    model.scheduler.request_start()
    first, _, _ = run(prompt, Phase.PREFILL)  # loads every expert that it meets, few bytes
    cache.clear()
    clock.nbytes = _LAYER_NBYTES[-1]
    touched_before = model.scheduler.statistics.hits + model.scheduler.statistics.misses
    again, prefill_layers, prefill_experts = run(prompt, Phase.PREFILL)
    touched = model.scheduler.statistics.hits + model.scheduler.statistics.misses - touched_before
    own = settings(allowance.part(0.5))
    leave_attention_to_torch(model.adapter.model)
    others = settings(allowance)
    model.scheduler.request_end()
    lookups = layers * spec.num_experts_per_tok
    weights = model.adapter.dense_nbytes + model.spec.total_expert_nbytes
    return FrameworkCost(
        layers=tuple(
            LayerCost(nbytes, *(layer_seconds(found) for found in pair))
            for nbytes, *pair in zip(_LAYER_NBYTES, own, others, strict=True)
        ),
        token=statistics.median(outer - inner for outer, inner, _ in own[-1]),
        expert=statistics.median(experts / lookups for _, _, experts in own[0]),
        prefill_layer=(prefill_layers - prefill_experts) / layers,
        prefill_expert=prefill_experts / max(1, touched),
        sampling=_sampling_seconds() / _VOCABULARY,
        first_pass=max(0.0, first - again),
        process_nbytes=max(0, resident_memory() - weights - _BUFFER),
        source=f"{model.folder.name}, {torch.get_num_threads()} threads",
    )


def _sampling_seconds() -> float:
    sampler = Sampler(GenerationSettings(temperature=1.0, seed=0))
    logits = torch.randn(_VOCABULARY, generator=torch.Generator().manual_seed(0))
    samples = []
    for _ in range(8):
        started = time.perf_counter()
        sampler.next_token([1, 2, 3], logits)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)
