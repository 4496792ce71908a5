"""Where moei keeps its own files: everything under ``$MOEI_HOME`` if that is set, else the XDG folders.

Model weights are not here: they stay in the Hugging Face cache, shared with other tools. Nothing is created
by asking for a path.
"""

from __future__ import annotations

import os
from pathlib import Path


def _folder(kind: str, xdg_variable: str, xdg_default: str) -> Path:
    home = os.environ.get("MOEI_HOME")
    if home:
        return Path(home).expanduser().absolute() / kind
    xdg = os.environ.get(xdg_variable, "")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(xdg) if Path(xdg).is_absolute() else Path.home() / xdg_default
    return base / "moei"


def data_dir() -> Path:
    """What moei made or must remember: the record of downloads, packed stores."""
    return _folder("data", "XDG_DATA_HOME", ".local/share")


def config_dir() -> Path:
    """Settings that a person writes: ``config.toml``."""
    return _folder("config", "XDG_CONFIG_HOME", ".config")


def state_dir() -> Path:
    """What can be lost without harm but is worth keeping: history, measurements of this machine, forecasts."""
    return _folder("state", "XDG_STATE_HOME", ".local/state")


def cache_dir() -> Path:
    """What can be made again: synthetic models, checksums of what was read, configs of models to plan."""
    return _folder("cache", "XDG_CACHE_HOME", ".cache")
