"""Predictions, written before each run, beside what came: the ledger of this machine, and what it teaches.

``forecasts.jsonl`` in the state directory, one JSON object a line: a ``prediction`` (before the run) and, if the run
ended, an ``actual`` with the same id. Ratios of actual to predicted time are averaged (on a logarithmic scale, so that
twice and half cancel) for each machine, quantity and bottleneck; a few runs move the correction only part of the way.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moei_core.forecast.forecast import Forecast
from moei_core.forecast.limits import DISK, EXPERTS, GPU, REST, limits
from moei_core.forecast.shape import ModelShape
from moei_core.paths import state_dir

_REMEMBERED = 20
"""Runs that count for a correction, the latest."""
_WEIGHT_OF_NONE = 2.0
"""How many runs without any error the beginning counts for."""
_LARGEST = math.log(3)
_LONGEST_FILE = 2 << 20


@dataclass(frozen=True, slots=True)
class Actual:
    """What a run came to. ttft_s is of a cold prompt; a share is of the decode time; None where nothing was measured.

    stall_share, expert_share, gpu_share: waiting for disk, computing experts, waiting for a GPU; the remainder is all
    else.
    """

    tokens_per_s: float | None
    ttft_s: float | None
    hit_rate: float | None = None
    stall_share: float | None = None
    expert_share: float | None = None
    gpu_share: float | None = None

    @property
    def limits(self) -> tuple[str, ...]:
        """As ``Forecast.limits``; empty where nothing was measured."""
        if self.stall_share is None or self.expert_share is None:
            return ()
        gpu = self.gpu_share or 0.0
        rest = 1 - self.stall_share - self.expert_share - gpu
        return limits({DISK: self.stall_share, EXPERTS: self.expert_share, REST: rest, GPU: gpu})


@dataclass(frozen=True, slots=True)
class Correction:
    """Factors of the true times: decode and ttft. runs: how many taught it."""

    decode: float = 1.0
    ttft: float = 1.0
    runs: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One prediction and, if the run ended, its actual."""

    prediction: dict[str, Any]
    actual: dict[str, Any] | None


def ledger_path() -> Path:
    """Where the ledger of this machine is."""
    return state_dir() / "forecasts.jsonl"


def _older() -> Path:
    """What the ledger was before it became too long."""
    return ledger_path().with_suffix(".old.jsonl")


def write_prediction(fingerprint: str, shape: ModelShape, one: Forecast, what: str) -> str:
    """Write ``one`` (uncorrected) down before the run. Returns its id. what: ``chat`` or ``bench``.

    A home that cannot be written only loses the learning.
    """
    identity = uuid.uuid4().hex[:12]
    _append(
        {
            "prediction": identity,
            "at": time.time(),
            "fingerprint": fingerprint,
            "what": what,
            "model": shape.name,
            "format": one.form.name,
            "slots": one.budget.slots,
            "residency": round(one.residency, 4),
            "prompt_tokens": one.prompt_tokens,
            "hit_rate": round(one.hit.value, 4),
            "tokens_per_s": one.tokens_per_s.value,
            "tokens_per_s_range": [one.tokens_per_s.low, one.tokens_per_s.high],
            "ttft_s": one.ttft_s.value,
            "ttft_s_range": [one.ttft_s.low, one.ttft_s.high],
            "bottleneck": one.decode.bottleneck,
            "limits": one.limits,
            "ttft_bottleneck": one.prefill.bottleneck,
            "decode_parts_s": asdict(one.decode),
            "prefill_parts_s": asdict(one.prefill),
        }
    )
    return identity


def write_actual(identity: str, actual: Actual) -> None:
    """Set what came beside the prediction ``identity``."""
    _append({"actual": identity, **asdict(actual), "limits": actual.limits})


def _append(line: dict[str, Any]) -> None:
    path = ledger_path()
    text = json.dumps(line) + "\n"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LONGEST_FILE:
            path.replace(_older())
        # One write of one short line to a file opened for appending is whole, whoever else writes.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def entries() -> list[Entry]:
    """The ledger in the order of the predictions. Damaged lines are passed over."""
    lines: list[dict[str, Any]] = []
    for path in (_older(), ledger_path()):
        with suppress(OSError, UnicodeDecodeError):
            for text in path.read_text().splitlines():
                with suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict):
                        lines.append(line)
    actuals = {line["actual"]: line for line in lines if "actual" in line}
    return [Entry(line, actuals.get(line["prediction"])) for line in lines if "prediction" in line]


def correction(fingerprint: str, one: Forecast, past: Iterable[Entry] | None = None) -> Correction:
    """What earlier runs on this machine say about ``one``. past: None for the ledger."""
    found = [
        entry
        for entry in (entries() if past is None else past)
        if entry.actual is not None and entry.prediction.get("fingerprint") == fingerprint
    ]
    decode = _lessons(found, "tokens_per_s", "bottleneck", one.decode.bottleneck, one.tokens_per_s.value)
    ttft = _lessons(found, "ttft_s", "ttft_bottleneck", one.prefill.bottleneck, one.ttft_s.value)
    return Correction(1 / _learned(decode), _learned(ttft), max(len(decode), len(ttft)))


def _lessons(
    past: Iterable[Entry], quantity: str, kind: str, bottleneck: str, now: float
) -> list[tuple[float, float]]:
    """(weight, logarithm of actual over predicted) of the latest runs with the same bottleneck.

    A run that was forecast ten times as fast as this one says little about it.
    """
    found = []
    for entry in past:
        assert entry.actual is not None
        expected, came = _positive(entry.prediction.get(quantity)), _positive(entry.actual.get(quantity))
        if entry.prediction.get(kind) != bottleneck or expected is None or came is None:
            continue
        ratio = max(-_LARGEST, min(_LARGEST, math.log(came / expected)))
        found.append((1 / (1 + math.log(expected / now) ** 2), ratio))
    return found[-_REMEMBERED:]


def _positive(value: Any) -> float | None:
    usable = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if usable else None


def _learned(lessons: list[tuple[float, float]]) -> float:
    total = sum(weight for weight, _ in lessons) + _WEIGHT_OF_NONE
    return math.exp(sum(weight * ratio for weight, ratio in lessons) / total)
