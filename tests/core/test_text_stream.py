"""Tokens to text: whole characters, stop strings, thinking told from the answer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moei_core.engine.text_stream import TextPiece, TextStream, thinking_markers, thinking_switches

ALPHABET = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
SPECIAL = ("<|im_end|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>")


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def stream(
    text: str, template: str = "", stop: tuple[str, ...] = (), tail: str = ""
) -> tuple[list[TextPiece], bool]:
    tokenizer = make_tokenizer()
    out = TextStream(tokenizer, thinking_markers(template), SPECIAL, stop, tail)
    pieces: list[TextPiece] = []
    for token in tokenizer.encode(text).ids:
        pieces += out.feed(token)
        assert all(piece.text and "\ufffd" not in piece.text for piece in pieces)
        if out.stopped:
            break
    return pieces + out.finish(), out.stopped


def joined(pieces: list[TextPiece]) -> tuple[str, str]:
    thinking = "".join(piece.text for piece in pieces if piece.thinking)
    return thinking, "".join(piece.text for piece in pieces if not piece.thinking)


def test_characters_of_several_bytes_come_whole() -> None:
    pieces, _ = stream("naïve — 日本語 🙂")
    assert joined(pieces)[1] == "naïve — 日本語 🙂"
    assert len(pieces) == len("naïve — 日本語 🙂"), "text is not held back without need"


def test_special_tokens_are_not_shown() -> None:
    assert joined(stream("Hello<|im_end|> you")[0]) == ("", "Hello you")


@pytest.mark.parametrize(
    ("text", "shown"), [("one END two", "one "), ("one EN two E", "one EN two E"), ("ENDx", "")]
)
def test_stop_strings(text: str, shown: str) -> None:
    pieces, stopped = stream(text, stop=("END",))
    assert joined(pieces)[1] == shown
    assert stopped == (shown != text)


def test_the_longest_of_two_stop_strings_that_start_alike_wins() -> None:
    assert joined(stream("a\n\nUser: b", stop=("\n\n", "\n\nUser:"))[0])[1] == "a"


def test_thinking_is_told_from_the_answer() -> None:
    template = "{% ... %}</think>"
    assert joined(stream("<think>\nHmm, 2<3.\n</think>\n\nYes.", template)[0]) == ("Hmm, 2<3.\n", "Yes.")
    assert joined(stream("So.\n</think>\n\nYes.", template, tail="<|im_start|>assistant\n<think>\n")[0]) == (
        "So.\n",
        "Yes.",
    )
    assert joined(stream("<think> is a tag", "plain")[0]) == ("", "<think> is a tag")


def test_harmony_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>They greet.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
    )
    assert joined(stream(text, "...<|channel|>...")[0]) == ("They greet.", "Hello!")


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (
            "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}",
            ("enable_thinking",),
        ),
        (
            "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}",
            ("thinking",),
        ),
        (
            "{% for m in messages %}{{ m.thinking }}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
            (),
        ),
        ("{% set thinking = messages %}{{ thinking }}", ()),
        ("{% no_such_tag enable_thinking %}", ("enable_thinking",)),
        ("", ()),
    ],
)
def test_switches_of_thinking_are_variables_of_the_template(template: str, names: tuple[str, ...]) -> None:
    assert thinking_switches(template) == names
