"""The model that was used last, so that ``moei chat`` alone goes on with it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from moei_core.errors import MoeiError
from moei_core.hub.resolve import ModelFiles, resolve_model
from moei_core.paths import state_dir


def remember(files: ModelFiles) -> None:
    """Note the model; a home that cannot be written is no reason not to chat."""
    name = str(files.folder) if files.source == "folder" else files.name
    if files.source == "gguf":
        name = str(Path(files.name).expanduser().absolute())
    # A path that is no text is not noted.
    with contextlib.suppress(OSError, UnicodeEncodeError):
        state_dir().mkdir(parents=True, exist_ok=True)
        (state_dir() / "last-model").write_text(f"{name}\n", encoding="utf-8")


def recall() -> ModelFiles | None:
    """The model used last, if there is one and it is still there."""
    with contextlib.suppress(OSError, UnicodeDecodeError, MoeiError):
        return resolve_model((state_dir() / "last-model").read_text(encoding="utf-8").strip())
    return None
