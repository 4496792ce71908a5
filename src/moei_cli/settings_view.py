"""``moei show MODEL --settings``: what a chat would be set to on this machine, each value with where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moei_cli import render
from moei_cli.forecasts import shape_of, speed_of_the_smallest
from moei_cli.measured_machine import stored_profile
from moei_cli.plan_view import print_budget
from moei_cli.planner import lengths, usual_format
from moei_cli.settings import Setting, naming_origins
from moei_core.cache.policies import DEFAULT_POLICY
from moei_core.config import CHUNK_NBYTES, DEFAULT_CONTEXT, READERS, format_size
from moei_core.errors import DoesNotFitError
from moei_core.forecast.forecast import plan_budget
from moei_core.forecast.speed import ASSUMED_FRAMEWORK, Speeds
from moei_core.hardware.gpus import load_nvml, read_gpus, visible_gpus
from moei_core.hardware.system import read_memory


def _origin(setting: Setting, why: str) -> str:
    """Where a value comes from; why an automatic one is what it is."""
    return f"automatic: {why}" if setting.text is None else setting.origin


_WITHOUT_MODEL = {
    "ram": "what is free decides",
    "experts": "as many as fit",
    "context": f"the model's, at most {DEFAULT_CONTEXT}",
    "policy": f"{DEFAULT_POLICY}, the best of docs/policies.md",
    "predictor": "default: what is followed must prove faster",
    "prefetch": "auto: a predictor is followed only while that is faster",
    "device": "the first GPU, if the model's dense part fits there",
    "vram": "what is free decides",
    "misses": "auto: what costs less, a copy or the processor",
}


def _device_rows(chosen: Mapping[str, Setting]) -> list[tuple[str, str, str]]:
    """The GPU that a chat would use, without starting CUDA."""
    gpus, _ = read_gpus(load_nvml(), os.getpid())
    seen = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    device, vram, misses = (chosen[name] for name in ("device", "vram", "misses"))
    name, why = "cpu", "no GPU" if not gpus else "CUDA_VISIBLE_DEVICES hides every GPU"
    if seen:
        name, why = f"cuda:0 {seen[0].name}", "automatic: if the model's dense part fits there"
    if len(seen) > 1:
        others = ", ".join(f"cuda:{i} {gpu.name}" for i, gpu in enumerate(seen) if i)
        why += f"; one GPU of {len(seen)} is used, not {others}: --device chooses"
    rows = [("device", device.text or name, device.origin if device.text else why)]
    if seen or vram.text:
        rows.append(("vram", vram.text or "no bound", _origin(vram, _WITHOUT_MODEL["vram"])))
    if seen or misses.text:
        rows.append(
            ("misses", misses.text or "auto", _origin(misses, "what costs less, a copy or the processor"))
        )
    return rows


def show_settings(model: str | None, chosen: Mapping[str, Setting], *, as_json: bool) -> None:
    """Print the settings, and with a model its memory budget, without loading anything.

    Raises: what finding the model raises; UsageError; DoesNotFitError.
    """
    if model is None:
        rows = [
            (name, one.text or "automatic", _WITHOUT_MODEL[name] if one.text is None else one.origin)
            for name, one in chosen.items()
        ]
        if as_json:
            render.print_json(
                {"settings": {name: {"value": value, "reason": why} for name, value, why in rows}}
            )
        else:
            render.print_table(("setting", "value", "where from"), rows)
        return
    shape, folder = shape_of(model)
    memory, profile = read_memory(), stored_profile()
    if profile is not None:
        speeds = Speeds.of(profile, profile.disk_of(folder))
    else:
        # A budget needs no speeds but the memory of the process, of which a typical value is known.
        speeds = Speeds(0.0, ASSUMED_FRAMEWORK, None)
    limit, bound, context = (chosen[name].value for name in ("ram", "experts", "context"))
    form = usual_format(shape)
    with naming_origins(chosen):
        tokens, _ = lengths(shape, context, None)
    with naming_origins(chosen):
        try:
            budget = plan_budget(shape, form, speeds, memory.usable, tokens, limit, bound)
        except DoesNotFitError as error:
            error.hint += speed_of_the_smallest(error, shape, form, profile, folder)
            raise
    rows = [
        ("ram", format_size(limit) if limit else "no bound", _origin(chosen["ram"], "what is free decides")),
        ("experts", f"{budget.slots} slots of {format_size(budget.slot_nbytes)}",
         _origin(chosen["experts"], budget.reason)),
        ("working set", f"{budget.working} slots", "one token's experts of a layer, so that an access never fails"),
        ("context", f"{tokens} tokens", _origin(chosen["context"], _WITHOUT_MODEL["context"])),
        ("policy", chosen["policy"].text or DEFAULT_POLICY,
         _origin(chosen["policy"], "the best of docs/policies.md")),
        ("predictor", chosen["predictor"].text or "default",
         _origin(chosen["predictor"], "the model's own routers, applied early, are tried first")),
        ("prefetch", chosen["prefetch"].text or "auto",
         _origin(chosen["prefetch"], "a predictor is followed only while that is faster")),
        ("prompt chunk", f"{budget.prefill_chunk} tokens",
         "as many as half a GiB serves, by the model's shape: results never depend on a budget"),
        ("readers", f"{READERS}, {format_size(CHUNK_NBYTES)} at a time",
         "fixed: a disk reaches its bandwidth at a few megabytes in flight"),
        ("free memory", format_size(memory.usable), memory.reason),
        *_device_rows(chosen),
    ]  # fmt: skip
    if as_json:
        report: dict[str, Any] = {
            "model": shape.name,
            "settings": {name: {"value": value, "reason": why} for name, value, why in rows},
            "budget": [asdict(line) for line in budget.lines],
            "slots": budget.slots,
            "resident": budget.resident,
            "limit_bytes": budget.limit,
        }
        render.print_json(report)
        return
    render.print_table(("setting", "value", "where from"), rows)
    print()
    print_budget(budget.lines)
    if profile is None:
        render.note("The runtime's memory is a typical value: moei profile-hardware measures it.")
