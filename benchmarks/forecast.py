"""Forecast against actual: run synthetic models of real shapes, each with its prediction written before the run.

Every run is a process of its own (``moei bench --synthetic ... --ram ... --experts ... --json``), so that its memory is
what it needs and nothing else. The ledger is cleared first: the column "forecast" has learned nothing, "learned" is
what the runs above it have taught. ``--memcap`` names a program that caps a command's memory, called as
``PROGRAM MIB COMMAND ...``; then each run is capped at its --ram plus 5%.

    moei profile-hardware --again
    python benchmarks/forecast.py --geometry qwen3-30b-a3b@6 --format bf16 --experts 25% 50% 100%
    python benchmarks/forecast.py --all --output docs/forecast-table.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moei_cli.measured_machine import stored_profile
from moei_core.config import ExpertBudget, format_size
from moei_core.forecast import ledger
from moei_core.forecast.forecast import plan_budget
from moei_core.forecast.formats import FORMATS
from moei_core.forecast.shape import shape_of_config
from moei_core.forecast.speed import Speeds
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS

ALL = (
    ("mixtral-8x7b@2", ("25%", "50%", "100%")),
    ("deepseek-v2-lite@6", ("25%", "50%", "100%")),
    ("qwen3-30b-a3b@6", ("25%", "50%", "75%", "100%")),
    ("olmoe-1b-7b@8", ("25%", "60%", "100%")),
)
"""About 5 to 8 GB of bf16 weights each. OLMoE's shape and 60% and 75% were used for no tuning."""
_SPARE_RAM = 1.02


@dataclass(frozen=True, slots=True)
class Case:
    """One run. geometry: ``name@layers``. ram: what the forecast says that share of the experts needs, in bytes."""

    geometry: str
    form: str
    experts: str
    ram: int

    def command(self, options: argparse.Namespace) -> list[str]:
        name, _, layers = self.geometry.partition("@")
        program = [sys.executable, "-c", "from moei_cli.main import main; main()"]
        if options.memcap:
            program = [options.memcap, str(int(self.ram * 1.05) >> 20), *program]
        return [
            *program, "bench", "--synthetic", name, "--layers", layers, "--experts", self.experts,
            "--ram", f"{self.ram >> 20}MiB", "--prompt-tokens", str(options.prompt_tokens),
            "--new-tokens", str(options.new_tokens), "--repeats", str(options.repeats), "--json",
            *(["--quant", self.form] if self.form != "bf16" else []),
        ]  # fmt: skip


def ram_of(geometry: str, form: str, experts: str, speeds: Speeds, context: int) -> int:
    """The whole process with that share of the experts, and a little more."""
    name, _, layers = geometry.partition("@")
    shape = shape_of_config(geometry, SYNTHETIC_MODELS[name].cut(int(layers)))
    budget = plan_budget(shape, FORMATS[form], speeds, 1 << 60, context, experts=ExpertBudget.parse(experts))
    return int(sum(line.nbytes for line in budget.lines) * _SPARE_RAM)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    profile = stored_profile()
    if profile is None:
        sys.exit("This machine has not been measured: moei profile-hardware")
    speeds = Speeds.of(profile, profile.disk_of(None))
    context = options.prompt_tokens + options.new_tokens
    for geometry, shares in ALL if options.all else [(one, options.experts) for one in options.geometry]:
        for form in options.format:
            for share in shares:
                yield Case(geometry, form, share, ram_of(geometry, form, share, speeds, context))


