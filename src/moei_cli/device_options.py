"""``--device``, ``--vram`` and ``--misses``: the same words in every command that runs a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moei_cli.choices import one_of
from moei_core.config import format_size, parse_size
from moei_core.errors import UsageError

if TYPE_CHECKING:
    from moei_cli.settings import Setting
    from moei_core.engine.chat_session import ChatSession
    from moei_core.engine.loaded_model import LoadedModel

DeviceOption = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda or cuda:1; auto uses the first GPU, if the model's dense part fits."),
]
VramOption = Annotated[str | None, typer.Option(help="Bound on the GPU's memory, such as 8GiB.")]
MissesOption = Annotated[
    str | None,
    typer.Option(
        help="Experts that the GPU does not hold: auto takes what costs less, a copy or the processor; "
        "copy makes results independent of --vram, bit by bit."
    ),
]


def check_misses(text: str, where: str = "--misses") -> str:
    """What ``--misses`` may say. Raises: UsageError, naming ``where``."""
    return one_of(text, {way: way for way in ("auto", "copy")}, where)


def check_device(text: str, where: str = "--device") -> str:
    """What ``--device`` may say. Raises: UsageError, naming ``where``."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise UsageError(
            f"{where}: there is no device '{text}'.", hint="Choose from: auto, cpu, cuda, cuda:1."
        )
    return text


def device_settings(device: str | None, vram: str | None, misses: str | None) -> dict[str, Any]:
    """Fields of ``LoadOptions``. Raises: UsageError for what means nothing."""
    return {
        "device": check_device(device or "auto"),
        "vram": parse_size(vram, "--vram") if vram else None,
        "misses": check_misses(misses or "auto"),
    }


def chosen_device(chosen: Mapping[str, Setting]) -> dict[str, Any]:
    """As ``device_settings``, of settings."""
    given = {name: chosen[name].value for name in ("device", "vram", "misses")}
    return {name: value for name, value in given.items() if value is not None}


def device_sentence(model: LoadedModel) -> str | None:
    """What the GPU does, in one line; None without one."""
    budget = model.device_budget
    if budget is None:
        return None
    return (
        f"The GPU runs the dense part and holds {budget.resident} of {model.spec.total_experts} experts "
        f"({format_size(budget.nbytes)}): {budget.reason}."
    )


def device_rows(session: ChatSession) -> dict[str, str]:
    """For ``/stats``: what the GPU's memory did, prefetches into it, and how slots followed free memory."""
    model, report, rows = session.model, session.report, {}
    work, there = model.runtime.statistics, model.device_statistics
    if there is not None and model.device_budget is not None:
        rows["on the GPU"] = (
            f"{model.device_budget.resident} experts ({format_size(model.device_budget.nbytes)}); "
            f"{there.hit_rate:.1%} hits ({there.hits} of {there.hits + there.misses}), {there.evictions} evicted; "
            f"{work.copies} copied ({format_size(work.bytes_copied)}), {work.promotions} of them promoted"
        )
    if report is not None and report.device is not None and model.options.predictor is not None:
        ahead = report.device_prefetch
        rows["to the GPU"] = (
            f"last turn: {ahead.started} begun, {ahead.useful} useful ({report.device_coverage:.0%} of what it "
            f"lacked), {report.runtime.copies_late} of them late, {ahead.wasted} wasted"
        )
    for tier, resizes in model.resizes.items():
        if resizes:
            last = resizes[-1]
            rows[f"{tier} slots"] = (
                f"{last.after} now, resized {len(resizes)} times; last from {last.before}: {last.reason}"
            )
    return rows
