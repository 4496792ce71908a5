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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moei_core.forecast.forecast import Forecast
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

    stall_share, expert_share: waiting for disk, computing experts; the remainder is all else.
    """

    tokens_per_s: float | None
    ttft_s: float | None
    hit_rate: float | None = None
    stall_share: float | None = None
    expert_share: float | None = None

    @property
    def bottleneck(self) -> str | None:
        """As ``Parts.bottleneck``."""
        if self.stall_share is None or self.expert_share is None:
            return None
        rest = 1 - self.stall_share - self.expert_share
        sizes = {"disk": self.stall_share, "experts": self.expert_share, "rest": rest}
        return max(sizes, key=lambda name: sizes[name])


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


def write_prediction(
    fingerprint: str, shape: ModelShape, one: Forecast, what: str, warm: bool = False
) -> str:
    """Write ``one`` (uncorrected) down before the run. Returns its id. what: ``chat`` or ``bench``.

    warm: the first token will come from a warm cache. A home that cannot be written only loses the learning.
    """
    identity = uuid.uuid4().hex[:12]
    ttft = one.warm_ttft_s if warm else one.ttft_s
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
            "ttft_s": ttft.value,
            "ttft_s_range": [ttft.low, ttft.high],
            "bottleneck": one.decode.bottleneck,
            "ttft_bottleneck": one.prefill.bottleneck,
            "decode_parts_s": asdict(one.decode),
            "prefill_parts_s": asdict(one.prefill),
        }
    )
    return identity


def write_actual(identity: str, actual: Actual) -> None:
    """Set what came beside the prediction ``identity``."""
    _append({"actual": identity, **asdict(actual), "bottleneck": actual.bottleneck})


def _append(line: dict[str, Any]) -> None:
    path = ledger_path()
    text = json.dumps(line) + "\n"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LONGEST_FILE:
            path.replace(path.with_suffix(".old.jsonl"))
        # One write of one short line to a file opened for appending is whole, whoever else writes.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def entries() -> list[Entry]:
    """The ledger in the order of the predictions. Damaged lines are passed over."""
    lines: list[dict[str, Any]] = []
    with suppress(OSError, UnicodeDecodeError):
        for text in ledger_path().read_text().splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    lines.append(line)
    actuals = {line["actual"]: line for line in lines if "actual" in line}
    return [Entry(line, actuals.get(line["prediction"])) for line in lines if "prediction" in line]


def clear() -> None:
    """Forget what was learned."""
    with suppress(OSError):
        ledger_path().unlink()


def correction(fingerprint: str, one: Forecast, past: Iterable[Entry] | None = None) -> Correction:
    """What earlier runs on this machine say about ``one``. past: None for the ledger."""
    found = list(entries() if past is None else past)
    decode = list(_ratios(found, fingerprint, "tokens_per_s", "bottleneck", one.decode.bottleneck))
    ttft = list(_ratios(found, fingerprint, "ttft_s", "ttft_bottleneck", one.prefill.bottleneck))
    return Correction(1 / _learned(decode), _learned(ttft), max(len(decode), len(ttft)))


def _ratios(
    past: Iterable[Entry], fingerprint: str, quantity: str, kind: str, bottleneck: str
) -> Iterator[float]:
    """Actual over predicted, of runs on this machine with the same bottleneck."""
    for entry in past:
        before, after = entry.prediction, entry.actual
        if after is None or before.get("fingerprint") != fingerprint or before.get(kind) != bottleneck:
            continue
        expected, came = before.get(quantity), after.get(quantity)
        if isinstance(expected, int | float) and isinstance(came, int | float) and expected > 0 and came > 0:
            yield came / expected


def _learned(ratios: list[float]) -> float:
    latest = ratios[-_REMEMBERED:]
    if not latest:
        return 1.0
    logs = [max(-_LARGEST, min(_LARGEST, math.log(ratio))) for ratio in latest]
    return math.exp(sum(logs) / (len(logs) + _WEIGHT_OF_NONE))
