"""``moei bench --ablation``: what each part of the engine is worth, one part more in each row.

Each row is measured beside its base. Both are in memory and answer the same requests in turns of a few tokens, so that
they follow the same text and meet the same disk, whose speed may change by half within a second. Rows measured one
after the other said nothing about ten percent.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import typer

from moei_core.cache.policies import DEFAULT_POLICY
from moei_core.config import ExpertBudget, Overlap
from moei_core.errors import DoesNotFitError

if TYPE_CHECKING:
    from moei_cli.bench_model import ModelBenchOptions
    from moei_core.engine.loaded_model import LoadedModel, LoadOptions
    from moei_core.engine.measure import Request
    from moei_core.hub.resolve import ModelFiles
    from moei_core.trace import Trace

ROUNDS = 2
"""Times that a pair is loaded, each of the two first in turn: the first one loaded is up to 4% slower."""
_WHOLE = 1 << 40
_TURNS, _LEAST_TURN = 16, 4
_SETTLING_S = 0.02
"""What was begun ahead in one turn is read to its end before the other's begins."""


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
    options: ModelBenchOptions,
    files: ModelFiles,
    budget: ExpertBudget | None,
    ram: int | None,
    on_device: Mapping[str, Any],
    *,
    json: bool,
) -> None:
    """Measure the ladder and show it. Raises: what loading raises; UsageError."""
    from moei_cli import render
    from moei_cli.bench_model import context_of
    from moei_core.engine.loaded_model import LoadOptions
    from moei_core.trace.hints import read_hinted

    trace = None if options.trace is None else read_hinted(options.trace, options.hints)
    rows = {row.name: row for row in ladder(_predictor(trace))}
    asked = LoadOptions(ram, budget, context_of(options), **on_device)
    comparison = Comparison(options, files, asked, trace)
    rounds = options.repeats or ROUNDS
    found: list[Pair] = []
    interrupted = False
    try:
        with render.progress("measuring", (len(rows) - 1) * rounds) as advance:
            for row in rows.values():
                if row.base:
                    found.append(comparison.pair(row, rows[row.base], rounds, advance))
    except KeyboardInterrupt:
        # Half an hour at real size: what has been measured is not lost.
        if not found:
            raise
        interrupted = True
        render.note(f"Interrupted: {len(found)} of {len(rows) - 1} comparisons.")
    first = found[0]
    table = [_summary(rows[first.row.base], first.base), *(_summary(one.row, one.own, one) for one in found)]
    if json:
        render.print_json({"model": files.name, "options": asdict(options), "rows": table})
    else:
        headings = ("engine", "tok/s", "waiting", "hits", "read/token", "TTFT s", "x its base", "(quartiles)")
        render.print_table(headings, [_cells(row) for row in table], right=headings[1:])
        render.note(
            "Ratios are of turns on the same text and the same disk; other columns of rows far apart are not."
        )
    if interrupted:
        raise typer.Exit(130)


