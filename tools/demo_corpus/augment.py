"""Makes written questions look like typed ones: framings, synonyms, dropped words, noise and typos."""

from __future__ import annotations

import random

from .grammar import read_slots

_SYNONYMS = [
    "big large huge giant great sizeable",
    "biggest largest greatest hugest",
    "small little tiny mini",
    "fast quick rapid speedy swift",
    "fastest quickest swiftest speediest",
    "which what",
    "show display print reveal present",
    "shows displays prints reveals presents",
    "make create produce build",
    "makes creates produces builds",
    "made created produced built",
    "start begin launch commence",
    "begin start commence",
    "end finish stop conclude",
    "delete remove erase drop discard",
    "removes erases discards drops deletes throws",
    "get obtain fetch receive acquire",
    "use employ utilise need apply",
    "used employed utilised applied needed",
    "uses employs utilises applies needs",
    "work function operate run",
    "works functions operates runs",
    "store keep save hold",
    "stored kept saved held",
    "explain describe clarify outline detail",
    "tell inform say",
    "purpose goal aim point role",
    "called named termed known",
    "name title term label",
    "country nation land state",
    "city town metropolis place",
    "animal creature beast critter species",
    "animals creatures beasts species",
    "baby young newborn infant offspring",
    "wrote composed authored penned created",
    "composed wrote created authored",
    "composer author writer creator musician",
    "invented created developed devised designed",
    "discovered found identified detected",
    "happened occurred",
    "happen occur",
    "number count amount total",
    "player athlete sportsman",
    "players athletes people persons members",
    "team side squad",
    "live dwell reside stay",
    "eat consume devour",
    "model network checkpoint",
    "models networks checkpoints",
    "command instruction subcommand",
    "computer machine PC laptop device",
    "memory RAM",
    "disk drive storage",
    "question query",
    "mean signify denote imply",
    "difference distinction contrast",
    "choose select pick decide",
    "chosen selected picked decided",
    "decides determines selects picks chooses",
    "symbol abbreviation sign notation",
    "world globe planet",
    "year date",
    "film movie",
    "biggest largest",
    "ended finished concluded",
    "began started commenced",
    "person human man",
    "people humans persons folks",
    "highest tallest",
    "important relevant essential",
    "require need demand",
    "measure test gauge determine assess",
    "check verify test confirm",
    "instrument device",
    "causes creates brings produces",
    "takes needs requires lasts",
    "take need require last",
    "consist comprise",
    "contains includes holds has",
    "contain include hold have",
    "ingredient component",
    "ingredients components parts",
    "speed pace velocity rate",
    "weights parameters",
    "often frequently regularly",
    "circle orbit",
    "nearest closest",
    "farthest furthest remotest",
    "reason cause",
    "method way approach technique",
    "leader ruler head chief",
    "famous renowned known celebrated",
    "lasts endures runs",
    "dish meal food",
    "cook prepare make",
    "quantise quantize",
    "quantisation quantization",
    "colour color",
    "licence license",
]
SYNONYMS: dict[str, list[str]] = {}
for _line in _SYNONYMS:
    _words = _line.split()
    SYNONYMS.setdefault(_words[0], []).extend(_words[1:])

#: Words that carry little meaning and may be dropped.
FUNCTION_WORDS = frozenset(
    [
        *("a", "an", "the", "is", "are", "was", "were", "do", "does", "did", "of", "in", "on", "to", "for"),
        *("with", "what", "which", "how", "me", "you", "i", "it", "that", "this", "please", "can", "could"),
        *("would", "will", "has", "have", "by", "at", "be", "one", "my", "your", "its", "their", "there"),
    ]
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FRAMES = read_slots("general")


def typo(word: str, rng: random.Random) -> str:
    """The word with one slip of the fingers: a swapped, dropped, doubled or wrong letter."""
    i = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind == 1:
        return word[:i] + word[i + 1 :]
    if kind == 2:
        return word[:i] + word[i] + word[i:]
    return word[:i] + rng.choice(_LETTERS) + word[i + 1 :]


def _vary(words: list[str], rng: random.Random, keep: frozenset[str]) -> list[str]:
    """Synonyms, dropped words, filler words and small changes of order."""
    words = [
        rng.choice(SYNONYMS[w.lower()])
        if w not in keep and w.lower() in SYNONYMS and rng.random() < 0.25
        else w
        for w in words
    ]
    if rng.random() < 0.12:
        short = [w for w in words if w.lower() not in FUNCTION_WORDS]
        words = short or words
    elif rng.random() < 0.3:
        words = [w for w in words if w.lower() not in FUNCTION_WORDS or rng.random() > 0.25] or words
    if len(words) > 4 and rng.random() < 0.1:
        i = rng.randrange(len(words))
        if words[i] not in keep:
            del words[i]
    if rng.random() < 0.35:
        for _ in range(rng.choice((1, 1, 2, 3))):
            kind = "filler" if rng.random() < 0.4 else "common"
            words.insert(rng.randrange(len(words) + 1), rng.choice(_FRAMES[kind]))
    if len(words) > 4 and rng.random() < 0.12:
        cut = rng.randrange(1, len(words))
        words = words[cut:] + words[:cut]
    return words


def phrase(question: str, rng: random.Random, keep: frozenset[str] = frozenset()) -> str:
    """One typed form of a written question; words in `keep` are neither replaced nor dropped nor misspelt."""
    if rng.random() < 0.55 and len(question.split()) > 1:
        question = " ".join(_vary(question.split(), rng, keep))
    if rng.random() < 0.3:
        kind = "before" if rng.random() < 0.6 else "lead"
        question = f"{rng.choice(_FRAMES[kind])} {question}"
    if rng.random() < 0.13:
        question = f"{question}{rng.choice((' ', ', ', ' - '))}{rng.choice(_FRAMES['after'])}"
    if rng.random() < 0.12:
        words = question.split()
        long = [i for i, w in enumerate(words) if len(w) > 3 and w.isalpha() and w not in keep]
        if long:
            i = rng.choice(long)
            words[i] = typo(words[i], rng)
            question = " ".join(words)
    style = rng.random()
    if style < 0.3:
        question = question.lower()
    elif style < 0.34:
        question = question.upper() if len(question) < 40 else question
    elif style < 0.9:
        question = question[:1].upper() + question[1:]
    end = rng.random()
    if end < 0.62:
        question += "?"
    elif end < 0.7:
        question += "."
    elif end < 0.72:
        question += " ?"
    elif end < 0.74:
        question += "!"
    return question
