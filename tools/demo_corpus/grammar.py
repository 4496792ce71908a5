"""Reads the plain-text fact files and expands their question patterns.

A file holds blocks separated by blank lines. The lines of a block start with

- `Q:` a question pattern, where `(a|b|)` offers alternatives, which may nest;
- `D:` a pattern for the name of a thing, to be put into the general patterns of `general.txt`;
- `A:` an answer (`\\n` is a line break); one of several is drawn at random;
- `R:` a row of a table, fields separated by ` | `, for `{0}`, `{1}` ... in questions and answers;
- `N:` entities, separated by `;`, that could stand in the table but are not known to the model;
- `S:` a named slot and its values, for `{name}` in questions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent

#: Topics in which the model answers with facts.
FACT_TOPICS = (
    "moei",
    "moe",
    "caching",
    "quantisation",
    "geography",
    "animals",
    "astronomy",
    "chemistry",
    "history",
    "music",
    "food",
    "sport",
)
#: All topics, with the ones that have no fixed facts.
TOPICS = (*FACT_TOPICS, "smalltalk", "arithmetic", "unknown")

_INNER = re.compile(r"\(([^()]*)\)")


@dataclass
class Fact:
    """One thing the model knows: the ways to ask for it and the ways to answer."""

    topic: str
    questions: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)


def expand(pattern: str, rng: random.Random) -> str:
    """One random expansion of a pattern with (nested) alternatives."""
    while True:
        match = _INNER.search(pattern)
        if match is None:
            return " ".join(pattern.split())
        pattern = pattern[: match.start()] + rng.choice(match.group(1).split("|")) + pattern[match.end() :]


def split_top(pattern: str) -> list[str]:
    """Splits a pattern at the bars that are not inside parentheses."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(pattern):
        depth += (c == "(") - (c == ")")
        if c == "|" and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
    return [*parts, pattern[start:]]


def read_blocks(name: str) -> list[dict[str, list[str]]]:
    """The blocks of a data file, each as a mapping from line kind to lines."""
    blocks = []
    text = (HERE / f"{name}.txt").read_text(encoding="utf-8")
    for chunk in re.split(r"\n\s*\n", text):
        block: dict[str, list[str]] = {}
        for line in chunk.splitlines():
            if line and not line.startswith("#"):
                kind, value = line[0], line[2:].strip()
                if line[1] != ":" or kind not in "QDARNS":
                    raise ValueError(f"{name}.txt: cannot read {line!r}")
                block.setdefault(kind, []).append(value)
        if block:
            blocks.append(block)
    return blocks


def read_facts(topic: str) -> tuple[list[Fact], list[Fact]]:
    """The facts of a topic, and the tables' unknown entities as facts of the topic `unknown`."""
    facts, unknown = [], []
    for block in read_blocks(topic):
        if "A" not in block:
            continue
        questions, answers = block.get("Q", []), [a.replace("\\n", "\n") for a in block["A"]]
        names = [part for line in block.get("D", []) for part in split_top(line)]
        for row in block.get("R", []) or [""]:
            facts.append(Fact(topic, questions, names, answers, [f.strip() for f in row.split(" | ")]))
        for name in [n for line in block.get("N", []) for n in line.split(";")]:
            unknown.append(Fact("unknown", questions, [], [], [name.strip()]))
    return facts, unknown


def read_slots(name: str) -> dict[str, list[str]]:
    """The named slots of a data file."""
    slots = {}
    for block in read_blocks(name):
        for line in block.get("S", []):
            key, values = line.split(" | ")
            slots[key] = [v.strip() for v in values.split(";")]
    return slots
