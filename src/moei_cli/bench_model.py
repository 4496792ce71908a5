"""``moei bench MODEL``: the engine measured, with what it ran on and why it was set so."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moei_cli.device_options import device_sentence, device_settings
from moei_cli.prefetch_options import prefetching
from moei_core.config import ExpertBudget, format_size, parse_size
from moei_core.errors import ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from moei_core.engine.loaded_model import LoadedModel
    from moei_core.forecast.ledger import Actual
    from moei_core.hub.resolve import ModelFiles


REPEATS = 3


@dataclass(frozen=True, slots=True)
class ModelBenchOptions:
    """What a person asked for, as typed."""

    model: str | None = None
    synthetic: str | None = None
    layers: int | None = None
    quant: str | None = None
    trace: str | None = None
    policy: str | None = None
    experts: str | None = None
    ram: str | None = None
    context: int | None = None
    prompt_tokens: int = 64
    new_tokens: int = 32
    repeats: int | None = None
    predictor: str | None = None
    prefetch: str = "auto"
    device: str | None = None
    vram: str | None = None
    misses: str | None = None
    ablation: bool = False
    hints: float | None = None


def run_model_bench(options: ModelBenchOptions, *, json: bool) -> None:
    """Load, measure, report. Raises: what resolving and loading raise; UsageError."""
    repeats = REPEATS if options.repeats is None else options.repeats
    if min(options.prompt_tokens, repeats) < 1 or options.new_tokens < 2:
        raise UsageError("A measurement needs a prompt, two new tokens and one repeat at least.")
    if options.context is not None and options.context < options.prompt_tokens + options.new_tokens:
        # Before a model is loaded that could not be asked.
        raise UsageError(
            f"{options.prompt_tokens} prompt and {options.new_tokens} new tokens do not fit --context "
            f"{options.context}.",
            hint="Ask for fewer, or for a larger --context.",
        )
    budget = ExpertBudget.parse(options.experts) if options.experts else None
    ram = parse_size(options.ram, "--ram") if options.ram else None
    on_device = device_settings(options.device, options.vram, options.misses)
    predictor, mode = prefetching(options.predictor, options.prefetch, live=True)
    files = _find(options)
    name = files.name
    if options.ablation:
        from moei_cli.bench_ablation import run_ablation

        run_ablation(options, files, budget, ram, on_device, json=json)
        return

    from moei_cli import render
    from moei_cli.forecasts import NEVER_MEASURED, predict, print_beside, refusals_with_speed

    with render.waiting(f"Loading {name}"):
        from moei_core.cache.policies import DEFAULT_POLICY
        from moei_core.engine.forced_routing import follow
        from moei_core.engine.loaded_model import LoadedModel, LoadOptions
        from moei_core.engine.measure import measure_requests, summarise
        from moei_core.trace.hints import read_hinted

        with refusals_with_speed(files), naming_the_request(options):
            loaded = LoadedModel(
                files.folder,
                LoadOptions(
                    ram,
                    budget,
                    context_of(options),
                    options.policy or DEFAULT_POLICY,
                    predictor=predictor,
                    prefetch=mode,
                    **on_device,
                ),
            )
    for sentence in (*loaded.notes, device_sentence(loaded)):
        if sentence is not None:
            render.note(sentence)
    with loaded as model:
        if options.trace is not None:
            follow(model.runtime, model.spec, read_hinted(options.trace, options.hints))
        prediction = predict(
            model, files, options.prompt_tokens, "bench", follows_trace=options.trace is not None
        )
        with render.waiting(f"Measuring {name}"):
            found = measure_requests(model, options.prompt_tokens, options.new_tokens, repeats)
        report = _report(model, name, options) | {
            "conditions": {condition: summarise(requests) for condition, requests in found.items()}
        }
    if prediction is not None:
        prediction.settle(_actual(report["conditions"]))
    report["prediction"] = None if prediction is None else prediction.report()
    if json:
        render.print_json(report)
        return
    _show(report)
    if prediction is None:
        render.note(NEVER_MEASURED)
    else:
        print_beside(prediction)


def context_of(options: ModelBenchOptions) -> int:
    """Tokens of context: as asked for, else what the requests need."""
    # No model is opened for a conversation of fewer than 16.
    return max(16, options.prompt_tokens + options.new_tokens) if options.context is None else options.context


@contextmanager
def naming_the_request(options: ModelBenchOptions) -> Iterator[None]:
    """Who gave no --context is told of the tokens that it was made from."""
    try:
        yield
    except UsageError as error:
        asked = f"--context {context_of(options)} is"
        if options.context is None and error.what.startswith(asked):
            error.what = error.what.replace(
                asked, f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} are"
            )
        raise


def _actual(conditions: dict[str, Any]) -> Actual:
    """New prompts on a warm cache for the speed, the first one of all for the time to its first token."""
    from moei_core.forecast.ledger import Actual

    changing = conditions["changing"]
    return Actual(
        changing["decode_tokens_per_s"]["median"],
        conditions["cold"]["ttft_s"]["median"],
        changing["decode_hit_rate"]["median"],
        changing["decode_stall_share"]["median"],
        changing["decode_expert_share"]["median"],
        changing["decode_gpu_share"]["median"],
    )


def _find(options: ModelBenchOptions) -> ModelFiles:
    from moei_core.hub.resolve import resolve_model

    if options.synthetic is None:
        assert options.model is not None
        return resolve_model(options.model)
    from moei_cli import render
    from moei_cli.packing import pack_model
    from moei_core.hub.packed import UNPACKED, check_format
    from moei_core.hub.synthetic import full_name, make_synthetic
    from moei_core.hub.synthetic_models import SYNTHETIC_MODELS

    form = check_format(options.quant or UNPACKED, UNPACKED)
    if form == "mxfp4":
        # Before gigabytes are made that could not be packed so.
        raise UsageError(
            "--quant mxfp4: synthetic models are made in bf16, and moei does not round to MXFP4.",
            hint="Choose from: q8_0, q4_0, none.",
        )
    made = SYNTHETIC_MODELS.get(options.synthetic)
    if options.trace is not None and made is not None:
        from moei_core.engine.forced_routing import check_fits
        from moei_core.hub.summary import expert_count, expert_top_k
        from moei_core.trace import read_trace

        # Before gigabytes are made.
        experts = [expert_count(made.config)] * (options.layers or made.moe_layers)
        check_fits(read_trace(options.trace), experts, expert_top_k(made.config))
    if form != UNPACKED and made is not None:
        # What was packed once needs its source no more.
        with suppress(ModelNotFoundError):
            return resolve_model(f"{full_name(options.synthetic, options.layers or made.moe_layers)}:{form}")
    with render.PullBar(options.synthetic, verb="Making") as bar:
        files = make_synthetic(options.synthetic, options.layers, progress=bar)
    if form != UNPACKED:
        with render.PullBar(files.name, verb="Packing") as bar:
            pack_model(files, form, bar)
    return resolve_model(f"{files.name}:{form}")


def _report(model: LoadedModel, name: str, options: ModelBenchOptions) -> dict[str, Any]:
    from moei_core.engine.statistics import prefetch_verdict
    from moei_core.hardware.memory import peak_memory

    budget = model.budget
    return {
        "model": name,
        "format": model.adapter.packed.format.lower() if model.adapter.packed else "as published",
        "routing": "the router's" if options.trace is None else f"follows {options.trace}",
        "moe_layers": len(model.spec.num_experts),
        "num_experts": max(model.spec.num_experts.values()),
        "num_experts_per_tok": model.spec.num_experts_per_tok,
        "expert_bytes": max(model.spec.expert_nbytes.values()),
        "all_experts_bytes": model.spec.total_expert_nbytes,
        "dense_bytes": model.adapter.dense_nbytes,
        "slots": asdict(budget),
        "slots_bytes": budget.nbytes,
        "experts_in_ram": budget.experts,
        "device_budget": None if model.device_budget is None else asdict(model.device_budget),
        "policy": model.options.policy,
        "predictor": model.options.predictor,
        "prefetch_verdict": prefetch_verdict(model.scheduler),
        "ram_limit_bytes": model.options.ram,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "context": model.context,
        "load_s": round(model.load_s, 3),
        "peak_memory_bytes": peak_memory(),
        "provenance": _provenance(),
    }


def _provenance() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    import psutil
    import torch
    import transformers

    from moei_core import __version__
    from moei_core.quant import native

    return {
        "moei": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        # In decoding torch has one, and the native kernels have the cores.
        "threads": max(torch.get_num_threads(), native.num_threads() if native.available() else 1),
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _commit() -> str | None:
    """The commit of the source tree that runs; None when moei was installed from a wheel."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def _show(report: dict[str, Any]) -> None:
    from moei_cli import render

    slots, total = report["slots"], report["moe_layers"] * report["num_experts"]
    render.print_facts(
        [
            ("model", f"{report['model']}: {report['moe_layers']} MoE layers x {report['num_experts']} experts, "
             f"top-{report['num_experts_per_tok']}; {format_size(report['expert_bytes'])} an expert"),
            ("format", report["format"]),
            ("routing", report["routing"]),
            ("experts in RAM", f"{report['experts_in_ram']} of {total}, {format_size(report['slots_bytes'])}: "
             f"{slots['reason']}"),
            ("policy", report["policy"]),
            ("request", f"{report['prompt_tokens']} prompt tokens, {report['new_tokens']} new"),
            ("peak memory", format_size(report["peak_memory_bytes"])),
            ("machine", "{processor}, {threads} threads, load {load_average}".format(**report["provenance"])),
            ("versions", "moei {moei} ({commit}), torch {torch}, transformers {transformers}".format(
                **report["provenance"])),
        ]
    )  # fmt: skip
    headings = (
        "condition",
        "TTFT s",
        "prefill tok/s",
        "decode tok/s",
        "(min - max)",
        "hits",
        "read",
        "waiting",
    )
    rows = []
    for condition, figures in report["conditions"].items():
        decode = figures["decode_tokens_per_s"]
        waiting = figures["disk_s"]["median"] / figures["total_s"]["median"]
        rows.append(
            (
                condition,
                f"{figures['ttft_s']['median']:.3f}",
                f"{figures['prefill_tokens_per_s']['median']:.1f}",
                f"{decode['median']:.2f}",
                f"({decode['min']:.2f} - {decode['max']:.2f})",
                f"{figures['hit_rate']:.1%}",
                format_size(figures["bytes_read"]["median"]),
                f"{waiting:.0%}",
            )
        )
    render.print_table(headings, rows, right=headings[1:])
