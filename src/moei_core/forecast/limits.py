"""What limits a speed: the largest part of the time, or two where neither is clearly the larger.

Forecast and run split a token's time alike: waiting for experts that are not there, computing experts, the rest, and
with a GPU, waiting for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

DISK, EXPERTS, REST, GPU = "disk", "experts", "rest", "gpu"

SENTENCES = {
    DISK: "waiting for missing experts from disk",
    EXPERTS: "computing the active experts from memory",
    REST: "the dense layers and the framework around them",
    GPU: "the GPU and the link to it",
}

WORDS = {DISK: "disk", EXPERTS: "experts", REST: "dense + framework", GPU: "GPU + link"}
"""The same where there is little room."""

MODEL_ERROR = 0.12
"""How far the closed form itself may be off, beside what is uncertain in its inputs."""

TIE = (1 - MODEL_ERROR) / (1 + MODEL_ERROR)
"""A part of at least this share of the largest may be as large: each may be off by ``MODEL_ERROR``."""


def limits(sizes: Mapping[str, float], others: Iterable[Mapping[str, float]] = ()) -> tuple[str, ...]:
    """The name of the largest of ``sizes``, and of the second if it is nearly as large.

    others: the same parts at the ends of what is uncertain; the second also counts if it is the largest there.
    """
    first, second, *_ = sorted(sizes, key=lambda name: -sizes[name])
    near = sizes[second] >= TIE * sizes[first] > 0
    ahead = any(max(one, key=lambda name: one[name]) == second for one in others)
    return (first, second) if near or ahead else (first,)


def agree(expected: Sequence[str], came: Sequence[str]) -> bool:
    """Whether what limited a run was expected: its limit is one of those named, or their first one of its near ties."""
    return came[0] in expected or expected[0] in came


def in_words(names: Sequence[str], words: Mapping[str, str] = SENTENCES) -> str:
    """One or two limits for people."""
    return " and, about as much, ".join(words[name] for name in names)
