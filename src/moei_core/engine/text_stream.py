"""From tokens to text while they come: partial characters, stop strings, and thinking told from the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateError, meta
from tokenizers.decoders import DecodeStream


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of a reply. ``thinking``: reasoning that precedes the answer and is not part of it."""

    text: str
    thinking: bool = False


_THINK = {"<think>": True, "</think>": False}
_HARMONY = {
    "<|channel|>analysis<|message|>": True,
    "<|channel|>commentary<|message|>": True,
    "<|channel|>final<|message|>": False,
    "<|start|>assistant": None,
}
"""Marker to the state after it: thinking, answering, or None for unchanged. Markers are never shown."""


def thinking_markers(chat_template: str) -> dict[str, bool | None]:
    """The markers with which models of this chat template separate thinking from the answer."""
    if "<|channel|>" in chat_template:
        return dict(_HARMONY)
    return dict(_THINK) if "</think>" in chat_template else {}


_SWITCHES = ("enable_thinking", "thinking")
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""A tag that transformers adds to the language of chat templates."""


def thinking_switches(chat_template: str) -> tuple[str, ...]:
    """The variables of this chat template that switch thinking on and off; most have none."""
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", chat_template))
    except TemplateError:
        # What transformers can still read may have a switch all the same.
        return tuple(name for name in _SWITCHES[:1] if name in chat_template)
    return tuple(name for name in _SWITCHES if name in meta.find_undeclared_variables(parsed))


class TextStream:
    """Turns the tokens of one reply into text pieces.

    Text is held back only as long as it could still become a marker, a stop string or a whole character.
    """

    def __init__(
        self,
        tokenizer: Any,
        markers: dict[str, bool | None],
        special_tokens: Iterable[str],
        stop: Sequence[str] = (),
        prompt_tail: str = "",
    ) -> None:
        """tokenizer: of the ``tokenizers`` library. special_tokens: texts that are dropped unless they are
        part of a marker. prompt_tail: the end of the prompt, which may already have opened the thinking.
        """
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._stop = tuple(stop)
        self._markers: dict[str, bool | None] = {**dict.fromkeys(special_tokens), **markers}
        self._watched = [*self._markers, *self._stop]
        opened = [marker for marker, inside in markers.items() if inside]
        self._thinking = any(prompt_tail.rstrip().endswith(marker) for marker in opened)
        self._held = ""
        self._after_marker = self._thinking
        self.stopped = False

    def feed(self, token: int) -> list[TextPiece]:
        """The text that ``token`` completes. After a stop string, ``stopped`` is set and nothing follows."""
        text = self._decoder.step(self._tokenizer, token)
        return self._advance(text, final=False) if text else []

    def finish(self) -> list[TextPiece]:
        """What was held back and turned out to be plain text."""
        return self._advance("", final=True)

    def _advance(self, text: str, final: bool) -> list[TextPiece]:
        pieces: list[TextPiece] = []
        self._held += text
        while not self.stopped:
            found = min(
                (
                    (place, -len(mark), mark)
                    for mark in self._watched
                    if (place := self._held.find(mark)) >= 0
                ),
                default=None,
            )
            if found is None:
                break
            place, _, mark = found
            if not final and self._could_be_longer(place, mark):
                break
            self._emit(pieces, self._held[:place])
            self._held = self._held[place + len(mark) :]
            if mark in self._stop:
                self.stopped, self._held = True, ""
                break
            state = self._markers[mark]
            if state is not None:
                self._thinking, self._after_marker = state, True
        keep = 0 if final else self._undecided()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._emit(pieces, ready)
        return pieces

    def _could_be_longer(self, place: int, mark: str) -> bool:
        """Whether a longer watched text that starts at ``place`` may still be arriving."""
        tail = self._held[place:]
        return any(
            len(other) > len(tail) and other.startswith(tail) for other in self._watched if other != mark
        )

    def _undecided(self) -> int:
        """How many characters at the end are the beginning of something watched."""
        longest = max((len(mark) for mark in self._watched), default=0)
        for count in range(min(len(self._held), longest), 0, -1):
            tail = self._held[-count:]
            if any(mark.startswith(tail) for mark in self._watched):
                return count
        return 0

    def _emit(self, pieces: list[TextPiece], text: str) -> None:
        if self._after_marker:
            # The line breaks around a marker belong to it, not to the text.
            text = text.lstrip("\n")
        if text:
            self._after_marker = False
            pieces.append(TextPiece(text, self._thinking))