@dataclass(slots=True)
class Pair:
    """A row beside its base: what both measured, and by round the base's seconds over the row's, of each turn."""

    row: Row
    own: list[Request] = field(default_factory=list)
    base: list[Request] = field(default_factory=list)
    ratios: list[list[float]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median of the turns, the geometric mean of both orders of loading."""
        orders = [list(chain.from_iterable(self.ratios[at::2])) for at in range(min(2, len(self.ratios)))]
        return math.prod(map(statistics.median, orders)) ** (1 / len(orders))

    @property
    def quartiles(self) -> list[float] | None:
        """The first and the third of all turns; None of a single one."""
        turns = list(chain.from_iterable(self.ratios))
        if len(turns) < 2:
            return None
        low, _, high = statistics.quantiles(turns, n=4)
        return [round(low, 4), round(high, 4)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of rows with their bases. asked: what both engines may take together."""

    options: ModelBenchOptions
    files: ModelFiles
    asked: LoadOptions
    trace: Trace | None

    def pair(self, row: Row, base: Row, rounds: int, advance: Callable[[], None]) -> Pair:
        """``rounds`` rounds; ``advance`` is called after each."""
        pair = Pair(row)
        for number in range(rounds):
            self._round(pair, base, (base, row) if number % 2 == 0 else (row, base))
            advance()
        return pair

    def _round(self, pair: Pair, base: Row, order: tuple[Row, Row]) -> None:
        # A method, so that nothing refers to these models when the next ones are loaded.
        with self.loaded(order) as models:
            own, others, ratios = self.in_turns(models[pair.row.name], models[base.name])
        pair.own.append(own)
        pair.base.append(others)
        pair.ratios.append(ratios)

    @contextmanager
    def loaded(self, order: tuple[Row, Row]) -> Iterator[dict[str, LoadedModel]]:
        """Both engines, by the names of their rows, with as many slots each: together they keep to what was asked."""
        from moei_cli.bench_model import naming_the_request
        from moei_core.engine.loaded_model import LoadedModel

        first, second = order
        with naming_the_request(self.options), _naming_both(self.asked):
            half = half_of(self.asked)
            one = LoadedModel(self.files.folder, _options(first, half))
        with one:
            with naming_the_request(self.options), _naming_both(self.asked):
                same = replace(half, ram=self.asked.ram, experts=ExpertBudget(nbytes=one.budget.nbytes))
                other = LoadedModel(self.files.folder, _options(second, same))
            with other:
                yield {first.name: one, second.name: other}

    def in_turns(self, own: LoadedModel, base: LoadedModel) -> tuple[Request, Request, list[float]]:
        """(what ``own`` and what ``base`` measured, the ratios of their turns)."""
        from moei_core.engine.forced_routing import follow
        from moei_core.engine.measure import OpenRequest

        lengths = self.options.prompt_tokens, self.options.new_tokens
        for model in (own, base):
            if self.trace is not None:
                follow(model.runtime, model.spec, self.trace)
            # Fills the cache.
            OpenRequest(model, *lengths, seed=0).end()
        requests = [OpenRequest(model, *lengths, seed=1) for model in (own, base)]
        turn = max(_LEAST_TURN, self.options.new_tokens // _TURNS)
        ratios = []
        for number in range(math.ceil((self.options.new_tokens - 1) / turn)):
            seconds = {}
            for at in (0, 1) if number % 2 == 0 else (1, 0):
                time.sleep(_SETTLING_S)
                seconds[at] = requests[at].advance(turn)
            ratios.append(seconds[1] / seconds[0])
        return requests[0].end(), requests[1].end(), ratios


def half_of(asked: LoadOptions) -> LoadOptions:
    """What the first of two engines may take."""
    from moei_core.engine.placement import open_device
    from moei_core.hardware.budget import SYSTEM_SHARE
    from moei_core.hardware.memory import available_memory, resident_memory

    ram, vram = asked.ram, asked.vram
    if ram is not None:
        ram //= 2
    elif asked.experts is None:
        available = available_memory()
        ram = resident_memory() + (available - available // SYSTEM_SHARE) // 2
    device, _ = open_device(asked.device, asked.vram, asked.misses)
    if device is not None:
        vram = min(device.free_nbytes(), vram or device.free_nbytes()) // 2
        device.close()
    return replace(asked, ram=ram, vram=vram)


@contextmanager
def _naming_both(asked: LoadOptions) -> Iterator[None]:
    halved = ", and each gets half" if asked.ram is not None or asked.experts is None else ""
    try:
        yield
    except DoesNotFitError as error:
        error.why = f"--ablation has two engines in memory at a time{halved}. {error.why}".strip()
        raise


def _options(row: Row, asked: LoadOptions) -> LoadOptions:
    from moei_core.prefetch import PrefetchMode

    return replace(
        asked,
        policy=row.policy,
        predictor=row.predictor,
        prefetch=PrefetchMode.ON if row.always else PrefetchMode.AUTO,
        overlap=row.overlap,
    )


def _summary(row: Row, requests: list[Request], pair: Pair | None = None) -> dict[str, Any]:
    def median(value: Callable[[Request], float]) -> float:
        return round(statistics.median(map(value, requests)), 5)

    return {
        "name": row.name,
        "base": row.base if pair else "",
        "tokens_per_s": median(lambda one: one.decode_tokens_per_s),
        "stall_share": median(lambda one: one.decode_stall_share),
        "hit_rate": median(lambda one: one.decode_hit_rate),
        "bytes_per_token": median(lambda one: one.decode_bytes_read / max(1, len(one.token_s))),
        "ttft_s": median(lambda one: one.ttft_s),
        "ratio": None if pair is None else round(pair.ratio, 4),
        "ratio_quartiles": None if pair is None else pair.quartiles,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from moei_core.config import format_size

    ratio, quartiles = row["ratio"], row["ratio_quartiles"]
    return (
        row["name"],
        f"{row['tokens_per_s']:.2f}",
        f"{row['stall_share']:.0%}",
        f"{row['hit_rate']:.1%}",
        format_size(row["bytes_per_token"]),
        f"{row['ttft_s']:.3f}",
        "" if ratio is None else f"{ratio:.3f}",
        "" if quartiles is None else "({:.2f} - {:.2f})".format(*quartiles),
    )
