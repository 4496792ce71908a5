"""The only file that knows Rich: consoles, tables, waiting, streaming Markdown. Being that, it has over 400 lines.

Answers and reports go to standard output, everything else to standard error. Without a terminal, or with
NO_COLOR, no escape code is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from moei_core.config import format_size
from moei_core.errors import MoeiError

if TYPE_CHECKING:
    from moei_core.engine.chat_session import ChatSession, PromptProgress, TurnReport
    from moei_core.engine.text_stream import TextPiece


def is_plain(stream: TextIO) -> bool:
    """Whether ``stream`` must get no escape codes."""
    return not stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def console(stream: TextIO) -> Console:
    """A console on ``stream`` that styles only a real terminal and only if NO_COLOR is not set."""
    plain = is_plain(stream)
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        no_color=plain,
        highlight=False,
        force_terminal=not plain,
        soft_wrap=plain,
    )


def note(text: str) -> None:
    """One line of information for the person, on standard error."""
    console(sys.stderr).print(Text(text, style="dim"))


def problem(error: MoeiError) -> None:
    """An error that does not end the program."""
    first, *rest = error.lines()
    console(sys.stderr).print(Text("\n".join([first, *rest]), style="red"))


def print_json(report: dict[str, Any]) -> None:
    """The one JSON object that a command with ``--json`` writes to standard output."""
    print(json.dumps(report, indent=2, ensure_ascii=False))


def key_values(rows: Mapping[str, str]) -> None:
    """Names and their values or meanings, in two columns, on standard error."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console(sys.stderr).print(table)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on standard error while the block runs; nothing where there is no terminal."""
    if is_plain(sys.stderr):
        yield
        return
    with console(sys.stderr).status(Text(text, style="dim")):
        yield


def status_line(report: TurnReport, memory: int) -> str:
    """What the expert cache does, in one line."""
    speed = f"{report.decode_tokens_per_s:.1f} tokens/s" if report.times.token_s else "reading the prompt"
    if report.device is not None:
        speed += f" · {report.device.hit_rate:.0%} hits on the GPU"
    return (
        f"{speed} · {report.cache.hit_rate:.0%} hits in RAM, {report.cache.misses} misses · "
        f"{format_size(report.runtime.bytes_read)} read, {report.stall_share:.0%} waiting · "
        f"RAM {format_size(memory)}"
    )


def statistics(session: ChatSession) -> None:
    """The whole picture of the last turn and of the cache, on standard error."""
    from moei_cli.device_options import device_rows
    from moei_core.engine.time_split import percentiles
    from moei_core.hardware.memory import peak_memory, resident_memory

    model, report = session.model, session.report
    slots, total = model.budget, model.spec.total_experts
    counts, work = model.scheduler.statistics, model.runtime.statistics
    rows = {
        "experts": f"{model.scheduler.resident_count} resident, slots for {slots.experts} of {total} "
        f"({format_size(slots.nbytes)}; {slots.reason})",
        "policy": model.options.policy,
        "all turns": f"{counts.hit_rate:.1%} hits ({counts.hits} of {counts.hits + counts.misses}), "
        f"{counts.evictions} evicted, {counts.bypasses} passed through",
        "read from disk": f"{work.loads} experts, {format_size(work.bytes_read)}",
        "memory": f"{format_size(resident_memory())} now, {format_size(peak_memory())} at most",
    }
    rows |= device_rows(session)
    if report is not None:
        times, run = report.times, report.runtime
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.time_split.items())
        tokens = "".join(f", {name} {s * 1e3:.0f} ms" for name, s in percentiles(times.token_s).items())
        rows |= {
            "last turn": f"{report.prompt_tokens} prompt tokens ({report.reused_tokens} known from before), "
            f"{report.new_tokens} new, ended by {report.finish_reason}",
            "speed": f"first token after {times.prefill_s:.2f} s, then {report.decode_tokens_per_s:.1f} tokens/s"
            f"{tokens}",
            "its experts": f"{report.cache.hit_rate:.1%} hits, {report.cache.misses} misses, "
            f"{format_size(run.bytes_read)} read",
            "its time": f"{report.total_s:.2f} s: {parts}",
        }
        if model.options.predictor is not None:
            done, shares = report.prefetch, report.prefetch_shares
            rows["prefetching"] = (
                f"{report.verdict}; last turn: {done.started} begun, {done.useful} useful, {done.late} late, "
                f"{done.wasted} wasted, {done.cancelled} cancelled: {shares['coverage']:.0%} of what would have been "
                f"missing covered, {shares['lateness']:.0%} of it late, {shares['waste']:.0%} read in vain"
            )
    key_values(rows)


_SHOW_PROMPT_AFTER = 0.7
"""Seconds of a prompt's reading before a line about it appears: most are over by then."""


