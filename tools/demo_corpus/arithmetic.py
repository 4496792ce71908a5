"""Small sums: addition and subtraction up to twenty and beyond by tens, and the table of multiplication."""

from __future__ import annotations

import random

from .grammar import expand

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_ASK = "what is|what's|how much is|calculate|compute||what does|give me|find|{more}solve|work out"

_FORMS = {
    "+": [
        f"({_ASK.format(more='add up|')}) {{a}} (+|plus|and) {{b}}",
        "{a}+{b}",
        "{a} + {b} =",
        "(what is |)the sum of {a} and {b}",
        "(add|sum) {a} (and|to|plus) {b}",
        "(can you |)add {b} to {a}",
        "(what do I get|what is it|the result) when I add {a} and {b}",
        "I have {a} (apples|books|coins|eggs) and get {b} more, how many do I have( now|)",
        "if you (have|take) {a} and add {b}, what (do you get|is the result)",
        "{a} plus {b}( is| makes| equals| gives| is what|)",
    ],
    "-": [
        f"({_ASK.format(more='')}) {{a}} (-|minus) {{b}}",
        "{a}-{b}",
        "{a} - {b} =",
        "(what is |)the difference (between|of) {a} and {b}",
        "(subtract|take|take away) {b} from {a}",
        "(what (is left|remains)|how much is left) (when|if) (I|you) (take|subtract|remove) {b} from {a}",
        "I have {a} (apples|books|coins|eggs) and (eat|lose|give away|sell) {b}, "
        "how many (are left|do I have|remain)",
        "{a} (take away|less|minus) {b}( is| makes| equals| gives|)",
    ],
    "*": [
        f"({_ASK.format(more='')}) {{a}} (*|x|times|multiplied by) {{b}}",
        "{a}*{b}",
        "{a}x{b}",
        "{a} * {b} =",
        "(what is |)the product of {a} and {b}",
        "multiply {a} (by|with|and) {b}",
        "{a} (boxes|bags|rows) (with|of) {b} (apples|books|coins|eggs)( each|), "
        "how many( in all| altogether|)",
        "{a} times {b}( is| makes| equals| gives| is what|)",
    ],
}


def draw(rng: random.Random) -> tuple[str, int, int]:
    """An operation with two numbers in the range that the model is taught."""
    op = rng.choice("+-*")
    if op == "*":
        top = 9 if rng.random() < 0.7 else 12
        a, b = rng.randint(0, top), rng.randint(0, top)
    elif rng.random() < 0.85:
        top = 10 if rng.random() < 0.65 else 20
        a, b = rng.randint(0, top), rng.randint(0, top)
    elif rng.random() < 0.5:
        a, b = rng.randint(10, 89), rng.randint(1, 9)
    else:
        a, b = 10 * rng.randint(1, 9), 10 * rng.randint(1, 9)
    return (op, max(a, b), min(a, b)) if op == "-" else (op, a, b)


def solve(op: str, a: int, b: int) -> int:
    """The result."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def question(op: str, a: int, b: int, rng: random.Random) -> str:
    """One way to ask for the result."""
    spell = rng.random() < 0.2

    def write(n: int) -> str:
        return _ONES[n] if spell and n <= 20 else str(n)

    text = expand(rng.choice(_FORMS[op]), rng).format(a=write(a), b=write(b))
    style = rng.random()
    if style < 0.4:
        text = text[:1].upper() + text[1:]
    return text + (rng.choice(("?", "?", ".", "")) if style < 0.7 and not text.endswith("=") else "")


def answer(op: str, a: int, b: int) -> str:
    """The answer in digits."""
    return f"{a} {op} {b} = {solve(op, a, b)}"
