"""``moei bench --trace``: policies replayed in the simulator, and the table of what they came to."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from moei_cli.choices import one_of
from moei_cli.prefetch_options import prefetching
from moei_core.cache.policies import DEFAULT_POLICY
from moei_core.config import ExpertBudget, format_size, parse_size
from moei_core.errors import MoeiError, UsageError
from moei_core.sim.hardware import UNKNOWN_EXPERT, Hardware, checked, expert_nbytes, load_hardware
from moei_core.sim.sweep import NAMES, Result, Run, resident_slots, sweep
from moei_core.trace import Trace, read_trace

BASE, BOUND = "layer-lru", "layer-belady"


@dataclass(frozen=True, slots=True)
class TraceBenchOptions:
    """What a person asked for, as typed."""

    trace: str
    policy: str = f"{BASE},{DEFAULT_POLICY},{BOUND}"
    experts: str = "10%,25%,50%"
    hardware: str = "gpu-pcie4"
    sequences: int | None = None
    half: str = "all"
    interleave: str = "1"
    predictor: str = "none"
    prefetch: str = "auto"
    hints: float | None = None
    expert_size: str | None = None
    ram: str | None = None
    disk: str | None = None
    workers: int | None = None


def run_trace_bench(options: TraceBenchOptions, *, json: bool) -> None:
    """Replay, show a table (or the JSON report), with a progress bar on standard error.

    Raises: UsageError, naming the choices; ModelNotFoundError, DamagedFileError for the trace.
    """
    from moei_cli import render

    trace = read_trace(options.trace)
    first, last = _sequences(options, trace)
    hardware = _hardware(options)
    nbytes, reason = _expert_nbytes(options, trace)
    policies = _choices(options.policy, NAMES, "--policy")
    predictor, mode = prefetching(options.predictor, options.prefetch)
    budgets = [part.strip() for part in options.experts.split(",") if part.strip()]
    if not budgets:
        raise UsageError("--experts: give at least one budget, such as 25%.")
    users = [_count(part, "--interleave") for part in options.interleave.split(",")]
    runs: list[Run] = []
    labels: list[tuple[str, int]] = []
    for budget in budgets:
        slots = resident_slots(ExpertBudget.parse(budget), trace, nbytes)
        for count in users:
            for policy in policies:
                runs.append(
                    Run(
                        str(options.trace),
                        policy,
                        slots,
                        hardware,
                        nbytes,
                        first,
                        last,
                        count,
                        predictor,
                        mode,
                        options.hints,
                    )
                )
                labels.append((budget, count))
    with render.progress("simulating", len(runs)) as advance:
        results = sweep(runs, options.workers, lambda _: advance())
    rows = _rows(results, labels)
    part = trace.subset(first, last)
    header = {
        "trace": str(options.trace),
        "model": trace.model,
        "sequences": part.sequences,
        "tokens": part.tokens,
        "layers": len(trace.moe_layers),
        "num_experts": trace.num_experts,
        "num_experts_per_tok": trace.num_experts_per_tok,
        "expert_bytes": nbytes,
        "expert_bytes_reason": reason,
        "hardware": {field: getattr(hardware, field) for field in Hardware.__slots__},
        "predictor": predictor,
        "prefetch": options.prefetch,
        "hints": options.hints,
    }
    if json:
        render.print_json(header | {"results": rows})
        return
    render.note(
        f"{trace.model}: {part.tokens} tokens of {part.sequences} sequences, {len(trace.moe_layers)} layers "
        f"x {trace.num_experts} experts, top-{trace.num_experts_per_tok}; expert {format_size(nbytes)} "
        f"({reason}); machine {hardware.name}"
    )
    render.simulation_table(rows)
    for line in _remarks(trace, rows):
        render.note(line)


def _rows(results: list[Result], labels: list[tuple[str, int]]) -> list[dict[str, Any]]:
    rows = []
    for result, (budget, users) in zip(results, labels, strict=True):
        rows.append({"experts": budget, "interleave": users, **result.report()})
    for row in rows:
        same = {
            r["policy"]: r
            for r in rows
            if (r["experts"], r["interleave"]) == (row["experts"], row["interleave"])
        }
        row["gap_closed"] = row["gap_closed_by_task"] = row["bound_belady_tokens_per_second"] = None
        if BASE in same and BOUND in same:
            row["gap_closed"] = _gap(row["hit_rate"], same[BASE]["hit_rate"], same[BOUND]["hit_rate"])
            row["gap_closed_by_task"] = {
                task: _gap(rate, same[BASE]["hit_rate_by_task"][task], same[BOUND]["hit_rate_by_task"][task])
                for task, rate in row["hit_rate_by_task"].items()
                if task in same[BASE]["hit_rate_by_task"] and task in same[BOUND]["hit_rate_by_task"]
            }
        if BOUND in same:
            row["bound_belady_tokens_per_second"] = same[BOUND]["bound_own_hits_tokens_per_second"]
    return rows


def _gap(rate: float, base: float, bound: float) -> float | None:
    return round((rate - base) / (bound - base), 4) if bound - base > 1e-4 else None


def _remarks(trace: Trace, rows: list[dict[str, Any]]) -> list[str]:
    remarks = []
    least = trace.num_experts_per_tok * len(trace.moe_layers)
    few = sorted({str(row["experts"]) for row in rows if row["slots"] < least})
    if few:
        remarks.append(
            f"{', '.join(few)}: fewer slots than one token's experts; each token floods a global LRU."
        )
    if not {BASE, BOUND} <= {row["policy"] for row in rows}:
        remarks.append(f"The gap closed needs {BASE} and {BOUND} among the policies.")
    return remarks


def _sequences(options: TraceBenchOptions, trace: Trace) -> tuple[int, int]:
    middle = trace.sequences // 2
    halves = {"all": (0, trace.sequences), "first": (0, middle), "second": (middle, trace.sequences)}
    first, last = one_of(options.half, halves, "--half")
    if first == last:
        raise UsageError("--half: this trace has a single sequence.")
    if options.sequences is not None:
        last = min(last, first + _count(str(options.sequences), "--sequences"))
    return first, last


def _expert_nbytes(options: TraceBenchOptions, trace: Trace) -> tuple[int, str]:
    """(bytes of one expert, why)."""
    if options.expert_size is not None:
        nbytes = parse_size(options.expert_size, "--expert-size")
        if nbytes < 1:
            raise UsageError("--expert-size must be at least one byte.")
        return nbytes, "--expert-size"
    if (known := expert_nbytes(trace.model)) is not None:
        return known
    from moei_core.hub.library import describe

    # A trace that was recorded here names a model that is here, most often.
    with suppress(MoeiError):
        for model in describe(trace.model):
            if model.summary is not None and model.summary.expert_nbytes:
                return model.summary.expert_nbytes, f"as {model.name} has it"
    return UNKNOWN_EXPERT


def _hardware(options: TraceBenchOptions) -> Hardware:
    hardware = load_hardware(options.hardware)
    if options.ram is not None:
        if not hardware.has_gpu:
            raise UsageError(
                "--ram: this machine has no GPU, so what RAM holds is the budget of --experts.",
                hint=f"Say --experts {options.ram}.",
            )
        hardware = replace(hardware, ram_nbytes=parse_size(options.ram, "--ram"))
    if options.disk is not None:
        hardware = replace(
            hardware, disk_bandwidth=float(parse_size(options.disk.removesuffix("/s"), "--disk"))
        )
    return checked(hardware)


def _choices(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in (*known, "all"):
            raise UsageError(
                f"{option}: there is no '{name}'.", hint=f"Choose from: all, {', '.join(known)}."
            )
    if not names:
        raise UsageError(f"{option}: give at least one.", hint=f"Choose from: all, {', '.join(known)}.")
    return list(known) if "all" in names else list(dict.fromkeys(names))


def _count(text: str, option: str) -> int:
    if not text.isascii() or not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"{option}: '{text}' is not a positive number.")
    return int(text)