def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The report of ``case``, or what it said when it failed."""
    done = subprocess.run(case.command(options), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-3:], "status": done.returncode}
    report: dict[str, Any] = json.loads(done.stdout)
    if options.memcap:
        report["memcap"] = json.loads(done.stderr.strip().splitlines()[-1])
    return report


def row(case: Case, report: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of one run."""
    told = report["prediction"]
    came = told["actual"]
    peak = report.get("memcap", {}).get("peak_mib", report["peak_memory_bytes"] >> 20)
    return {
        "geometry": case.geometry,
        "format": case.form,
        "experts": case.experts,
        "residency": report["slots"]["resident"] / (report["moe_layers"] * report["num_experts"]),
        "tokens_per_s": came["tokens_per_s"],
        "forecast_tokens_per_s": told["tokens_per_s"]["value"],
        "learned_tokens_per_s": told["corrected"]["tokens_per_s"]["value"],
        "ttft_s": came["ttft_s"],
        "forecast_ttft_s": told["ttft_s"]["value"],
        "learned_ttft_s": told["corrected"]["ttft_s"]["value"],
        "bottleneck": came["bottleneck"],
        "forecast_bottleneck": told["bottleneck"],
        "parts_s": told["decode_parts_s"],
        "prefill_parts_s": told["prefill_parts_s"],
        "actual_shares": [came["stall_share"], came["expert_share"]],
        "ram_mib": case.ram >> 20,
        "peak_mib": peak,
        "load_average": report["provenance"]["load_average"],
    }


def error(found: dict[str, Any], quantity: str, kind: str) -> float:
    """Forecast over actual, less one."""
    return float(found[f"{kind}_{quantity}"] / found[quantity] - 1)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model@layers | format | experts | tokens/s: came | forecast | learned | TTFT s: came | forecast | learned "
        "| limit: came | forecast | peak of --ram |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        cells = [one["geometry"], one["format"], one["experts"]]
        for quantity in ("tokens_per_s", "ttft_s"):
            cells.append(f"{one[quantity]:.3g}")
            for kind in ("forecast", "learned"):
                cells.append(f"{one[f'{kind}_{quantity}']:.3g} ({error(one, quantity, kind):+.0%})")
        cells += [one["bottleneck"], one["forecast_bottleneck"], f"{one['peak_mib'] / one['ram_mib']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error of each quantity, and how often the bottleneck was right."""
    found: dict[str, Any] = {"runs": len(rows)}
    for kind in ("forecast", "learned"):
        for quantity in ("tokens_per_s", "ttft_s"):
            errors = [abs(error(one, quantity, kind)) for one in rows]
            found[f"{kind}_{quantity}"] = {
                "median_error": round(statistics.median(errors), 4),
                "worst_error": round(max(errors), 4),
            }
    found["bottleneck_right"] = sum(one["bottleneck"] == one["forecast_bottleneck"] for one in rows)
    found["compute_bound"] = sum(one["bottleneck"] != "disk" for one in rows)
    found["peak_over_ram"] = round(max(one["peak_mib"] / one["ram_mib"] for one in rows), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--all", action="store_true", help="the geometries and shares of the documented table"
    )
    parser.add_argument("--geometry", nargs="+", default=["olmoe-1b-7b@2"], metavar="NAME@LAYERS")
    parser.add_argument("--format", nargs="+", default=["bf16"])
    parser.add_argument("--experts", nargs="+", default=["50%"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memcap", help="a program that caps memory: PROGRAM MIB COMMAND ...")
    parser.add_argument("--output", type=Path, help="write the table there too")
    options = parser.parse_args()
    ledger.clear()
    rows, failures = [], []
    for case in cases(options):
        where = f"{case.geometry} {case.form} {case.experts} --ram {format_size(case.ram)}"
        print(where, file=sys.stderr)
        report = run(case, options)
        if "failed" not in report and report["prediction"] is None:
            report = {
                "failed": ["There was no prediction: the profile is not of the machine that this run saw."]
            }
        if "failed" in report:
            failures.append({"case": where, **report})
            print(f"failed: {report['failed']}", file=sys.stderr)
            continue
        rows.append(row(case, report))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    if not rows:
        sys.exit("No run succeeded.")
    print(table(rows))
    if options.output:
        options.output.write_text(table(rows) + "\n")
    print(json.dumps(summary(rows) | {"rows": rows, "failures": failures}))


if __name__ == "__main__":
    main()
