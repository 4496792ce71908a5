"""Sizes as people write them, and the frozen settings that the engine is built from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moei_core.errors import UsageError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")


PREFILL_CHUNKS = (2048, 1024, 512, 256)
"""Tokens that one prefill pass may have, see ``hardware.budget.prefill_chunk``."""

PREFILL_CHUNK = PREFILL_CHUNKS[-1]
"""The least of them."""


READERS = 4
"""Chunks read at the same time; a disk reaches its bandwidth at a few megabytes in flight."""

CHUNK_NBYTES = 2 << 20
"""What is read at a time. Larger chunks make a demand load wait longer for a prefetch that has begun."""


DEFAULT_CONTEXT = 4096
"""Tokens of a conversation, or the model's longest if that is less."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How moving and computing share the time. ``FULL_OVERLAP``, except to measure what each part is worth.

    chunk_nbytes: what is read at a time. preempt: a demand load overtakes a prefetch that has begun, at its next
    chunk. reorder: resident experts are computed while others are on their way; without, after them. stream: a
    long prompt reads the next layer's experts ahead.
    """

    chunk_nbytes: int = CHUNK_NBYTES
    preempt: bool = True
    reorder: bool = True
    stream: bool = True


FULL_OVERLAP = Overlap()


def parse_size(text: str, option: str = "size") -> int:
    """Bytes of a size such as ``600MiB``, ``8G`` or ``1.5 GiB``.

    ``MiB``/``GiB`` are powers of 1024, ``MB``/``GB`` and the bare ``M``/``G`` powers of 1000. A plain number
    is bytes.

    Raises: UsageError, naming ``option``.
    """
    match = _SIZE.fullmatch(text)
    if match is None or len(text) > 100:
        raise UsageError(
            f"{option}: '{text}' is not a size.",
            hint="Write a number with a unit, such as 600MiB, 8GiB or 8G.",
        )
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def format_size(nbytes: float) -> str:
    """``nbytes`` for people, in powers of 1024: ``612 MiB``, ``1.5 GiB``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def conversation_tokens(asked: int | None, longest: int | None) -> int:
    """Tokens that a conversation may have. longest: what the model was made for, if it says so.

    Raises: UsageError.
    """
    longest = longest or DEFAULT_CONTEXT
    if asked is not None and not 16 <= asked <= longest:
        raise UsageError(
            f"--context {asked} is out of range.",
            f"This model was made for 16 to {longest} tokens of context.",
        )
    return asked or min(longest, DEFAULT_CONTEXT)


@dataclass(frozen=True, slots=True)
class ExpertBudget:
    """The bound on expert slots: a share of all routed-expert bytes, or bytes. Exactly one is set."""

    fraction: float | None = None
    nbytes: int | None = None

    @classmethod
    def parse(cls, text: str, option: str = "--experts") -> ExpertBudget:
        """``25%`` or ``8GiB``. Raises: UsageError."""
        match = _PERCENT.fullmatch(text)
        if match is None:
            return cls(nbytes=parse_size(text, option))
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise UsageError(
                f"{option}: {text.strip()} is not between 0% and 100%.",
                hint="100% keeps every routed expert in memory; 25% a quarter of them.",
            )
        return cls(fraction=percent / 100)

    def slots(self, total_experts: int, slot_nbytes: int) -> int:
        """How many slots of ``slot_nbytes`` the budget pays for, at most one per expert of the model."""
        if self.fraction is not None:
            # The epsilon keeps 25% of 128 at 32 in spite of binary fractions.
            return min(total_experts, int(self.fraction * total_experts + 1e-9))
        assert self.nbytes is not None
        return min(total_experts, self.nbytes // slot_nbytes)


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How the next token is chosen and when a reply ends.

    temperature: 0 is greedy. top_k 0 and top_p 1 switch these filters off. seed None draws a fresh one.
    stop: strings that end the reply and are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "A reply must have at least 1 token"),
            (0 <= self.temperature <= 100, "The temperature must be between 0 and 100"),
            (
                isinstance(self.top_k, int) and self.top_k >= 0,
                "top-k must be a whole number of at least 0 (0: off)",
            ),
            (0 < self.top_p <= 1, "top-p must be above 0 and at most 1 (1: off)"),
            (0 <= self.min_p < 1, "min-p must be at least 0 and below 1 (0: off)"),
            # Beyond, scores leave what a float holds.
            (
                0.01 <= self.repetition_penalty <= 100,
                "The repetition penalty must be between 0.01 and 100 (1: off)",
            ),
            # What torch's generator takes.
            (
                self.seed is None or -(2**63) <= self.seed < 2**64,
                "The seed must be a number of at most 64 bits",
            ),
            (all(self.stop), "A stop string must not be empty"),
        )
        for fine, sentence in checks:
            if not fine:
                raise UsageError(f"{sentence}.")
