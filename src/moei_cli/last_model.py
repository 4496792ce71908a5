"""The model that was used last, so that ``moei chat`` alone goes on with it."""

from __future__ import annotations

import contextlib

from moei_core.errors import ModelNotFoundError
from moei_core.hub.resolve import ModelFiles, resolve_model
from moei_core.paths import state_dir


def remember(files: ModelFiles) -> None:
    """Note the model; a home that cannot be written is no reason not to chat."""
    name = str(files.folder) if files.source == "folder" else files.name
    with contextlib.suppress(OSError):
        state_dir().mkdir(parents=True, exist_ok=True)
        (state_dir() / "last-model").write_text(f"{name}\n")


def recall() -> ModelFiles | None:
    """The model used last, if there is one and it is still there."""
    with contextlib.suppress(OSError, ModelNotFoundError):
        return resolve_model((state_dir() / "last-model").read_text().strip())
    return None
