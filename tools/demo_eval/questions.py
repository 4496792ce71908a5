"""Held-out questions, their overlap with the training text, and a nearest-neighbour baseline."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_WORD = re.compile(r"[a-z0-9']+")


@dataclass(frozen=True)
class Held:
    """A question with the strings of which an answer must contain one."""

    topic: str
    question: str
    accepted: tuple[str, ...]

    def correct(self, answer: str) -> bool:
        """Whether the answer contains an accepted string as whole words, in any case."""
        return any(
            re.search(rf"(?<![a-z0-9]){re.escape(a)}(?![a-z0-9])", answer, re.IGNORECASE)
            for a in self.accepted
        )


def read_held(name: str = "heldout") -> list[Held]:
    """The questions of a `.tsv` file: topic, question, accepted strings separated by bars."""
    rows = [line.split("\t") for line in (HERE / f"{name}.tsv").read_text(encoding="utf-8").splitlines()]
    return [Held(topic, question, tuple(accepted.split("|"))) for topic, question, accepted in rows]


def read_out_of_scope() -> list[str]:
    """Questions that the model should say it cannot answer."""
    return (HERE / "out_of_scope.txt").read_text(encoding="utf-8").splitlines()


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return _WORD.findall(text.lower())


def overlaps(held: Iterable[str], trained: Iterable[str], length: int = 5) -> dict[str, str]:
    """The held-out questions that share `length` consecutive words with training, and those words."""
    wanted = {}
    for question in held:
        w = words(question)
        for i in range(len(w) - length + 1):
            wanted[tuple(w[i : i + length])] = question
    found = {}
    for text in trained:
        w = words(text)
        for i in range(len(w) - length + 1):
            gram = tuple(w[i : i + length])
            if gram in wanted:
                found[wanted[gram]] = " ".join(gram)
    return found


class NearestNeighbour:
    """Answers with the answer of the training question nearest by TF-IDF cosine."""

    def __init__(self, questions: list[str], answers: list[str]):
        self.answers = answers
        counts = [Counter(words(q)) for q in questions]
        seen = Counter(w for c in counts for w in c)
        self.idf = {w: math.log(len(counts) / n) + 1e-6 for w, n in seen.items()}
        self.index: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, c in enumerate(counts):
            vector = {w: n * self.idf[w] for w, n in c.items()}
            size = math.sqrt(sum(v * v for v in vector.values())) or 1.0
            for w, v in vector.items():
                self.index[w].append((i, v / size))

    def answer(self, question: str) -> str:
        """The nearest question's answer, or nothing if no word is shared."""
        score: dict[int, float] = defaultdict(float)
        for w, n in Counter(words(question)).items():
            for i, v in self.index.get(w, ()):
                score[i] += n * self.idf[w] * v
        return self.answers[max(score, key=score.__getitem__)] if score else ""
