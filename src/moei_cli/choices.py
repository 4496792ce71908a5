"""What an option may say."""

from __future__ import annotations

from typing import TypeVar

from moei_core.errors import UsageError

T = TypeVar("T")


def one_of(text: str, known: dict[str, T], option: str) -> T:
    """What ``text`` stands for. Raises: UsageError that names the choices."""
    if text not in known:
        raise UsageError(f"{option}: there is no '{text}'.", hint=f"Choose from: {', '.join(known)}.")
    return known[text]
