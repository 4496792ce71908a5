"""Plans of a model in all its formats, a comparison with others, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moei_cli import render
from moei_cli.forecasts import short, speed_of_the_smallest
from moei_cli.settings import DEFAULT_CONTEXT
from moei_core.config import ExpertBudget, format_size
from moei_core.errors import DoesNotFitError, UsageError
from moei_core.forecast.forecast import (
    Change,
    Forecast,
    corrected,
    forecast,
    plan_budget,
    what_would_help,
)
from moei_core.forecast.formats import FORMATS, QUANTISED, StorageFormat
from moei_core.forecast.ledger import Entry, correction, entries
from moei_core.forecast.limits import DISK, EXPERTS, REST, in_words
from moei_core.forecast.routing import Range
from moei_core.forecast.shape import ModelShape, bundled_configs, bundled_shape
from moei_core.forecast.speed import Speeds
from moei_core.hardware.budget import SlotBudget
from moei_core.hardware.profile import HardwareProfile
from moei_core.hardware.system import read_memory

_BAR = 48
_PROMPT = 1024
"""Tokens of the prompt whose first token is forecast."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model in one format. one: corrected by what this machine has taught; None if it does not fit: why."""

    shape: ModelShape
    form: StorageFormat
    one: Forecast | None
    problem: DoesNotFitError | None
    disk_problem: str = ""

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
    disk_free: int
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
            "budget": None if one is None else [asdict(line) for line in one.budget.lines],
            "formats": [candidate.report() for candidate in self.all],
            "what_would_help": [asdict(change) for change in self.changes],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Planner:
    """Forecasts models on the measured machine with the memory that is free now.

    folder: of the model if it is here. ram, experts: as the flags of a chat.
    """

    profile: HardwareProfile
    folder: Path | None
    context: int
    prompt_tokens: int
    ram: int | None = None
    experts: ExpertBudget | None = None
    usable: int = field(default_factory=lambda: read_memory().usable)
    past: list[Entry] = field(default_factory=entries)

    def candidate(self, shape: ModelShape, form: StorageFormat) -> Candidate:
        """The forecast of one model in one format, or why it does not fit."""
        speeds = self._speeds()
        try:
            budget = plan_budget(shape, form, speeds, self.usable, self.context, self.ram, self.experts)
        except DoesNotFitError as error:
            error.hint += speed_of_the_smallest(error, shape, form, self.profile, self.folder)
            return Candidate(shape, form, None, error)
        one = forecast(shape, form, speeds, budget, self.prompt_tokens)
        return Candidate(shape, form, self._learned(one), None, self._disk(shape, form))

    def _learned(self, one: Forecast) -> Forecast:
        """``one`` with what this machine has taught."""
        learned = correction(self.profile.fingerprint, one, self.past)
        return corrected(one, learned.decode, learned.ttft)

    def _speeds(self) -> Speeds:
        return Speeds.of(self.profile, self.profile.disk_of(self.folder))

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
                    self._speeds(),
                    self.usable,
                    self.context,
                    self.ram,
                    self.experts,
                    tuple(FORMATS[name] for name in QUANTISED),
                    self._learned,
                )
            )
        disk = self.profile.disk_of(self.folder)
        return Plan(
            chosen,
            others,
            changes,
            tuple(self._notes(chosen)),
            self.prompt_tokens,
            disk.facts.free if disk is not None else 0,
            self.folder is not None,
        )

    def _notes(self, chosen: Candidate) -> list[str]:
        notes = []
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
        if self.profile.gpus:
            notes.append(
                "There is a GPU, which a chat uses if the dense part fits on it. What it would take there is missing "
                "here, since experts were not timed on it: this is the forecast of --device cpu."
            )
        if self.ram is not None and chosen.one is not None and (taken := _taken(chosen.one)) > self.usable:
            notes.append(f"It would take {format_size(taken)}; {format_size(self.usable)} are free now.")
        if self.profile.disk_of(self.folder) is None:
            notes.append("No disk was measured: reckoned with 0.5 GB/s, in a wide range.")
        if chosen.disk_problem:
            notes.append(f"It {chosen.disk_problem}.")
        return notes

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
        fits = [one for one in found if one.one is not None and not one.disk_problem]
        rest = [one for one in found if one not in fits and one.shape == shape]
        return sorted(fits, key=_speed, reverse=True) + rest


def lengths(shape: ModelShape, context: int | None, prompt: int | None) -> tuple[int, int]:
    """(tokens of context, of the prompt): as asked, else the usual ones as far as the model and the other allow.

    Raises: UsageError for what a chat would refuse.
    """
    longest = shape.config.get("max_position_embeddings")
    most = longest if isinstance(longest, int) and longest > 0 else None
    for flag, asked in (("--context", context), ("--prompt-tokens", prompt)):
        if asked is not None and most is not None and asked > most:
            raise UsageError(
                f"{flag} {asked} is out of range.", f"{shape.name} was made for up to {most} tokens."
            )
    if context is not None and prompt is not None and prompt > context:
        raise UsageError(
            f"A prompt of {prompt} tokens does not fit --context {context}.",
            hint="Ask for a longer context, or for a shorter prompt with --prompt-tokens.",
        )
    context = context or max(prompt or 0, min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT))
    return context, prompt or min(_PROMPT, context)


def formats_of(shape: ModelShape) -> list[StorageFormat]:
    """What the model is stored as, and what it could be packed to."""
    return [shape.format] + [FORMATS[name] for name in QUANTISED if FORMATS[name].bits < shape.format.bits]


def _taken(one: Forecast) -> int:
    """Bytes that the whole process would hold."""
    return sum(line.nbytes for line in one.budget.lines)


