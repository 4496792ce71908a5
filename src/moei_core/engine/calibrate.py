"""What a token costs beside reading weights: measured on a model whose weights are next to nothing."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from moei_core.config import PREFILL_CHUNK, ExpertBudget, GenerationSettings
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.sampling import Sampler
from moei_core.hardware.memory import resident_memory
from moei_core.hardware.profile import FrameworkCost
from moei_core.types import Phase

_VOCABULARY = 100_000
_WARM_UP = 4


class _LayerClock:
    """Seconds between the start of the first and the end of the last decoder layer of each pass."""

    def __init__(self, layers: Any) -> None:
        self.seconds: list[float] = []
        self._started = 0.0
        self._hooks = [
            layers[0].register_forward_pre_hook(self._start),
            layers[-1].register_forward_hook(self._stop),
        ]

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def measure_framework(folder: Path, tokens: int = 40, threads: int = 1) -> FrameworkCost:
    """Run the model in ``folder``, with every expert resident, one prompt chunk and ``tokens`` tokens long.

    threads: that torch computes with; one, since waking others is part of what products are measured to take.
    Raises: what loading a model raises.
    """
    before = torch.get_num_threads()
    with LoadedModel(
        folder, LoadOptions(experts=ExpertBudget(fraction=1.0), context=512, device="cpu")
    ) as model:
        torch.set_num_threads(threads)
        clock = _LayerClock(model.adapter.model.base_model.layers)
        try:
            return _measure(model, clock, tokens)
        finally:
            clock.remove()
            torch.set_num_threads(before)


def _measure(model: LoadedModel, clock: _LayerClock, tokens: int) -> FrameworkCost:
    runtime, network, spec = model.runtime, model.adapter.model, model.spec
    layers, vocabulary = len(spec.num_experts), model.adapter.config.get_text_config().vocab_size
    cache = ConversationCache(model.adapter.config)
    chunk = min(PREFILL_CHUNK, model.context // 2)

    def run(ids: list[int], phase: Phase) -> tuple[float, float, float]:
        """(all of a pass, its layers, its experts), in seconds."""
        runtime.forward_pass(phase, len(ids))
        experts_before, started = runtime.statistics.expert_compute_s, time.perf_counter()
        with torch.inference_mode():
            network(
                input_ids=torch.tensor([ids]),
                past_key_values=cache.cache,
                use_cache=True,
                logits_to_keep=torch.tensor([-1]),
            )
        elapsed = time.perf_counter() - started
        runtime.end_pass()
        cache.commit(ids)
        return elapsed, clock.seconds[-1], runtime.statistics.expert_compute_s - experts_before

    prompt = [(7 * number + 3) % vocabulary for number in range(chunk)]
    model.scheduler.request_start()
    first, _, _ = run(prompt, Phase.PREFILL)  # loads every expert that it meets, few bytes
    cache.clear()
    touched_before = model.scheduler.statistics.hits + model.scheduler.statistics.misses
    again, prefill_layers, prefill_experts = run(prompt, Phase.PREFILL)
    touched = model.scheduler.statistics.hits + model.scheduler.statistics.misses - touched_before
    steps = [run([(11 * number) % vocabulary], Phase.DECODE) for number in range(_WARM_UP + tokens)][
        _WARM_UP:
    ]
    model.scheduler.request_end()
    lookups = layers * spec.num_experts_per_tok
    weights = model.adapter.dense_nbytes + model.spec.total_expert_nbytes
    return FrameworkCost(
        layer=statistics.median((inner - experts) / layers for _, inner, experts in steps),
        token=statistics.median(outer - inner for outer, inner, _ in steps),
        expert=statistics.median(experts / lookups for _, _, experts in steps),
        prefill_layer=(prefill_layers - prefill_experts) / layers,
        prefill_expert=prefill_experts / max(1, touched),
        sampling=_sampling_seconds() / _VOCABULARY,
        first_pass=max(0.0, first - again),
        process_nbytes=max(0, resident_memory() - weights),
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
