"""What a model would run with, and what would change its forecast: more memory, a faster disk, fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moei_core.config import ExpertBudget
from moei_core.errors import DoesNotFitError
from moei_core.forecast.forecast import Forecast, forecast, plan_budget
from moei_core.forecast.formats import StorageFormat
from moei_core.forecast.gpu import GpuPlan, GpuSpeeds, can_compute, plan_gpu
from moei_core.forecast.shape import ModelShape
from moei_core.forecast.speed import Speeds


@dataclass(frozen=True, slots=True)
class Change:
    """Something that would make it faster. factor: of tokens a second."""

    what: str
    tokens_per_s: float
    factor: float


_WORTH_TELLING = 1.1


@dataclass(frozen=True, slots=True)
class Resources:
    """What a model would run with. usable: bytes of RAM that are free before anything is loaded. ram, experts, vram:
    bounds, as the flags of a chat. gpu: used if the model's dense part fits there."""

    speeds: Speeds
    usable: int
    context: int
    ram: int | None = None
    experts: ExpertBudget | None = None
    gpu: GpuSpeeds | None = None
    vram: int | None = None

    def expect(self, shape: ModelShape, form: StorageFormat, prompt_tokens: int) -> Forecast:
        """The forecast of a model. Raises: DoesNotFitError."""
        gpu = self._on_gpu(shape, form)
        bounds = self.ram, self.experts
        budget = plan_budget(
            shape, form, self.speeds, self.usable, self.context, *bounds, on_gpu=gpu is not None
        )
        return forecast(shape, form, self.speeds, budget, prompt_tokens, gpu=gpu)

    def _on_gpu(self, shape: ModelShape, form: StorageFormat) -> GpuPlan | None:
        if self.gpu is None or not can_compute(form):
            return None
        try:
            return plan_gpu(shape, form, self.speeds, self.gpu, self.context, self.vram)
        except DoesNotFitError:
            # As a chat does that was not told to use it; what was asked for is refused.
            if self.vram is not None:
                raise
            return None


def what_would_help(
    shape: ModelShape,
    now: Forecast,
    resources: Resources,
    formats: tuple[StorageFormat, ...],
    learned: Callable[[Forecast], Forecast] = lambda one: one,
) -> list[Change]:
    """What would change the forecast by a tenth or more, the largest gain first.

    learned: corrects a forecast as ``now`` was corrected.
    """
    found: list[Change] = []
    ram, gpu = resources.ram, resources.gpu

    def consider(what: str, form: StorageFormat, changed: Resources) -> None:
        try:
            other = learned(changed.expect(shape, form, now.prompt_tokens))
        except DoesNotFitError:
            return
        factor = other.tokens_per_s.value / now.tokens_per_s.value
        if factor >= _WORTH_TELLING:
            found.append(Change(what, other.tokens_per_s.value, factor))

    for gib in (8, 16, 32, 64):
        more = gib << 30
        if now.budget.slots < shape.total_experts:
            # A bound on the experts alone is lifted by memory only if there is memory for it.
            larger = replace(resources, usable=resources.usable + more, experts=None)
            consider(f"+{gib} GB RAM", now.form, replace(larger, ram=None if ram is None else ram + more))
    if gpu is not None and (now.gpu is None or now.gpu.budget.resident < shape.total_experts):
        for gib in (8, 16):
            bigger = replace(gpu, free=gpu.free + (gib << 30))
            consider(f"+{gib} GB VRAM", now.form, replace(resources, gpu=bigger, vram=None))
    for form in formats:
        if form.bits < now.form.bits:
            consider(f"{form.name} instead of {now.form.name}", form, resources)
    for gbps in (3.5, 7.0):
        faster = resources.speeds.with_disk_bandwidth(gbps * 1e9)
        consider(f"a disk that reads {gbps:g} GB/s", now.form, replace(resources, speeds=faster))
    return sorted(_without_repetition(found), key=lambda change: -change.factor)


def _without_repetition(changes: list[Change]) -> list[Change]:
    """Of several amounts of memory or disk speeds only those that bring more than the one before."""
    kept: list[Change] = []
    best: dict[str, float] = {}
    for change in changes:
        kind = change.what.split()[-1] if change.what.startswith("+") else change.what.split(" reads")[0]
        if change.factor > best.get(kind, 0.0) * 1.05:
            kept.append(change)
            best[kind] = change.factor
    return kept