def _speed(candidate: Candidate) -> float:
    return candidate.one.tokens_per_s.value if candidate.one is not None else 0.0


HEADINGS = ("model", "format", "size", "experts in RAM", "hits", "tokens/s", "first token", "limit")
_LIMITS = {DISK: "disk", EXPERTS: "experts", REST: "dense + framework"}


def _row(candidate: Candidate) -> tuple[str, ...]:
    shape, one = candidate.shape, candidate.one
    name = (shape.name, candidate.form.name, format_size(shape.nbytes(candidate.form)))
    if one is None:
        assert candidate.problem is not None
        return (*name, "does not fit", "", "", "", candidate.problem.what)
    return (
        *name,
        f"{one.budget.resident} of {shape.total_experts} ({one.residency:.0%})",
        f"{one.hit.value:.0%}",
        _span(one.tokens_per_s),
        f"{_span(one.ttft_s)} s",
        candidate.disk_problem or ", ".join(_LIMITS[name] for name in one.limits),
    )


def _span(span: Range) -> str:
    return f"{short(span.low)} - {short(span.high)}"


def print_comparison(ranking: Sequence[Candidate], shape: ModelShape, prompt_tokens: int) -> None:
    """The ranking as a table; the model that was asked about is marked."""
    rows = [("*" if one.shape == shape else "", *_row(one)) for one in ranking]
    render.print_table(("", *HEADINGS), rows, right=("size", "hits", "tokens/s", "first token"))
    render.note(
        f"Fastest first; * is {shape.name}. First token: of a new prompt of {prompt_tokens} tokens, cache empty."
    )


def print_plan(plan: Plan) -> None:
    """Formats, tiers, account, speed with its reason, and what would change it."""
    shape, chosen = plan.chosen.shape, plan.chosen
    where = "here" if plan.here else "not downloaded"
    render.print_facts(
        [
            ("model", f"{shape.name} ({where}; from {shape.source})"),
            ("shape", f"{shape.moe_layers} MoE layers x {shape.experts} experts x top-{shape.top_k}, "
             f"{format_size(shape.expert_nbytes(chosen.form))} an expert in {chosen.form.name}; "
             f"dense part {format_size(shape.dense_nbytes(chosen.form))}"),
        ]
    )  # fmt: skip
    print()
    rows = [_row(one)[1:] for one in plan.all]
    render.print_table(HEADINGS[1:], rows, right=("size", "hits", "tokens/s", "first token"))
    print()
    if chosen.one is None:
        assert chosen.problem is not None
        render.print_facts([(f"{chosen.form.name}", " ".join(chosen.problem.lines()))])
    else:
        _print_chosen(plan, chosen.one)
    for note in plan.notes:
        render.note(note)


def _print_chosen(plan: Plan, one: Forecast) -> None:
    shape, form = plan.chosen.shape, plan.chosen.form
    facts = [(f"RAM   {bar(one, shape)}", legend(one, shape))]
    left = (shape.total_experts - one.budget.resident) * shape.expert_nbytes(form)
    cells = round(_BAR * left / max(1, shape.total_experts * shape.expert_nbytes(form)))
    text = f"{format_size(left)} of experts on disk only" if left else "every expert is in RAM"
    facts.append((f"disk  {'-' * cells:<{_BAR}}", text))
    render.print_facts(facts)
    print()
    print_budget(one.budget)
    print()
    render.print_facts(
        [
            ("tokens/s", f"{_span(one.tokens_per_s)}, limited by {in_words(one.limits)}"),
            ("a token", parts_text(one)),
            ("first token", f"{_span(one.ttft_s)} s for a new prompt of {plan.prompt_tokens} tokens "
             f"({_span(one.warm_ttft_s)} s once the cache is warm)"),
        ]
    )  # fmt: skip
    if plan.changes:
        print()
        render.print_table(
            ("what would change it", "tokens/s", ""),
            [
                (
                    change.what,
                    f"{short(one.tokens_per_s.value)} -> {short(change.tokens_per_s)}",
                    f"x{change.factor:.1f}",
                )
                for change in plan.changes
            ],
            right=("tokens/s", ""),
        )


def print_budget(budget: SlotBudget) -> None:
    """Where the memory goes, every number with its reason."""
    rows = [(line.name, format_size(line.nbytes), line.reason) for line in budget.lines]
    render.print_table(("memory", "size", "why"), rows, right=("size",))


def bar(one: Forecast, shape: ModelShape) -> str:
    """RAM as a bar: # runtime and dense part, = expert slots, . what stays free of the budget."""
    lines = {line.name: line.nbytes for line in one.budget.lines}
    slots = lines.pop("expert slots")
    total = max(one.budget.limit or 0, slots + sum(lines.values()))
    fixed = max(1, round(_BAR * sum(lines.values()) / total))
    held = max(1, round(_BAR * slots / total))
    return ("#" * fixed + "=" * min(held, _BAR - fixed)).ljust(_BAR, ".")[:_BAR]


def legend(one: Forecast, shape: ModelShape) -> str:
    """What the bar's signs are."""
    lines = one.budget.lines
    fixed = sum(line.nbytes for line in lines if line.name != "expert slots")
    return (
        f"# {format_size(fixed)} dense part and runtime, = {format_size(one.budget.nbytes)} experts "
        f"({one.budget.slots} of {shape.total_experts})"
    )


def parts_text(one: Forecast) -> str:
    """Where a token's time goes."""
    parts, hit = one.decode, one.hit
    return (
        f"{parts.total * 1e3:.0f} ms: disk {parts.disk * 1e3:.0f} (hits {hit.low:.0%} - {hit.high:.0%}), "
        f"experts {parts.experts * 1e3:.0f}, dense {parts.dense * 1e3:.0f}, framework {parts.framework * 1e3:.0f}"
    )
