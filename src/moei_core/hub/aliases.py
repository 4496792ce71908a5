"""Short names of well-known models. The facts are in ``aliases.toml`` beside this file."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name and what is known about the model before anything is downloaded.

    gb: size of the published weights in 10^9 bytes. layers: decoder layers that have routed experts.
    """

    name: str
    repo: str
    context: int
    gb: float
    format: str
    layers: int
    experts: int
    top_k: int
    licence: str

    @property
    def shape(self) -> str:
        """``layers x experts x top-k``, as in ``32 x 8 x top-2``."""
        return f"{self.layers} x {self.experts} x top-{self.top_k}"


@cache
def aliases() -> Mapping[str, Alias]:
    """All aliases by name."""
    text = resources.files(__package__).joinpath("aliases.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: Alias(name=name, **facts) for name, facts in tomllib.loads(text).items()})


def find_alias(text: str) -> Alias | None:
    """The alias called ``text`` (case does not matter), or of the repository ``text``."""
    wanted = text.lower()
    if (alias := aliases().get(wanted)) is not None:
        return alias
    return next((alias for alias in aliases().values() if alias.repo.lower() == wanted), None)


def near_matches(text: str, others: Iterable[str] = ()) -> list[str]:
    """Up to three known names that look like ``text``, the closest first."""
    known = {
        name.lower(): name for name in (*aliases(), *(alias.repo for alias in aliases().values()), *others)
    }
    wanted = text.lower()
    # People leave out the end of a name more often than they mistype it: `mixtral`, `gpt-oss`.
    starts = [known[name] for name in known if len(wanted) >= 3 and name.startswith(wanted)]
    close = [known[name] for name in difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)]
    return list(dict.fromkeys([*starts, *close]))[:3]
