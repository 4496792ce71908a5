"""Plans of a model in all its formats, and a comparison with others: what ``moei plan`` shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moei_cli.forecasts import speed_of_the_smallest
from moei_core.config import DEFAULT_CONTEXT, ExpertBudget, conversation_tokens, format_size
from moei_core.errors import DoesNotFitError, MoeiError, UnsupportedModelError, UsageError
from moei_core.forecast.changes import Change, Resources, what_would_help
from moei_core.forecast.forecast import Forecast, corrected
from moei_core.forecast.formats import FORMATS, QUANTISED, StorageFormat
from moei_core.forecast.gpu import GpuSpeeds, can_compute, plan_gpu
from moei_core.forecast.ledger import Entry, correction, entries
from moei_core.forecast.shape import ModelShape, bundled_configs, bundled_shape
from moei_core.forecast.speed import Speeds
from moei_core.hardware.budget import BudgetLine
from moei_core.hardware.profile import HardwareProfile
from moei_core.hardware.system import read_memory
from moei_core.hub.runnable import why_not

_PROMPT = 1024
"""Tokens of the prompt whose first token is forecast."""


def account(one: Forecast) -> tuple[BudgetLine, ...]:
    """Where all memory goes: a GPU's, then RAM's."""
    return (*(one.gpu.budget.lines if one.gpu is not None else ()), *one.budget.lines)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model in one format. one: corrected by what this machine has taught; None if it does not fit, or does not run
    as it is: why."""

    shape: ModelShape
    form: StorageFormat
    one: Forecast | None
    problem: MoeiError | None
    disk_problem: str = ""

    @property
    def runs(self) -> bool:
        """Whether both memory and disk have room for it."""
        return self.one is not None and not self.disk_problem

    def report(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "model": self.shape.name,
            "format": self.form.name,
            "as_stored": self.form == self.shape.format,
            "bytes": self.shape.nbytes(self.form),
            "fits": self.one is not None,
            "problem": self.problem.lines() if self.problem else None,
            "disk_problem": self.disk_problem or None,
        }
        if (one := self.one) is not None:
            found |= {
                "experts_resident": one.budget.resident,
                "experts_on_gpu": one.gpu.budget.resident if one.gpu is not None else 0,
                "gpu_hit_rate": one.gpu_hit,
                "residency": one.residency,
                "hit_rate": asdict(one.hit),
                "tokens_per_s": asdict(one.tokens_per_s),
                "ttft_s": asdict(one.ttft_s),
                "limits": one.limits,
                "decode_parts_s": asdict(one.decode),
                "prefill_parts_s": asdict(one.prefill),
            }
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """A model on this machine. chosen: the format asked for; others: what else it could be."""

    chosen: Candidate
    others: tuple[Candidate, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    prompt_tokens: int
    here: bool

    @property
    def all(self) -> list[Candidate]:
        """The chosen and the others, the largest first."""
        return sorted((self.chosen, *self.others), key=lambda one: -one.shape.nbytes(one.form))

    def report(self) -> dict[str, Any]:
        """For JSON."""
        shape, one = self.chosen.shape, self.chosen.one
        return {
            "model": shape.name,
            "source": shape.source,
            "shape": {
                "layers": shape.layers,
                "moe_layers": shape.moe_layers,
                "experts": shape.experts,
                "top_k": shape.top_k,
                "hidden_size": shape.hidden_size,
                "dense_bytes": shape.dense_nbytes(self.chosen.form),
                "expert_bytes": shape.expert_nbytes(self.chosen.form),
            },
            "prompt_tokens": self.prompt_tokens,
            "plan": self.chosen.report(),
            "budget": None if one is None else [asdict(line) for line in account(one)],
            "formats": [candidate.report() for candidate in self.all],
            "what_would_help": [asdict(change) for change in self.changes],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Planner:
    """Forecasts models on the measured machine with the memory that is free now.

    folder: of the model if it is here. ram, experts, vram: as the flags of a chat. gpu: the one that a chat would use.
    """

    profile: HardwareProfile
    folder: Path | None
    context: int
    prompt_tokens: int
    ram: int | None = None
    experts: ExpertBudget | None = None
    gpu: GpuSpeeds | None = None
    vram: int | None = None
    usable: int = field(default_factory=lambda: read_memory().usable)
    past: list[Entry] = field(default_factory=entries)

    def candidate(self, shape: ModelShape, form: StorageFormat) -> Candidate:
        """The forecast of one model in one format, or why it does not fit or run."""
        if not form.runs:
            problem = UnsupportedModelError(
                f"{form.name} runs once it is packed.", hint=f"moei pull {shape.name} --quant q8_0 (or q4_0)"
            )
            return Candidate(shape, form, None, problem)
        try:
            one = self._resources().expect(shape, form, self.prompt_tokens)
        except DoesNotFitError as error:
            error.hint += speed_of_the_smallest(error, shape, form, self.profile, self.folder)
            return Candidate(shape, form, None, error)
        return Candidate(shape, form, self._learned(one), None, self._disk(shape, form))

    def _learned(self, one: Forecast) -> Forecast:
        """``one`` with what this machine has taught."""
        learned = correction(self.profile.fingerprint, one, self.past)
        return corrected(one, learned.decode, learned.ttft)

    def _speeds(self) -> Speeds:
        return Speeds.of(self.profile, self.profile.disk_of(self.folder))

    def _resources(self) -> Resources:
        bounds = self.ram, self.experts, self.gpu, self.vram
        return Resources(self._speeds(), self.usable, self.context, *bounds)

    def _disk(self, shape: ModelShape, form: StorageFormat) -> str:
        """Why the model cannot be stored here; empty if it can or is."""
        disk = self.profile.disk_of(self.folder)
        if self.folder is not None or disk is None:
            return ""
        needed = shape.nbytes(form)
        free = disk.facts.free
        return "" if needed <= free else f"needs {format_size(needed)} of disk, {format_size(free)} are free"

    def plan(self, shape: ModelShape, form: StorageFormat) -> Plan:
        """The whole plan of ``shape`` with its experts in ``form``."""
        chosen = self.candidate(shape, form)
        others = tuple(self.candidate(shape, other) for other in formats_of(shape) if other != form)
        changes: tuple[Change, ...] = ()
        if chosen.one is not None:
            changes = tuple(
                what_would_help(
                    shape,
                    chosen.one,
                    self._resources(),
                    tuple(FORMATS[name] for name in QUANTISED),
                    self._learned,
                )
            )
        return Plan(
            chosen,
            others,
            changes,
            tuple(self._notes(chosen)),
            self.prompt_tokens,
            self.folder is not None,
        )

    def _notes(self, chosen: Candidate) -> list[str]:
        notes = []
        if (reason := why_not(chosen.shape.config)) is not None:
            notes.append(f"moei cannot run this checkpoint. {' '.join(reason)}")
        if not self._speeds().is_measured(chosen.form):
            notes.append(
                f"No product in {chosen.form.name} was measured here: reckoned at {chosen.form.share:.0%} of the "
                "memory's read bandwidth."
            )
        if not self.profile.experts:
            notes.append(
                "Experts were not timed in the engine: no file could be made for it. Products stand for them."
            )
        # Figures taken beside other programs are doubtful, and so is what follows from them.
        notes += [
            f"While this was measured: {note}" for note in self.profile.notes if "Other programs" in note
        ]
        if self.profile.framework is None:
            notes.append("What the framework costs was not measured here: values of a similar machine.")
        notes += self._gpu_notes(chosen)
        if self.ram is not None and chosen.one is not None and (taken := _taken(chosen.one)) > self.usable:
            notes.append(f"It would take {format_size(taken)}; {format_size(self.usable)} are free now.")
        if self.profile.disk_of(self.folder) is None:
            notes.append("No disk was measured: reckoned with 0.5 GB/s, in a wide range.")
        if chosen.disk_problem:
            notes.append(f"It {chosen.disk_problem}.")
        return notes

    def _gpu_notes(self, chosen: Candidate) -> list[str]:
        """Why there is no GPU in the forecast, or what it is worth."""
        one = chosen.one
        if self.gpu is None:
            unmeasured = next((gpu for gpu in self.profile.gpus if not gpu.copies), None)
            why = f": {unmeasured.note}" if unmeasured is not None and unmeasured.note else ""
            return [f"{unmeasured.facts.name} was not measured{why}."] if unmeasured is not None else []
        if one is None:
            return []
        if one.gpu is not None:
            return ["Forecasts with a GPU were compared with the simulator only, hence their wide range."]
        if not can_compute(chosen.form):
            return [f"The GPU is not used: there is no GPU product for {chosen.form.name}."]
        try:
            plan_gpu(chosen.shape, chosen.form, self._speeds(), self.gpu, self.context)
        except DoesNotFitError as error:
            return [f"The GPU is not used: {error.what} {error.why}"]
        return []

    def ranking(self, shape: ModelShape, only: StorageFormat | None = None) -> list[Candidate]:
        """The model and all well-known ones in all their formats, or in one, the fastest that fit first."""
        shapes = [shape, *(one for name in bundled_configs() if (one := bundled_shape(name)) is not None)]
        seen: set[tuple[Any, ...]] = set()
        found: list[Candidate] = []
        for one in shapes:
            # Aliases of one shape would be the same line several times.
            same = (one.expert_weights, one.layers, one.experts, one.dense_weights, one.uniform_routing)
            if same in seen:
                continue
            seen.add(same)
            found += [self.candidate(one, form) for form in formats_of(one) if only in (None, form)]
        fits = [one for one in found if one.runs]
        rest = [one for one in found if one not in fits and one.shape == shape]
        return sorted(fits, key=_speed, reverse=True) + rest


def lengths(shape: ModelShape, context: int | None, prompt: int | None) -> tuple[int, int]:
    """(tokens of context, of the prompt): as asked, else the usual ones as far as the model and the other allow.

    Raises: UsageError for what a chat would refuse.
    """
    found = shape.config.get("max_position_embeddings")
    longest = found if isinstance(found, int) and found > 0 else DEFAULT_CONTEXT
    if prompt is not None and prompt > longest:
        raise UsageError(
            f"--prompt-tokens {prompt} is out of range.", f"{shape.name} was made for up to {longest} tokens."
        )
    tokens = conversation_tokens(context or max(prompt or 0, min(DEFAULT_CONTEXT, longest)), longest)
    if prompt is not None and prompt > tokens:
        raise UsageError(
            f"A prompt of {prompt} tokens does not fit --context {tokens}.",
            hint="Ask for a longer context, or for a shorter prompt with --prompt-tokens.",
        )
    return tokens, prompt or min(_PROMPT, tokens)


def formats_of(shape: ModelShape) -> list[StorageFormat]:
    """What the model is stored as, and what it could be packed to."""
    packed = [FORMATS[name] for name in QUANTISED]
    return [
        shape.format,
        *(form for form in packed if form.bits < shape.format.bits or not shape.format.runs),
    ]


def usual_format(shape: ModelShape) -> StorageFormat:
    """What a plan is about unless a person names another format."""
    return next(form for form in formats_of(shape) if form.runs)


def _taken(one: Forecast) -> int:
    """Bytes that the whole process would hold."""
    return sum(line.nbytes for line in one.budget.lines)


def _speed(candidate: Candidate) -> float:
    return candidate.one.tokens_per_s.value if candidate.one is not None else 0.0
