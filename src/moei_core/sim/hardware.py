"""The machine that the simulator's clock stands for: compute speed, links, memory tiers."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moei_core.config import parse_size
from moei_core.errors import ModelNotFoundError, UsageError


@dataclass(frozen=True, slots=True)
class Hardware:
    """One compute lane and serial links disk -> RAM -> VRAM. Bandwidths in bytes a second, times in seconds.

    memory_bandwidth: of the memory that experts are computed from. dense_seconds: all of a layer but its
    experts, for one token. disk_*, link_*: a load's fixed latency and its bandwidth (the disk's latency passes while
    others are read, a copy's does not); link_bandwidth 0: there is no GPU, experts are computed where the disk
    delivers them. chunk_nbytes: the piece of a transfer that a demand load must wait for. ram_nbytes: experts that
    RAM keeps beside those in VRAM. batch_tokens: tokens that an expert serves before its arithmetic takes longer than
    reading its weights.
    """

    name: str = "custom"
    memory_bandwidth: float = 20e9
    dense_seconds: float = 0.7e-3
    disk_bandwidth: float = 1e9
    disk_latency: float = 100e-6
    link_bandwidth: float = 0.0
    link_latency: float = 20e-6
    chunk_nbytes: int = 2 << 20
    ram_nbytes: int = 0
    batch_tokens: int = 16

    @property
    def has_gpu(self) -> bool:
        return self.link_bandwidth > 0


PRESETS = {
    "gpu-pcie4": Hardware(
        name="gpu-pcie4",
        memory_bandwidth=280e9,
        dense_seconds=0.25e-3,
        disk_bandwidth=3.5e9,
        link_bandwidth=24e9,
        ram_nbytes=32 << 30,
        batch_tokens=64,
    ),
    "disk-1g": Hardware(name="disk-1g"),
}
"""An 8 GB GPU on PCIe 4 with the experts in RAM; a laptop without a GPU whose disk reads 1 GB/s."""

_SIZES = {"chunk_nbytes", "ram_nbytes"}


def load_hardware(name_or_path: str) -> Hardware:
    """A preset by name, or a JSON or TOML file whose keys are fields of ``Hardware`` (sizes may be text).

    Raises: UsageError for unknown keys or impossible values; ModelNotFoundError if there is no such file.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ModelNotFoundError(
            f"--hardware: there is no file {path}.", hint=f"Presets: {', '.join(PRESETS)}."
        )
    try:
        text = path.read_text()
        values: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"--hardware: {path} is neither JSON nor TOML.", str(error)) from None
    known = {field.name for field in fields(Hardware)}
    if not isinstance(values, dict) or not set(values) <= known:
        unknown = sorted(set(values) - known) if isinstance(values, dict) else ["a list"]
        raise UsageError(
            f"--hardware: unknown setting {unknown[0]!r} in {path}.",
            hint=f"Known: {', '.join(sorted(known))}.",
        )
    return checked(replace(Hardware(), **{key: _value(key, value) for key, value in values.items()}))


def _value(key: str, value: Any) -> Any:
    if key == "name":
        return str(value)
    if isinstance(value, str):
        return parse_size(value.removesuffix("/s"), f"--hardware {key}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"--hardware: {key} must be a number, not {value!r}.")
    return int(value) if key in _SIZES or key == "batch_tokens" else float(value)


def checked(hardware: Hardware) -> Hardware:
    """``hardware``, if a clock can run on it. Raises: UsageError."""
    for key in ("memory_bandwidth", "disk_bandwidth", "chunk_nbytes", "batch_tokens"):
        if getattr(hardware, key) <= 0:
            raise UsageError(f"--hardware: {key} must be above 0.")
    for key in ("dense_seconds", "disk_latency", "link_bandwidth", "link_latency", "ram_nbytes"):
        if getattr(hardware, key) < 0:
            raise UsageError(f"--hardware: {key} must not be negative.")
    return hardware


EXPERT_NBYTES = {
    "gpt-oss": 13_219_200,
    "deepseek-v2-lite": 4_866_048,
    "qwen3-30b": 2_654_208,
    "kimi-linear": 3_981_312,
    "olmoe": 3_538_944,
    "gemma-4-26b": 3_345_408,
}
"""Bytes of one expert at about 4.5 bits a weight (gpt-oss: its own MXFP4), by the start of a model's name."""
UNKNOWN_EXPERT = 4_000_000, "the model is not known; set --expert-size"


def expert_nbytes(model: str) -> tuple[int, str] | None:
    """(bytes of one expert of ``model``, why), for traces, which do not say; None if it is not known."""
    plain = model.lower().rsplit("/", 1)[-1]
    for name, nbytes in EXPERT_NBYTES.items():
        if name in plain:
            return nbytes, f"{name} at about 4.5 bits a weight"
    return None
