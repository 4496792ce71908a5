"""The commands, in the order of ``moei --help``. Each file has ``register(app)`` and imports late."""

from __future__ import annotations

from collections.abc import Callable

import typer

from moei_cli.commands import (
    bench,
    chat,
    list_models,
    plan,
    profile_hardware,
    pull,
    quantize,
    rm,
    show,
    trace,
)

COMMANDS: list[Callable[[typer.Typer], None]] = [
    chat.register,
    pull.register,
    quantize.register,
    list_models.register,
    show.register,
    rm.register,
    plan.register,
    profile_hardware.register,
    bench.register,
    trace.register,
]