def prompt_line(progress: PromptProgress) -> str:
    """How far the reading of a prompt is, in one line."""
    left = progress.seconds_left
    soon = "" if left is None else f", about {left:.0f} s left"
    waiting = progress.stall_s / progress.seconds if progress.seconds else 0.0
    return (
        f"reading the prompt: {progress.share:.0%} of {progress.tokens} tokens{soon} · "
        f"{format_size(progress.nbytes)} read, {waiting:.0%} waiting"
    )


def after_prompt(pieces: Iterable[TextPiece], session: ChatSession) -> Iterator[TextPiece]:
    """``pieces``; until the first one comes, standard error shows how far the prompt is, if it is a terminal."""
    reply = iter(pieces)
    if is_plain(sys.stderr):
        yield from reply
        return

    def line() -> Text:
        progress = session.prompt_progress()
        shown = progress is not None and progress.seconds > _SHOW_PROMPT_AFTER
        text = prompt_line(progress) if progress is not None and shown else ""
        return Text(text, style="dim", no_wrap=True, overflow="ellipsis")

    with Live(
        console=console(sys.stderr),
        get_renderable=line,
        refresh_per_second=4,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        first = next(reply, None)
    if first is not None:
        yield first
        yield from reply


def show_reply(pieces: Iterable[TextPiece], session: ChatSession) -> None:
    """Show a reply while it comes: Markdown with a live status on a terminal, else the bare text."""
    pieces = after_prompt(pieces, session)
    if is_plain(sys.stdout):
        _write_reply(pieces)
    else:
        _stream_reply(pieces, session)


def _write_reply(pieces: Iterable[TextPiece]) -> None:
    last = ""
    for piece in pieces:
        if not piece.thinking:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            last = piece.text
    if not last.endswith("\n"):
        sys.stdout.write("\n")


def _stream_reply(pieces: Iterable[TextPiece], session: ChatSession) -> None:
    from moei_core.hardware.memory import resident_memory

    out = console(sys.stdout)
    block, thinking = "", False

    def view(status: bool) -> Group:
        parts: list[RenderableType] = [_as_markdown(block, thinking)] if block.strip() else []
        if status and session.report is not None:
            line = Text(status_line(session.report, resident_memory()), style="dim", no_wrap=True)
            line.truncate(out.width, overflow="ellipsis")
            parts.append(line)
        return Group(*parts)

    # Only the paragraph under way is redrawn; finished ones are printed once above it, so nothing flickers.
    with Live(console=out, auto_refresh=False, vertical_overflow="visible") as live:
        for piece in pieces:
            if piece.thinking != thinking:
                out.print(_as_markdown(block, thinking))
                block, thinking = "", piece.thinking
            block += piece.text
            while (split := _finished(block, out.height - 4)) is not None:
                done, block = split
                out.print(_as_markdown(done, thinking))
                out.print()
            live.update(view(status=True), refresh=True)
        live.update(view(status=False), refresh=True)
    if session.report is not None:
        note(status_line(session.report, resident_memory()) + "\n")


def _as_markdown(text: str, thinking: bool) -> RenderableType:
    return Text(text.strip(), style="dim italic") if thinking else Markdown(text)


def _finished(block: str, most_lines: int) -> tuple[str, str] | None:
    """Split off the first finished part of ``block``: up to a blank line outside of a code fence, or what
    has outgrown the screen. None: all of it is still under way."""
    fence = ""
    lines = block.split("\n")
    for number, line in enumerate(lines[:-1]):
        if line.lstrip().startswith("```"):
            fence = "" if fence else line
        if not line.strip() and not fence and number:
            return "\n".join(lines[:number]), "\n".join(lines[number + 1 :])
        if number + 1 >= max(8, most_lines):
            close, reopen = ("\n```", f"{fence}\n") if fence else ("", "")
            return "\n".join(lines[: number + 1]) + close, reopen + "\n".join(lines[number + 1 :])
    return None


class PullBar:
    """Progress of a download with rate and time left, on standard error; without a terminal only its notes.

    It is a ``moei_core.hub.transfer.PullProgress`` and a context manager.
    """

    def __init__(self, name: str, verb: str = "Pulling") -> None:
        self._name = name
        self._verb = verb
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console(sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(name, total=None, visible=False)

    def __enter__(self) -> PullBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start(self, total: int, present: int) -> None:
        if present < total:
            self.note(f"{self._verb} {self._name}: {format_size(total - present)} of {format_size(total)}.")
            self._progress.update(self._task, total=total, completed=present, visible=True)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)

    def note(self, text: str) -> None:
        self._progress.console.print(Text(text, style="dim"))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Aligned columns on standard output; those of the headings in ``right`` are aligned to the right.

    Nothing is cut or folded: the lines are as long in a pipe as on a terminal, and greppable in both.
    """
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    stdout = console(sys.stdout)
    for row in (headings, *rows):
        cells = (
            text.rjust(width) if heading in right else text.ljust(width)
            for text, width, heading in zip(row, widths, headings, strict=True)
        )
        line = "  ".join(cells).rstrip()
        stdout.print(
            line, style="bold" if row is headings else None, markup=False, emoji=False, soft_wrap=True
        )


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Aligned ``name  value`` lines on standard output."""
    width = max(len(name) for name, _ in facts)
    stdout = console(sys.stdout)
    for name, value in facts:
        stdout.print(f"{name:<{width}}  {value}", markup=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error with rate and time left; yields what to call for each step done."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(sys.stderr),
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


def simulation_table(rows: list[dict[str, Any]]) -> None:
    """What each policy came to at each budget, on standard output."""
    prefetches = any(row["prefetched_bytes"] for row in rows)
    several = any(row["interleave"] != 1 for row in rows)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "experts": lambda row: row["experts"],
        **({"users": lambda row: str(row["interleave"])} if several else {}),
        "policy": lambda row: row["policy"],
        "hit": lambda row: f"{row['hit_rate']:.3f}",
        "gap closed": lambda row: "" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}",
        "RAM hit": lambda row: "" if row["ram_hit_rate"] is None else f"{row['ram_hit_rate']:.3f}",
        "missed": lambda row: format_size(row["demand_missed_bytes"]),
        **({"prefetched": lambda row: format_size(row["prefetched_bytes"])} if prefetches else {}),
        "stall": lambda row: f"{row['stall_share']:.0%}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:.2f}",
        "bound": lambda row: f"{row['bound_own_hits_tokens_per_second']:.2f}",
        "Belady's": lambda row: (
            "" if (bound := row["bound_belady_tokens_per_second"]) is None else f"{bound:.2f}"
        ),
    }
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("experts", "users", "policy") else "right", no_wrap=True
        )
    before: tuple[Any, ...] = ()
    for row in rows:
        group = (row["experts"], row["interleave"])
        if before and group != before:
            table.add_section()
        before = group
        table.add_row(*(show(row) for show in columns.values()))
    out = console(sys.stdout)
    if not sys.stdout.isatty():
        # A file or a pipe has no width: the table may take what it needs.
        out.width = 200
    out.print(table)


