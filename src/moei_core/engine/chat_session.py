"""``ChatSession``: one conversation with a loaded model. A turn either completes or leaves no trace."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moei_core.cache.expert_cache import CacheStatistics
from moei_core.config import GenerationSettings
from moei_core.engine.generate import GenerationTimes, Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel
from moei_core.engine.statistics import RuntimeStatistics, prefetch_shares, prefetch_verdict
from moei_core.engine.text_stream import TextPiece, TextStream, thinking_markers, thinking_switches
from moei_core.engine.time_split import decode_shares, percentiles, time_split
from moei_core.errors import UsageError
from moei_core.hardware.memory import peak_memory, resident_memory
from moei_core.scheduler import PrefetchStatistics


@dataclass(slots=True)
class TurnReport:
    """What one turn was and cost; complete once the turn has ended, valid so far while it runs.

    cache: lookups in RAM; device: those in a device's memory before, if there is one. prefetch: into RAM;
    device_prefetch: into a device's memory. verdict: of the controller of prefetching, at the end.
    finish_reason: ``stop`` (the model ended it), ``stop-string``, ``length``, ``context`` or ``interrupted``.
    """

    prompt_tokens: int
    reused_tokens: int
    context: int
    new_tokens: int = 0
    finish_reason: str = ""
    times: GenerationTimes = field(default_factory=GenerationTimes)
    total_s: float = 0.0
    cache: CacheStatistics = field(default_factory=CacheStatistics)
    runtime: RuntimeStatistics = field(default_factory=RuntimeStatistics)
    prefetch: PrefetchStatistics = field(default_factory=PrefetchStatistics)
    device: CacheStatistics | None = None
    device_prefetch: PrefetchStatistics = field(default_factory=PrefetchStatistics)
    verdict: str = ""

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first; 0 for a reply of one token."""
        count = len(self.times.token_s)
        spent = self.times.decode_s + self.times.sampling_s
        return count / spent if count else 0.0

    @property
    def stall_share(self) -> float:
        """Share of the turn's time in which computing waited for experts."""
        return self.runtime.stall_s / self.total_s if self.total_s else 0.0

    @property
    def time_split(self) -> dict[str, float]:
        """Seconds by what they were spent on."""
        return time_split(self.times, self.runtime, self.total_s)

    @property
    def prefetch_shares(self) -> dict[str, float]:
        """Coverage, waste and lateness of prefetching into RAM."""
        return prefetch_shares(self.prefetch, self.cache.misses)

    @property
    def device_coverage(self) -> float:
        """Share of what a device lacked that had been prefetched to it."""
        useful = self.device_prefetch.useful
        lacked = useful + (self.device.misses if self.device is not None else 0)
        return useful / lacked if lacked else 0.0

    @property
    def decode_shares(self) -> tuple[float, float, float]:
        """Of the time after the first token, as the function of that name."""
        return decode_shares(self.times, self.runtime)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "context": self.context,
            "ttft_s": round(self.times.prefill_s, 4),
            "prefill_tokens": self.times.prefilled_tokens,
            "decode_s": round(self.times.decode_s, 4),
            "decode_tokens_per_s": round(self.decode_tokens_per_s, 3),
            "sampling_s": round(self.times.sampling_s, 4),
            "hits": self.cache.hits,
            "misses": self.cache.misses,
            "hit_rate": round(self.cache.hit_rate, 4),
            "evictions": self.cache.evictions,
            "loads": self.runtime.loads,
            "bytes_read": self.runtime.bytes_read,
            "stall_s": round(self.runtime.stall_s, 4),
            "stall_share": round(self.stall_share, 4),
            "total_s": round(self.total_s, 4),
            "time_split_s": {name: round(seconds, 4) for name, seconds in self.time_split.items()},
            "token_s": percentiles(self.times.token_s),
            "prefetch": asdict(self.prefetch)
            | {"bytes": self.runtime.bytes_prefetched}
            | {name: round(share, 4) for name, share in self.prefetch_shares.items()}
            | {"verdict": self.verdict},
            "device": None
            if self.device is None
            else asdict(self.device)
            | {
                "hit_rate": round(self.device.hit_rate, 4),
                "copies": self.runtime.copies,
                "promotions": self.runtime.promotions,
                "bytes_copied": self.runtime.bytes_copied,
                "wait_s": round(self.runtime.device_wait_s, 4),
                "link_s": round(self.runtime.link_s, 4),
                "prefetch": {
                    "started": self.device_prefetch.started,
                    "useful": self.device_prefetch.useful,
                    "wasted": self.device_prefetch.wasted,
                    "copied": self.runtime.copies_ahead,
                    "late": self.runtime.copies_late,
                    "coverage": round(self.device_coverage, 4),
                },
            },
            "memory_bytes": resident_memory(),
            "peak_memory_bytes": peak_memory(),
        }


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How far the reading of a prompt is. tokens: of the prompt, those not known from before. share: of the work, up to
    1. seconds since it began; stall_s of them waiting for experts, of which nbytes were read."""

    tokens: int
    share: float
    seconds: float
    stall_s: float
    nbytes: int

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None while that says nothing."""
        return self.seconds * (1 / self.share - 1) if self.share > 0.02 else None


