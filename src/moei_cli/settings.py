"""What a person has set: by a flag, else by a ``MOEI_*`` variable, else in ``config.toml``, else automatic.

``config.toml`` (in ``$MOEI_HOME/config`` or ``~/.config/moei``) holds the names of ``SETTINGS`` and nothing else, for
example ``ram = "8GiB"``; the variables are their upper-case names after ``MOEI_``. Models decide the rest.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moei_cli.device_options import check_device, check_misses
from moei_cli.prefetch_options import parse_predictor, parse_prefetch
from moei_core.cache.policies import live_policy
from moei_core.config import ExpertBudget, parse_size
from moei_core.errors import MoeiError, UsageError
from moei_core.paths import config_dir


def _context(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{where}: '{text}' is not a number of tokens.", hint="For example: 4096")
    if int(text) < 16:
        raise UsageError(f"{where}: {text} tokens are too few.", hint="16 tokens at least.")
    return int(text)


def _policy(text: str, where: str) -> str:
    live_policy(text, where)
    return text


SETTINGS: dict[str, Callable[[str, str], object]] = {
    "ram": parse_size,
    "experts": ExpertBudget.parse,
    "context": _context,
    "policy": _policy,
    "predictor": partial(parse_predictor, live=True),
    "prefetch": parse_prefetch,
    "device": check_device,
    "vram": parse_size,
    "misses": check_misses,
}
"""Each with what reads its text; the second argument says where the text comes from."""

_OTHER_VARIABLES = frozenset({"MOEI_HOME", "MOEI_NATIVE_ISA", "MOEI_SYNTHETIC_LIMIT"})


@dataclass(frozen=True, slots=True)
class Setting:
    """One value. text: as written, None if automatic. origin: the flag, the variable, the file, or ``automatic``.
    value: what the text stands for, None if automatic."""

    text: str | None
    origin: str
    value: Any = None


AUTOMATIC = Setting(None, "automatic")


def config_path() -> Path:
    """Where the settings file is, if there is one."""
    return config_dir() / "config.toml"


def resolve(**flags: object) -> dict[str, Setting]:
    """Each of ``flags`` (names of ``SETTINGS``; None if not given) and where its value comes from.

    Raises: UsageError that names the flag, the variable, or the file and the key, for what means nothing.
    """
    _refuse_unknown_variables()
    written = _read_config(config_path())
    found = {}
    for name, flag in flags.items():
        variable = f"MOEI_{name.upper()}"
        if flag is not None:
            if not str(flag).strip():
                # Of a script's --ram "$RAM", say: a bound that got lost must not become none.
                raise UsageError(f"--{name} is empty.", hint="Give it a value, or leave it out.")
            found[name] = _setting(name, str(flag), f"--{name}")
        elif os.environ.get(variable):
            found[name] = _setting(name, os.environ[variable], variable)
        else:
            found[name] = written.get(name, AUTOMATIC)
    return found


def resolve_all(**flags: object) -> dict[str, Setting]:
    """As ``resolve``, of all ``SETTINGS``."""
    return resolve(**dict.fromkeys(SETTINGS) | flags)


@contextmanager
def naming_origins(chosen: Mapping[str, Setting]) -> Iterator[None]:
    """An error that speaks of a flag says so where nobody gave that flag: a variable or the file set it."""
    try:
        yield
    except MoeiError as error:
        for name, one in chosen.items():
            if one.text is not None and one.origin != f"--{name}" and f"--{name}" in str(error):
                error.hint = f"{error.hint} {one.origin} sets {name} to {one.text}.".strip()
        raise


def _refuse_unknown_variables() -> None:
    """A mistyped variable would be ignored in silence."""
    known = {f"MOEI_{name.upper()}" for name in SETTINGS} | _OTHER_VARIABLES
    for variable in sorted(os.environ):
        if variable.startswith("MOEI_") and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1) or sorted(known)
            raise UsageError(
                f"{variable} means nothing to moei.", hint=f"Unset it, or set {', '.join(near)} instead."
            )


def _read_config(path: Path) -> dict[str, Setting]:
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read.", f"{error}.", "Correct it, or delete it.") from None
    found = {}
    for name, value in content.items():
        where = f"{path}: {name}"
        if name not in SETTINGS:
            raise UsageError(f"{where} is no setting.", hint=f"There are: {', '.join(SETTINGS)}.")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UsageError(
                f"{where} = {value} is neither a text nor a number.", hint='For example: ram = "8GiB"'
            )
        found[name] = replace(_setting(name, str(value), where), origin=str(path))
    return found


def _setting(name: str, text: str, origin: str) -> Setting:
    return Setting(text, origin, SETTINGS[name](text, origin))
