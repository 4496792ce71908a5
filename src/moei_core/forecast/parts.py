"""What the time of a token or of a prompt is made of, and what computing and reading a layer's experts takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moei_core.forecast.formats import StorageFormat
from moei_core.forecast.limits import DISK, EXPERTS, GPU, REST, limits
from moei_core.forecast.shape import ModelShape
from moei_core.forecast.speed import Speeds


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of one token, or of one prompt: waiting for missing experts, computing experts, and all else (dense
    layers, the framework around them, sampling). gpu: waiting for a GPU, which computes dense layers and experts
    and is brought experts; what the processor computes meanwhile hides it."""

    disk: float
    experts: float
    dense: float
    framework: float
    gpu: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def rest(self) -> float:
        return self.dense + self.framework

    @property
    def total(self) -> float:
        return self.disk + self.experts + self.rest + self.gpu

    @property
    def sizes(self) -> dict[str, float]:
        """By the names of ``limits``."""
        return {DISK: self.disk, EXPERTS: self.experts, REST: self.rest, GPU: self.gpu}

    @property
    def bottleneck(self) -> str:
        """The largest part, one of the names of ``limits``."""
        return limits(self.sizes)[0]


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """Seconds of computing one expert: one of several that are ``resident``, and one that has just arrived. handling:
    what the engine does for one that arrives beside that."""

    resident: float
    arriving: float
    handling: float

    @classmethod
    def of(cls, shape: ModelShape, form: StorageFormat, speeds: Speeds, tokens: float) -> ExpertTimes:
        """Of a shape's experts with ``tokens`` tokens each."""
        weights = shape.expert_weights
        return cls(
            speeds.expert(form, weights, tokens, arriving=False),
            speeds.expert(form, weights, tokens, arriving=True),
            speeds.handling(form, weights, tokens),
        )

    def computing(self, resident: float, missing: float) -> float:
        """Seconds of computing a layer's experts."""
        return resident * self.resident + missing * self.arriving

    def wait(self, resident: float, missing: float, reading: float) -> float:
        """Seconds that a layer waits whose ``missing`` experts are read in ``reading`` seconds.

        They arrive one after the other while others are computed; the last is computed after it has arrived.
        """
        if not missing:
            return 0.0
        return max(0.0, reading - self.computing(resident, missing - min(1.0, missing)))
