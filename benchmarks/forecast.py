"""Forecast against actual: synthetic models of real shapes, every prediction written down before the first run.

    moei profile-hardware --again
    python benchmarks/forecast.py --output docs/forecast-table.md
    python benchmarks/forecast.py --only olmoe-1b-7b@4:q4_0        # a part; --list shows all
    python benchmarks/forecast.py --cases FILE --parts             # others, and where the time went

1. Predict: for each case the forecast of its config, of this machine and of a memory budget (``--ram``: what that share
   of the experts should take), as ``moei plan`` makes it; nothing of the ledger. All go to ``--predictions``. The run's
   own forecast, which the table shows, is written down by the command before it runs, after a look at the disk for the
   first token.
2. Run: ``moei bench --ram ... --experts ...``, each a process of its own in a control group of its --ram plus 5% where
   one can be made. New prompts on a warm cache give the speed, the first prompt of all its time to first token.
3. Compare: a table in Markdown, and one line of JSON. Exit status 1 if a case failed.
4. A second table: the same runs as a person at this machine would have had them forecast, corrected by what the runs
   above each had taught. The ledger begins empty; the machine's own is set aside meanwhile.

A geometry's model is made before its cases and removed after them. An idle virtual machine may have given its memory
back to its host; so that no run pays for getting it again, as much as it will use is taken and released before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from memory_group import capped, join, read_count

from moei_cli.measured_machine import stored_profile
from moei_core.config import ExpertBudget
from moei_core.forecast.forecast import forecast, plan_budget
from moei_core.forecast.formats import FORMATS
from moei_core.forecast.ledger import ledger_path
from moei_core.forecast.limits import agree, limits
from moei_core.forecast.shape import shape_of_config
from moei_core.forecast.speed import Speeds
from moei_core.hardware.probe import processor_seconds
from moei_core.hub.synthetic import make_synthetic
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS

CASES = (
    ("mixtral-8x7b@1", "bf16", ("50%", "100%")),
    ("mixtral-8x7b@1", "q4_0", ("50%", "100%")),
    ("qwen3-30b-a3b@4", "bf16", ("25%", "100%")),
    ("qwen3-30b-a3b@4", "q4_0", ("50%", "100%")),
    ("olmoe-1b-7b@4", "bf16", ("50%",)),
    ("olmoe-1b-7b@4", "q4_0", ("75%",)),
    ("deepseek-v2-lite@3", "bf16", ("35%", "60%")),
    ("deepseek-v2-lite@3", "q4_0", ("35%", "60%")),
)
"""2.8 to 4.8 GB of experts in bf16. Of DeepSeek's shape, and of 35% and 60%, nothing was looked at while the forecast
was made."""
_SPARE_RAM = 1.02
_CAP = 1.05


@dataclass(frozen=True, slots=True)
class Case:
    """One run and what is expected of it. ram: bytes. Times in seconds."""

    geometry: str
    form: str
    experts: str
    ram: int
    tokens_per_s: float
    ttft_s: float
    hit_rate: float
    limits: tuple[str, ...]
    decode_parts_s: dict[str, float]
    prefill_parts_s: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.geometry}:{self.form}:{self.experts}"


def predict(geometry: str, form: str, experts: str, speeds: Speeds, options: argparse.Namespace) -> Case:
    """The forecast of a case from its config alone."""
    name, _, layers = geometry.partition("@")
    config = SYNTHETIC_MODELS[name].cut(int(layers))
    shape = replace(shape_of_config(geometry, config), uniform_routing=True)
    context = options.prompt_tokens + options.new_tokens
    stored, share = FORMATS[form], ExpertBudget.parse(experts)
    whole = plan_budget(shape, stored, speeds, 1 << 60, context, experts=share)
    ram = int(sum(line.nbytes for line in whole.lines) * _SPARE_RAM)
    budget = plan_budget(shape, stored, speeds, 1 << 60, context, ram, share)
    one = forecast(shape, stored, speeds, budget, options.prompt_tokens)
    return Case(
        geometry,
        form,
        experts,
        ram,
        one.tokens_per_s.value,
        one.ttft_s.value,
        one.hit.value,
        one.limits,
        asdict(one.decode),
        asdict(one.prefill),
    )


def moei(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from moei_cli.main import main; main()", *arguments]


def make(case: Case) -> None:
    """Make the model of ``case`` and pack it, outside of any bound. Nothing happens if it is there."""
    name, _, layers = case.geometry.partition("@")
    make_synthetic(name, int(layers))
    if case.form != "bf16":
        subprocess.run(
            moei("quantize", f"synthetic:{case.geometry}", case.form), stdout=subprocess.DEVNULL, check=True
        )


def settle_memory(nbytes: int) -> None:
    """Let the host of a virtual machine give it so much memory now."""
    code = "import sys; b = bytearray(int(sys.argv[1])); b[::4096] = b'x' * len(b[::4096])"
    subprocess.run([sys.executable, "-c", code, str(nbytes)], check=False)


def spent() -> tuple[float, float]:
    """Processor seconds (of everybody, of this process's finished children), to tell how much others took."""
    children = os.times()
    return processor_seconds()[0], children.children_user + children.children_system


def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The report of ``case``, or what it said when it failed."""
    name, _, layers = case.geometry.partition("@")
    command = moei(
        "bench", "--synthetic", name, "--layers", layers, "--quant", "none" if case.form == "bf16" else case.form,
        "--ram", f"{case.ram >> 20}MiB", "--experts", case.experts, "--prompt-tokens", str(options.prompt_tokens),
        "--new-tokens", str(options.new_tokens), "--repeats", str(options.repeats), "--json",
    )  # fmt: skip
    settle_memory(case.ram)
    before, started = spent(), time.perf_counter()
    with capped(int(case.ram * _CAP)) as group:
        enter = None if group is None else partial(join, group)
        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=enter)
        peak = hits = None
        if group is not None:
            peak = read_count(group, ("memory.max_usage_in_bytes", "memory.peak"))
            hits = read_count(group, ("memory.failcnt",))
    wall = time.perf_counter() - started
    after = spent()
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-3:], "status": done.returncode}
    report: dict[str, Any] = json.loads(done.stdout)
    report["peak"] = report["peak_memory_bytes"] if peak is None else peak
    report["capped"], report["limit_hits"] = group is not None, hits
    report["others"] = max(0.0, (after[0] - before[0] - (after[1] - before[1])) / wall)
    report["wall_s"] = wall
    return report


def row(case: Case, report: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of one run."""
    changing, cold = report["conditions"]["changing"], report["conditions"]["cold"]
    stall, experts = (changing[f"decode_{name}_share"]["median"] for name in ("stall", "expert"))
    sizes = {"disk": stall, "experts": experts, "rest": 1 - stall - experts}
    a_token = 1 / changing["decode_tokens_per_s"]["median"]
    first, later = (
        {name: one[f"prefill_{name}_s"]["median"] for name in ("disk", "experts")} for one in (cold, changing)
    )
    first["rest"] = cold["ttft_s"]["median"] - sum(first.values())
    came = {"tokens_per_s": 1 / a_token, "ttft_s": cold["ttft_s"]["median"]}
    before = report["prediction"]
    learned = before["corrected"]
    later["rest"] = changing["ttft_s"]["median"] - sum(later.values())
    return asdict(case) | {
        # What the command itself wrote down before it ran, for the first token the disk looked at once more; beside it
        # the plan.
        **{name: before[name]["value"] for name in ("tokens_per_s", "ttft_s")},
        **{name: before[name] for name in ("limits", "decode_parts_s", "prefill_parts_s")},
        "planned_tokens_per_s": case.tokens_per_s,
        "planned_ttft_s": case.ttft_s,
        "in_range": sum(before[name]["low"] <= value <= before[name]["high"] for name, value in came.items()),
        **{f"came_{name}": value for name, value in came.items()},
        "corrected_tokens_per_s": learned["tokens_per_s"]["value"],
        "corrected_ttft_s": learned["ttft_s"]["value"],
        "learned_runs": learned["runs"],
        "came_hit_rate": changing["decode_hit_rate"]["median"],
        "came_limits": limits(sizes),
        "came_shares": sizes,
        "came_decode_parts_s": {name: share * a_token for name, share in sizes.items()},
        "came_prefill_parts_s": first,
        "came_warm_prefill_parts_s": later,
        "peak": report["peak"],
        "capped": report["capped"],
        "limit_hits": report["limit_hits"],
        "others": report["others"],
        "wall_s": report["wall_s"],
    }


def error(found: dict[str, Any], quantity: str, kind: str = "") -> float:
    """Forecast over actual, less one. kind: ``corrected_`` with what was learned, ``planned_`` without the run."""
    return float(found[kind + quantity] / found[f"came_{quantity}"] - 1)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model@layers | format | experts | tokens/s: forecast | came | error | TTFT s: forecast | came | error "
        "| limit: forecast | came | peak of --ram | others' cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        cells = [one["geometry"], one["form"], one["experts"]]
        for quantity in ("tokens_per_s", "ttft_s"):
            cells += [
                f"{one[quantity]:.3g}",
                f"{one[f'came_{quantity}']:.3g}",
                f"{error(one, quantity):+.0%}",
            ]
        cells += [", ".join(one["limits"]), ", ".join(one["came_limits"]), f"{one['peak'] / one['ram']:.0%}"]
        lines.append(f"| {' | '.join([*cells, format(one['others'], '.1f')])} |")
    return "\n".join(lines)


def corrected_table(rows: list[dict[str, Any]]) -> str:
    """The forecasts with what the rows above each had taught, in Markdown."""
    lines = [
        "| case | runs learned | tokens/s: corrected | came | error | TTFT s: corrected | came | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        cells = [f"{one['geometry']}:{one['form']}:{one['experts']}", str(one["learned_runs"])]
        for quantity in ("tokens_per_s", "ttft_s"):
            cells += [f"{one[f'corrected_{quantity}']:.3g}", f"{one[f'came_{quantity}']:.3g}"]
            cells.append(f"{error(one, quantity, 'corrected_'):+.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(rows: list[dict[str, Any]]) -> str:
    """Where the time of a token and of the first one was expected to go, and went, in Markdown."""
    lines = [
        "| case | of | disk: forecast | came | experts: forecast | came | rest: forecast (dense, framework) | came |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        for what, name in (("a token, ms", "decode"), ("first token, ms", "prefill")):
            expected = {part: seconds * 1e3 for part, seconds in one[f"{name}_parts_s"].items()}
            came = {part: f"{seconds * 1e3:.1f}" for part, seconds in one[f"came_{name}_parts_s"].items()}
            dense, framework = expected["dense"], expected["framework"]
            cells = [f"{one['geometry']}:{one['form']}:{one['experts']}", what]
            cells += [f"{expected['disk']:.1f}", came["disk"], f"{expected['experts']:.1f}", came["experts"]]
            cells += [f"{dense + framework:.1f} ({dense:.1f}, {framework:.1f})", came["rest"]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error of each quantity, and how often the bottleneck was right."""
    found: dict[str, Any] = {"runs": len(rows)}
    for kind in ("", "planned_", "corrected_"):
        for quantity in ("tokens_per_s", "ttft_s"):
            errors = [abs(error(one, quantity, kind)) for one in rows]
            found[kind + quantity] = {
                "median_error": round(statistics.median(errors), 4),
                "worst_error": round(max(errors), 4),
            }
    found["bottleneck_right"] = sum(agree(one["limits"], one["came_limits"]) for one in rows)
    found["in_range"] = sum(one["in_range"] for one in rows) / (2 * len(rows))
    found["two_limits_named"] = sum(len(one["limits"]) > 1 for one in rows)
    found["compute_bound"] = sum(one["came_limits"][0] != "disk" for one in rows)
    found["peak_over_ram"] = round(max(one["peak"] / one["ram"] for one in rows), 4)
    return found


def errors_in_words(found: dict[str, Any], kind: str = "") -> str:
    speed, first = found[f"{kind}tokens_per_s"], found[f"{kind}ttft_s"]
    return (
        f"Tokens/s: median error {speed['median_error']:.0%}, worst {speed['worst_error']:.0%}. Time to first token: "
        f"median error {first['median_error']:.0%}, worst {first['worst_error']:.0%}."
    )


def in_words(found: dict[str, Any]) -> str:
    return (
        f"{found['runs']} runs, {found['compute_bound']} of them bound by computing. {errors_in_words(found)} "
        f"{found['in_range']:.0%} of the figures came within their ranges. Planned, before the disk was looked at "
        f"once more: {errors_in_words(found, 'planned_')} "
        f"The limit was right in {found['bottleneck_right']}, and two were named in {found['two_limits_named']}. "
        f"The highest peak was {found['peak_over_ram']:.1%} of --ram."
    )


@contextmanager
def empty_ledger() -> Iterator[None]:
    """What this machine has learned is set aside, and there again afterwards."""
    path = ledger_path()
    aside = path.with_suffix(".aside.jsonl")
    if path.exists():
        path.replace(aside)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if aside.exists():
            aside.replace(path)


def run_all(
    cases: list[Case], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the cases that ran, and what the others said."""
    rows, failures = [], []
    for geometry, group in groupby(cases, key=lambda one: one.geometry):
        for case in group:
            make(case)
            report = run(case, options)
            if "failed" in report:
                failures.append({"case": case.name, **report})
                print(f"{case.name} failed: {report['failed']}", file=sys.stderr)
                continue
            rows.append(row(case, report))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
        if not options.keep:
            for packed in (":q4_0", ""):
                name = f"synthetic:{geometry}{packed}"
                subprocess.run(moei("rm", "--yes", name), capture_output=True, check=False)
    return rows, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name begins with one of these")
    parser.add_argument(
        "--list", action="store_true", help="print the cases and their forecasts, run nothing"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--parts", action="store_true", help="also print where the time went, beside the forecast"
    )
    parser.add_argument(
        "--cases", type=Path, help="other cases: JSON [[model@layers, format, [shares]], ...]"
    )
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument(
        "--predictions", type=Path, default=Path(tempfile.gettempdir(), "moei-predictions.json")
    )
    parser.add_argument("--output", type=Path, help="write the table there too")
    options = parser.parse_args()
    profile = stored_profile()
    if profile is None:
        sys.exit("This machine has not been measured: moei profile-hardware")
    speeds = Speeds.of(profile, profile.disk_of(None))
    predicted = [
        predict(geometry, form, share, speeds, options)
        for geometry, form, shares in (json.loads(options.cases.read_text()) if options.cases else CASES)
        for share in shares
    ]
    cases = [one for one in predicted if any(one.name.startswith(name) for name in options.only)]
    options.predictions.write_text(
        json.dumps({"measured_at": profile.measured_at, "cases": [asdict(one) for one in cases]}, indent=1)
    )
    print(f"{len(cases)} predictions are in {options.predictions}.", file=sys.stderr)
    if options.list:
        for one in cases:
            print(
                f"{one.name}: {one.tokens_per_s:.3g} tokens/s, first after {one.ttft_s:.3g} s, {', '.join(one.limits)}"
            )
        return
    with empty_ledger():
        rows, failures = run_all(cases, options)
    if rows:
        found = summary(rows)
        text = f"{table(rows)}\n\n{in_words(found)}\n\nCorrected by the runs above each:\n\n"
        text += f"{corrected_table(rows)}\n\n{errors_in_words(found, 'corrected_')}"
        if options.parts:
            text += f"\n\n{parts_table(rows)}"
        print(text)
        if options.output:
            options.output.write_text(text + "\n")
        print(json.dumps(found | {"rows": rows, "failures": failures}))
    sys.exit(1 if failures or not rows else 0)


if __name__ == "__main__":
    main()
