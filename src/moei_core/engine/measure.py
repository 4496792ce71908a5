"""Measuring a loaded model: prefill and decode speed in three conditions that people confuse.

*cold*: the expert cache is empty. *warm*: the same prompt once more. *changing*: new prompts on a warm cache,
which is what a chat does.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from moei_core.config import GenerationSettings
from moei_core.engine.generate import GenerationTimes, Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel
from moei_core.engine.statistics import prefetch_shares
from moei_core.engine.time_split import decode_shares, percentiles, time_split
from moei_core.errors import UsageError
from moei_core.types import ModelSpec


@dataclass(slots=True)
class Request:
    """One measured request. Times in seconds, sizes in bytes. Shares are of the time after the first token; prefill_*
    are of the time before it.

    hits, misses: of lookups in RAM, to which a GPU (gpu_*) leaves only what it does not hold. prefetch_*: see
    ``prefetch_shares``.
    """

    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    hits: int
    misses: int
    bytes_read: int
    decode_bytes_read: int
    bytes_prefetched: int
    total_s: float
    decode_stall_share: float
    decode_expert_share: float
    decode_hit_rate: float
    prefill_disk_s: float
    prefill_experts_s: float
    dense_s: float
    framework_s: float
    experts_s: float
    disk_s: float
    decisions_s: float
    moving_s: float
    combining_s: float
    sampling_s: float
    unexplained_s: float
    token_s: list[float] = field(repr=False)
    decode_gpu_share: float = 0.0
    link_s: float = 0.0
    gpu_s: float = 0.0
    gpu_hit_rate: float = 0.0
    bytes_copied: int = 0
    prefetch_coverage: float = 0.0
    prefetch_waste: float = 0.0
    prefetch_lateness: float = 0.0


def measure_requests(
    model: LoadedModel, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, list[Request]]:
    """Requests of random prompts by condition: one cold, ``repeats`` warm and ``repeats`` changing.

    Raises: UsageError if prompt and reply do not fit the context.
    """

    def measured(seed: int) -> Request:
        return OpenRequest(model, prompt_tokens, new_tokens, seed).end()

    return {
        "cold": [measured(0)],
        "warm": [measured(0) for _ in range(repeats)],
        "changing": [measured(seed) for seed in range(1, repeats + 1)],
    }


class OpenRequest:
    """A request that is answered in parts, so that those of several models can take turns. Only its own time counts."""

    def __init__(self, model: LoadedModel, prompt_tokens: int, new_tokens: int, seed: int) -> None:
        """Computes the prompt and the first token. seed: of the prompt and of the sampling (random weights make all
        tokens about as likely, so that two requests with one seed draw the same tokens whatever their prompts are).

        Raises: UsageError if prompt and reply do not fit the context.
        """
        if prompt_tokens + new_tokens > model.context:
            raise UsageError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens do not fit the context of {model.context}.",
                hint="Ask for fewer, or for a larger --context.",
            )
        self._model, self._prompt, self._total_s = model, _prompt(model, prompt_tokens, seed), 0.0
        self._times = GenerationTimes()
        device = model.device_statistics
        self._device_before = None if device is None else replace(device)
        self._cache_before, self._before = replace(model.scheduler.statistics), model.runtime.snapshot()
        self._prefetch_before = replace(model.scheduler.prefetch_statistics)
        cache = ConversationCache(model.adapter.config, model.context)
        generator = Generator(
            model.adapter.model, model.runtime, cache, lambda: False, model.budget.prefill_chunk, model.graphs
        )
        # Sampled, since greedy decoding of random weights soon repeats one token and with it one routing.
        settings = GenerationSettings(max_new_tokens=new_tokens, temperature=1.0, seed=seed)
        started = time.perf_counter()
        model.runtime.request_start()
        self._tokens = generator.tokens(self._prompt, settings, frozenset(), self._times, model.context)
        next(self._tokens)
        self._total_s = time.perf_counter() - started

    def advance(self, tokens: int) -> float:
        """At most ``tokens`` tokens more; the seconds that they took."""
        started = time.perf_counter()
        for _ in islice(self._tokens, tokens):
            pass
        seconds = time.perf_counter() - started
        self._total_s += seconds
        return seconds

    def end(self) -> Request:
        """The rest of the reply, and what all of it came to."""
        started = time.perf_counter()
        for _ in self._tokens:
            pass
        self._model.runtime.request_end()
        return self._measured(self._total_s + time.perf_counter() - started)

    def _measured(self, total_s: float) -> Request:
        model, times = self._model, self._times
        device, device_before = model.device_statistics, self._device_before
        counts = model.scheduler.statistics.minus(self._cache_before)
        work = model.runtime.statistics.minus(self._before)
        spent = times.decode_s + times.sampling_s
        stall, experts, on_gpu = decode_shares(times, work)
        return Request(
            ttft_s=times.prefill_s,
            prefill_tokens_per_s=len(self._prompt) / times.prefill_s,
            decode_tokens_per_s=len(times.token_s) / spent if times.token_s else 0.0,
            hits=counts.hits,
            misses=counts.misses,
            bytes_read=work.bytes_read,
            decode_bytes_read=work.bytes_read - times.prefill_work.bytes_read,
            bytes_prefetched=work.bytes_prefetched,
            total_s=total_s,
            decode_stall_share=stall,
            decode_expert_share=experts,
            decode_gpu_share=on_gpu,
            decode_hit_rate=decode_hit_rate(counts.misses, len(times.token_s), times, model.spec),
            prefill_disk_s=times.prefill_work.stall_s,
            prefill_experts_s=times.prefill_work.expert_compute_s,
            token_s=times.token_s,
            gpu_hit_rate=device.minus(device_before).hit_rate if device and device_before else 0.0,
            bytes_copied=work.bytes_copied,
            **{
                f"prefetch_{name}": share
                for name, share in prefetch_shares(
                    model.scheduler.prefetch_statistics.minus(self._prefetch_before), counts.misses
                ).items()
            },
            **{f"{name}_s": seconds for name, seconds in time_split(times, work, total_s).items()},
        )


def _prompt(model: LoadedModel, tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.adapter.config.get_text_config().vocab_size
    return [int(token) for token in torch.randint(0, vocabulary, (tokens,), generator=generator)]


def decode_hit_rate(misses: int, tokens: int, times: GenerationTimes, spec: ModelSpec) -> float:
    """Share of the lookups after the prompt that hit. misses: of the whole request. tokens: decoded ones."""
    lookups = tokens * len(spec.num_experts) * spec.num_experts_per_tok
    return 1 - (misses - times.prefill_misses) / lookups if lookups else 0.0


def summarise(requests: list[Request]) -> dict[str, Any]:
    """Median, least and most of every figure, and percentiles of the time of a token."""
    rows = [asdict(request) for request in requests]
    summary: dict[str, Any] = {"requests": len(rows)}
    for name in rows[0]:
        if name == "token_s":
            continue
        values = [row[name] for row in rows]
        summary[name] = {
            "median": round(statistics.median(values), 5),
            "min": round(min(values), 5),
            "max": round(max(values), 5),
        }
    summary["token_s"] = percentiles([second for request in requests for second in request.token_s])
    lookups = sum(request.hits + request.misses for request in requests)
    summary["hit_rate"] = round(sum(request.hits for request in requests) / lookups, 4) if lookups else 0.0
    return summary
