"""``moei bench --ablation``: what each part of the engine is worth, one part more in each row.

Every row is a model loaded anew, measured after a first request has filled the cache. The rows take turns, so that
a machine that slows down slows all of them; a row is the median of its rounds.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from moei_core.cache.policies import DEFAULT_POLICY
from moei_core.config import ExpertBudget, Overlap

if TYPE_CHECKING:
    from moei_cli.bench_model import ModelBenchOptions
    from moei_core.hub.resolve import ModelFiles
    from moei_core.trace import Trace

_WHOLE = 1 << 40


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration. base: the row that it is compared with; empty: none. always: prefetch without asking whether
    it pays, which takes a few hundred tokens to find out."""

    name: str
    base: str
    policy: str
    predictor: str | None
    overlap: Overlap
    always: bool = False


def ladder(predictor: str) -> list[Row]:
    """Each row has one part more than its base."""
    plain = Overlap(_WHOLE, preempt=False, reorder=False, stream=False)
    rows = [Row("on demand, no cache", "", "on-demand", None, plain)]

    def add(name: str, **changes: Any) -> None:
        rows.append(replace(rows[-1], name=name, base=rows[-1].name, **changes))

    add("+ LRU", policy="layer-lru")
    add(f"+ policy {DEFAULT_POLICY}", policy=DEFAULT_POLICY)
    add("+ prefetch", predictor=predictor)
    add("+ chunking", overlap=replace(plain, chunk_nbytes=Overlap().chunk_nbytes))
    add("+ preemption", overlap=replace(rows[-1].overlap, preempt=True))
    add("+ reordering", overlap=replace(rows[-1].overlap, reorder=True))
    add("+ streaming of prompts", overlap=replace(rows[-1].overlap, stream=True))
    whole = rows[-1]
    without = replace(whole, name="without prefetch", base=whole.name, predictor=None)
    rows += [
        without,
        replace(whole, name="prefetch by noise", base=without.name, predictor="noise"),
        replace(whole, name="prefetch always", base=without.name, always=True),
        replace(whole, name="noise always", base=without.name, predictor="noise", always=True),
    ]
    return rows


def _predictor(trace: Trace | None) -> str:
    if trace is None:
        return "mixed"
    # Forced routing follows the trace and not the model, so only what looks at past choices can foresee it.
    return "markov" if trace.hints_experts is None else "router"


def run_ablation(
    options: ModelBenchOptions, files: ModelFiles, budget: ExpertBudget | None, ram: int | None, *, json: bool
) -> None:
    """Measure the ladder and show it. Raises: what loading raises; UsageError."""
    from moei_cli import render
    from moei_core.trace.hints import read_hinted

    trace = None if options.trace is None else read_hinted(options.trace, options.hints)
    rows = ladder(_predictor(trace))
    found: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    interrupted = False
    try:
        with render.progress("measuring", len(rows) * options.repeats) as advance:
            for _ in range(options.repeats):
                for row in rows:
                    found[row.name].append(_measure(row, options, files, budget, ram, trace))
                    advance()
    except KeyboardInterrupt:
        # Half an hour at real size: what has been measured is not lost.
        rounds = len(found[rows[-1].name])
        if not rounds:
            raise
        interrupted = True
        found = {name: several[:rounds] for name, several in found.items()}
        render.note(f"Interrupted: {rounds} of {options.repeats} rounds.")
    table = [_summary(row, found) for row in rows]
    if json:
        render.print_json({"model": files.name, "options": asdict(options), "rows": table})
    else:
        headings = ("engine", "tok/s", "(min - max)", "waiting", "hits", "read/token", "TTFT s", "x its base")
        render.print_table(headings, [_cells(row) for row in table], right=headings[1:])
    if interrupted:
        raise typer.Exit(130)


def _measure(
    row: Row,
    options: ModelBenchOptions,
    files: ModelFiles,
    budget: ExpertBudget | None,
    ram: int | None,
    trace: Trace | None,
) -> dict[str, float]:
    from moei_cli.bench_model import context_of, naming_the_request
    from moei_core.engine.forced_routing import follow
    from moei_core.engine.loaded_model import LoadedModel, LoadOptions
    from moei_core.engine.measure import measure_requests
    from moei_core.prefetch import PrefetchMode

    load = LoadOptions(
        ram,
        budget,
        context_of(options),
        row.policy,
        predictor=row.predictor,
        prefetch=PrefetchMode.ON if row.always else PrefetchMode.AUTO,
        overlap=row.overlap,
    )
    with naming_the_request(options):
        loaded = LoadedModel(files.folder, load)
    with loaded as model:
        if trace is not None:
            follow(model.runtime, model.spec, trace)
        # The first request fills the cache; the second is measured.
        requests = measure_requests(model, options.prompt_tokens, options.new_tokens, 1, warm=False)
        request = requests["changing"][0]
    return {
        "tokens_per_s": request.decode_tokens_per_s,
        "stall_share": request.decode_stall_share,
        "hit_rate": request.decode_hit_rate,
        "bytes_per_token": request.bytes_read / (options.prompt_tokens + options.new_tokens),
        "ttft_s": request.ttft_s,
    }


def _summary(row: Row, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    rounds = found[row.name]
    result: dict[str, Any] = {"name": row.name, "base": row.base}
    for figure in rounds[0]:
        result[figure] = round(statistics.median(one[figure] for one in rounds), 5)
    speeds = [one["tokens_per_s"] for one in rounds]
    result |= {"tokens_per_s_min": round(min(speeds), 5), "tokens_per_s_max": round(max(speeds), 5)}
    result["ratio"] = None
    if row.base:
        # Of the same round, which had the same machine.
        pairs = zip(rounds, found[row.base], strict=True)
        ratios = [one["tokens_per_s"] / base["tokens_per_s"] for one, base in pairs]
        result["ratio"] = round(statistics.median(ratios), 4)
    return result


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from moei_core.config import format_size

    return (
        row["name"],
        f"{row['tokens_per_s']:.2f}",
        f"({row['tokens_per_s_min']:.2f} - {row['tokens_per_s_max']:.2f})",
        f"{row['stall_share']:.0%}",
        f"{row['hit_rate']:.1%}",
        format_size(row["bytes_per_token"]),
        f"{row['ttft_s']:.3f}",
        "" if row["ratio"] is None else f"{row['ratio']:.3f}",
    )