@contextlib.contextmanager
def steps(text: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for work that tells its steps; yields what to call with (what, done, total)."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=console(sys.stderr),
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as bar:
        task = bar.add_task(text, total=None)
        yield lambda what, done, total: bar.update(
            task, description=f"{text}: {what}", completed=done, total=total
        )


_SHADES = " .:-=+*#%@"


def trace_summary(
    report: dict[str, Any], matrix: list[list[int]], layers: Sequence[int], request: int
) -> None:
    """A trace in numbers and one request's activations as a heat map of characters, on standard output."""
    from moei_core.trace.time_spent import PARTS

    out = console(sys.stdout)
    out.print(
        f"{report['model']}: {report['tokens']} tokens, {report['sequences']} sequences, "
        f"{report['requests']} requests, top-{report['num_experts_per_tok']} of {report['num_experts']}",
        markup=False,
    )
    lags = "  ".join(f"{lag}: {share:.2f}" for lag, share in report["overlap_by_lag"].items())
    out.print(
        f"overlap with the token so far back  {lags}  (uniform {report['uniform_overlap']:.2f})", markup=False
    )
    if turns := report["time_split_s"]:
        spent = {part: sum(turn.get(part, 0.0) for turn in turns) for part in PARTS}
        total = sum(spent.values()) or 1.0
        shares = "  ".join(f"{part}: {seconds / total:.1%}" for part, seconds in spent.items() if seconds)
        out.print(f"time of {len(turns)} turns, {total:.2f} s  {shares}", markup=False)
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "top quarter", "entropy", "reuse in 8", "touched"):
        table.add_column(name, justify="right")
    for one in report["layers"]:
        table.add_row(
            str(one["layer"]),
            f"{one['top_quarter']:.2f}",
            f"{one['entropy']:.2f}",
            f"{one['reuse']:.2f}",
            str(one["touched"]),
        )
    out.print(table)
    width = max(20, min(out.width - 8, len(matrix[0])))
    out.print(f"request {request}: rows are layers, columns experts, darker is more", markup=False)
    for layer, row in zip(layers, matrix, strict=True):
        # Wide layers share columns: each character stands for the busiest expert under it.
        cells = [
            max(row[len(row) * i // width : max(len(row) * (i + 1) // width, len(row) * i // width + 1)])
            for i in range(min(width, len(row)))
        ]
        top = max(max(row), 1)
        line = "".join(_SHADES[(len(_SHADES) - 1) * cell // top] for cell in cells)
        out.print(f"{layer:>4} |{line}|", markup=False)