class ChatSession:
    """Messages, their key-value cache, and the settings of the next reply."""

    def __init__(self, model: LoadedModel, settings: GenerationSettings, system: str | None = None) -> None:
        self.model = model
        self.settings = settings
        self._thinking: bool | None = None
        self.messages: list[dict[str, str]] = []
        self.report: TurnReport | None = None
        self._system = system
        self._cache = ConversationCache(model.adapter.config, model.context)
        self._stop = False
        self._prompt_began: tuple[float, RuntimeStatistics] | None = None
        self.clear()

    @property
    def thinking(self) -> bool | None:
        """Whether the model shall think before it answers; None: as it likes. Raises, set to another value: UsageError
        where the model's chat template has no switch."""
        return self._thinking

    @thinking.setter
    def thinking(self, wanted: bool | None) -> None:
        if wanted is not None and not thinking_switches(self.model.tokenizer.chat_template or ""):
            raise UsageError(
                "This model's thinking cannot be switched.",
                "Its chat template has no variable for that.",
                "Leave it as it is: without --think and --no-think, or /set thinking auto.",
            )
        self._thinking = wanted

    def clear(self) -> None:
        """Start a new conversation; the system message stays."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._cache.clear()

    @property
    def _talked(self) -> bool:
        """Whether there was a turn before."""
        return any(message["role"] == "user" for message in self.messages)

    def count_prompt(self, text: str) -> int:
        """Tokens of the prompt that ``reply(text)`` would read, those known from before included."""
        return len(self._prompt([*self.messages, {"role": "user", "content": text}]))

    def stop(self) -> None:
        """End the reply in progress before its next token. Safe to call from a signal handler."""
        self._stop = True

    def reply(self, text: str) -> Iterator[TextPiece]:
        """Ask ``text`` and yield the reply as it comes.

        The turn joins ``messages`` when it ends, also when it was stopped after its first token. If it raises,
        the conversation is as it was before. Raises: InterruptedTurnError, ExpertReadError, UsageError.
        """
        # First of all: to make tokens of a long text takes a second, in which it may be stopped, too.
        self._stop = False
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        if not prompt:
            raise UsageError("There is nothing to answer.")
        if len(prompt) >= self.model.context:
            way_out = "Begin a new conversation" if self._talked else "Shorten it"
            if self.model.context < self.model.longest_context:
                way_out += ", or run with a larger --context"
            raise UsageError(
                "The conversation is longer than its context.",
                f"It has {len(prompt)} tokens, and {self.model.context} is the limit.",
                f"{way_out}.",
            )
        started = time.perf_counter()
        report = TurnReport(len(prompt), self._cache.reuse_prefix(prompt), self.model.context)
        self.report = report
        cache_before = replace(self.model.scheduler.statistics)
        runtime_before = self.model.runtime.snapshot()
        prefetch_before = replace(self.model.scheduler.prefetch_statistics)
        device = self.model.device_statistics
        device_before = None if device is None else replace(device)
        ahead_before = replace(self.model.device_prefetch_statistics)

        def account() -> None:
            report.total_s += max(0.0, time.perf_counter() - started)
            report.cache = self.model.scheduler.statistics.minus(cache_before)
            report.runtime = self.model.runtime.statistics.minus(runtime_before)
            report.prefetch = self.model.scheduler.prefetch_statistics.minus(prefetch_before)
            report.verdict = prefetch_verdict(self.model.scheduler)
            if device is not None and device_before is not None:
                report.device = device.minus(device_before)
                report.device_prefetch = self.model.device_prefetch_statistics.minus(ahead_before)

        answer: list[str] = []
        self._prompt_began = started, runtime_before
        self.model.runtime.request_start()
        try:
            for piece in self._generate(prompt, report):
                if not piece.thinking:
                    answer.append(piece.text)
                account()
                # What the reader of the pieces does with them is not the turn's time.
                started = math.inf
                yield piece
                started = time.perf_counter()
        finally:
            self._prompt_began = None
            self.model.runtime.request_end()
            account()
            self.model.runtime.note_times(report.time_split)
        self.messages = [*messages, {"role": "assistant", "content": "".join(answer).strip()}]

    def prompt_progress(self) -> PromptProgress | None:
        """How far the prompt of the turn under way is read; may be asked from another thread. None before and after."""
        report, began = self.report, self._prompt_began
        if report is None or began is None or report.new_tokens:
            return None
        started, before = began
        tokens, times = report.prompt_tokens - report.reused_tokens, report.times
        layers = len(self.model.spec.num_experts) * -(-tokens // self.model.budget.prefill_chunk)
        work = self.model.runtime.statistics
        return PromptProgress(
            tokens,
            # A layer counts when it is over; the last one and the head are the rest.
            min(1.0, max(0, times.prefill_layers - 1) / layers),
            time.perf_counter() - started,
            work.stall_s - before.stall_s,
            work.bytes_read - before.bytes_read,
        )

    def _generate(self, prompt: list[int], report: TurnReport) -> Iterator[TextPiece]:
        tokenizer, settings = self.model.tokenizer, self.settings
        end_tokens = self.model.end_tokens()
        tail = tokenizer.decode(prompt[-8:], skip_special_tokens=False)
        stream = TextStream(
            tokenizer.backend_tokenizer,
            thinking_markers(tokenizer.chat_template or ""),
            tokenizer.all_special_tokens,
            settings.stop,
            tail,
        )
        model = self.model
        generator = Generator(
            model.adapter.model,
            model.runtime,
            self._cache,
            lambda: self._stop,
            model.budget.prefill_chunk,
            model.graphs,
        )
        report.finish_reason = "interrupted"
        for token in generator.tokens(prompt, settings, end_tokens, report.times, self.model.context):
            report.new_tokens += 1
            if token in end_tokens:
                report.finish_reason = "stop"
                break
            yield from stream.feed(token)
            if stream.stopped:
                report.finish_reason = "stop-string"
                break
        else:
            if report.new_tokens == settings.max_new_tokens:
                report.finish_reason = "length"
            elif report.prompt_tokens + report.new_tokens >= self.model.context:
                report.finish_reason = "context"
        yield from stream.finish()

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            # A base model: it continues the text of the conversation.
            text = "\n".join(message["content"] for message in messages)
            return list(tokenizer(text)["input_ids"])
        extra = {}
        if self._thinking is not None:
            extra = dict.fromkeys(thinking_switches(tokenizer.chat_template), self._thinking)
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, **extra
            )
        except Exception as error:
            # Templates raise whatever they like, most often for roles they do not know.
            raise UsageError(
                "The model's chat template refuses this conversation.",
                " ".join(str(error).split()) or type(error).__name__,
                f"Try again without a system message{', or in a new conversation' if self._talked else ''}.",
            ) from error
        return list(encoded["input_ids"])
