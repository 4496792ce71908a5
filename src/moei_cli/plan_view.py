"""How plans and comparisons are shown."""

from __future__ import annotations

from collections.abc import Sequence

from moei_cli import render
from moei_cli.forecasts import short
from moei_cli.planner import Candidate, Plan, account
from moei_core.config import format_size
from moei_core.forecast.forecast import Forecast
from moei_core.forecast.limits import WORDS, in_words
from moei_core.forecast.routing import Range
from moei_core.forecast.shape import ModelShape
from moei_core.hardware.budget import BudgetLine, DeviceBudget

_BAR = 48

HEADINGS = ("model", "format", "size", "experts in RAM", "hits", "tokens/s", "first token", "limit")


def _row(candidate: Candidate) -> tuple[str, ...]:
    shape, one = candidate.shape, candidate.one
    name = (shape.name, candidate.form.name, format_size(shape.nbytes(candidate.form)))
    if one is None:
        assert candidate.problem is not None
        why = "does not fit" if candidate.form.runs else "not as it is"
        return (*name, why, "", "", "", candidate.problem.what)
    return (
        *name,
        f"{one.budget.resident} of {shape.total_experts} ({one.residency:.0%})",
        f"{one.hit.value:.0%}",
        _span(one.tokens_per_s),
        f"{_span(one.ttft_s)} s",
        candidate.disk_problem or ", ".join(WORDS[name] for name in one.limits),
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
    facts = [(f"RAM   {bar(one)}", legend(one, shape))]
    nearer = 0
    if one.gpu is not None:
        nearer = one.gpu.budget.resident
        facts.insert(0, (f"VRAM  {gpu_bar(one.gpu.budget)}", _gpu_legend(one.gpu.budget, shape)))
    left = max(0, shape.total_experts - one.budget.resident - nearer) * shape.expert_nbytes(form)
    cells = round(_BAR * left / max(1, shape.total_experts * shape.expert_nbytes(form)))
    memory = "memory" if nearer else "RAM"
    text = f"{format_size(left)} of experts on disk only" if left else f"every expert is in {memory}"
    facts.append((f"disk  {'-' * cells:<{_BAR}}", text))
    render.print_facts(facts)
    print()
    print_budget(account(one))
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


def print_budget(lines: Sequence[BudgetLine]) -> None:
    """Where the memory goes, every number with its reason."""
    rows = [(line.name, format_size(line.nbytes), line.reason) for line in lines]
    render.print_table(("memory", "size", "why"), rows, right=("size",))


def bar(one: Forecast) -> str:
    """RAM as a bar: # runtime and dense part, = expert slots, . what stays free of the budget."""
    lines = {line.name: line.nbytes for line in one.budget.lines}
    slots = lines.pop("expert slots")
    return _cells(sum(lines.values()), slots, one.budget.limit or 0)


def gpu_bar(budget: DeviceBudget) -> str:
    """A GPU's memory as a bar, with the same signs."""
    return _cells(sum(line.nbytes for line in budget.lines) - budget.nbytes, budget.nbytes, 0)


def _cells(fixed_nbytes: int, slots_nbytes: int, limit: int) -> str:
    total = max(limit, slots_nbytes + fixed_nbytes)
    fixed = max(1, round(_BAR * fixed_nbytes / total))
    held = max(1, round(_BAR * slots_nbytes / total))
    return ("#" * fixed + "=" * min(held, _BAR - fixed)).ljust(_BAR, ".")[:_BAR]


def _gpu_legend(budget: DeviceBudget, shape: ModelShape) -> str:
    fixed = sum(line.nbytes for line in budget.lines) - budget.nbytes
    return (
        f"# {format_size(fixed)} dense part and context, = {format_size(budget.nbytes)} experts "
        f"({budget.resident} of {shape.total_experts})"
    )


def legend(one: Forecast, shape: ModelShape) -> str:
    """What the bar's signs are."""
    lines = one.budget.lines
    fixed = sum(line.nbytes for line in lines if line.name != "expert slots")
    what = "runtime" if one.gpu is not None else "dense part and runtime"
    return (
        f"# {format_size(fixed)} {what}, = {format_size(one.budget.nbytes)} experts "
        f"({one.budget.slots} of {shape.total_experts})"
    )


def parts_text(one: Forecast) -> str:
    """Where a token's time goes."""
    parts, hit = one.decode, one.hit
    gpu = f"GPU {parts.gpu * 1e3:.0f} (hits {one.gpu_hit:.0%}), " if one.gpu is not None else ""
    return (
        f"{parts.total * 1e3:.0f} ms: disk {parts.disk * 1e3:.0f} (hits {hit.low:.0%} - {hit.high:.0%}), "
        f"experts {parts.experts * 1e3:.0f}, {gpu}dense {parts.dense * 1e3:.0f}, framework {parts.framework * 1e3:.0f}"
    )
