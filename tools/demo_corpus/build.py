"""Mixes the facts into conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import arithmetic
from .augment import FUNCTION_WORDS, phrase
from .grammar import FACT_TOPICS, TOPICS, Fact, expand, read_blocks, read_facts, read_slots

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are moei-demo, a small demonstration model.",
    "Answer briefly.",
    "You are a helpful assistant. Answer in one or two sentences.",
    "Be polite and correct.",
    "You are a friendly chat bot.",
    "Reply in English.",
    "You answer questions.",
)

#: How often each topic is asked, relative to the others.
WEIGHTS = dict.fromkeys(TOPICS, 1.0) | {
    "moei": 1.5,
    "geography": 1.3,
    "smalltalk": 1.2,
    "arithmetic": 1.6,
    "unknown": 2.6,
}


#: What invented words are made of.
_ONSETS = (
    "",
    *"bcdfghjklmnprstvwz",
    *("bl", "br", "ch", "cr", "dr", "fl", "gr", "pl", "qu", "sh", "st", "th", "tr"),
)
_VOWELS = (*"aeiou", *"aeiou", "ai", "ea", "ee", "ou", "io", "y")
_CODAS = ("", "", "", *"lnrstmxc", "nd", "ng", "ck", "st", "rt", "sh")
_ENDINGS = (
    "",
    "",
    "",
    "s",
    "ing",
    "er",
    "ism",
    "ia",
    "tion",
    "ology",
    "son",
    "ton",
    "um",
    "ist",
    "ly",
    "al",
    "ed",
)


@dataclass
class Turn:
    """A question with its answer; `meaning` numbers what was asked for."""

    topic: str
    question: str
    answer: str
    meaning: int


@dataclass
class Conversation:
    """Turns in order, after an optional system message."""

    turns: list[Turn]
    system: str | None = None


class Corpus:
    """Draws conversations; the same seed gives the same ones."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.facts: dict[str, list[Fact]] = {}
        self.strangers: list[Fact] = []
        for topic in (*FACT_TOPICS, "smalltalk"):
            self.facts[topic], unknown = read_facts(topic)
            self.strangers += unknown
        known = [fact for facts in self.facts.values() for fact in facts]
        self.meaning = {id(fact): i + 1 for i, fact in enumerate(known)}
        #: How many different meanings there are: none known, the facts, the results of sums.
        self.meanings = 1 + len(known) + 200
        self.general = [q for block in read_blocks("general") for q in block.get("Q", [])]
        self.slots = read_slots("unknown")
        self.common = read_slots("general")["common"]
        (self.unknown,) = (b for b in read_blocks("unknown") if "A" in b)

    def question(self, fact: Fact, typed: bool = True) -> str:
        """A way to ask for a fact, with or without the noise of typing."""
        rng = self.rng
        share = len(fact.names) and max(0.35, 1 - len(fact.questions) / 8)
        if fact.names and (not fact.questions or rng.random() < share):
            text = expand(rng.choice(self.general), rng).replace("{x}", expand(rng.choice(fact.names), rng))
        else:
            text = expand(rng.choice(fact.questions), rng).format(*fact.fields)
        if not typed:
            return text
        keep = frozenset(w for f in fact.fields for w in f.split() if w.lower() not in FUNCTION_WORDS)
        return phrase(text, rng, keep)

    def answer(self, fact: Fact) -> str:
        """An answer to a fact's question."""
        return (
            self.rng.choice(fact.answers).format(*fact.fields)
            if fact.fields != [""]
            else self.rng.choice(fact.answers)
        )

    def stranger(self) -> str:
        """A question that the model cannot answer."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.2:
            text = expand(rng.choice(self.general), rng).replace("{x}", self.strange_thing())
        elif kind < 0.4:
            fact = rng.choice(self.strangers)
            fields = fact.fields if rng.random() < 0.7 else [self.invented_word()]
            text = expand(rng.choice(fact.questions), rng).format(*fields)
        else:
            text = expand(rng.choice(self.unknown["Q"]), rng)
            while "{" in text:
                start, end = text.index("{"), text.index("}")
                text = text[:start] + rng.choice(self.slots[text[start + 1 : end]]) + text[end + 1 :]
        return phrase(text, rng)

    def strange_thing(self) -> str:
        """The name of something that the model knows nothing about."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(self.slots[rng.choice(("subject", "person", "work", "event", "place"))])
        if kind < 0.75:
            return self.invented_word()
        return " ".join(rng.sample(self.common, rng.choice((1, 1, 2))))

    def invented_word(self) -> str:
        """A word or name that does not exist, so that words never met are taken for what they are."""
        rng = self.rng
        parts = [
            rng.choice(kind) for _ in range(rng.choice((1, 2, 2, 3))) for kind in (_ONSETS, _VOWELS, _CODAS)
        ]
        word = "".join(parts) + rng.choice(_ENDINGS)
        return word.capitalize() if rng.random() < 0.4 else word

    def turn(self, topic: str) -> Turn:
        """A question on a topic with its answer."""
        rng = self.rng
        if topic == "arithmetic":
            sum_ = arithmetic.draw(rng)
            text, result = arithmetic.question(*sum_, rng), arithmetic.solve(*sum_)
            return Turn(topic, text, arithmetic.answer(*sum_), self.meanings - 1 - result)
        if topic == "unknown":
            return Turn(topic, self.stranger(), rng.choice(self.unknown["A"]), 0)
        fact = rng.choice(self.facts[topic])
        return Turn(topic, self.question(fact), self.answer(fact), self.meaning[id(fact)])

    def conversation(self, length: int | None = None) -> Conversation:
        """A conversation of mostly one to three turns, within a topic or across topics."""
        rng = self.rng
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        if length is None:
            length = rng.choices((1, 2, 3, 5, 8), (62, 18, 13, 5, 2))[0]
        topic = rng.choices(names, weights)[0]
        turns = []
        for _ in range(length):
            turns.append(self.turn(topic))
            if rng.random() < 0.5:
                topic = rng.choices(names, weights)[0]
        return Conversation(turns, rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.12 else None)

    def conversations(self, count: int, easy: float = 0.0) -> Iterator[Conversation]:
        """That many conversations, of which the first share, `easy`, are single questions."""
        for i in range(count):
            yield self.conversation(1 if i < easy * count else None)
