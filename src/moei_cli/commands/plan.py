"""``moei plan``: will it run, how fast, and what would help - before anything is downloaded."""

from __future__ import annotations

from typing import Annotated

import typer

from moei_cli.device_options import DeviceOption, VramOption

_EPILOG = (
    "Examples:  moei plan mixtral-8x7b        moei plan qwen3-30b-a3b --compare        "
    "moei plan owner/name --ram 16GiB --format q4_0 --json"
)


def register(app: typer.Typer) -> None:
    app.command("plan", epilog=_EPILOG)(plan)


def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="An alias, owner/name, a folder, a .gguf file or moei-demo."),
    ],
    form: Annotated[
        str | None, typer.Option("--format", help="Of the experts: as stored, q8_0, q4_0, bf16.")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Bound on the memory of the whole process.")] = None,
    experts: Annotated[
        str | None, typer.Option(help="Bound on the memory for experts: a size or a percentage.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a conversation may have; 4096.", min=16)
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the prompt whose first token is forecast; 1024.", min=1)
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Rank formats and well-known models that fit.")
    ] = False,
    device: DeviceOption = None,
    vram: VramOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Report as one JSON object.")] = False,
) -> None:
    """Forecast a model on this machine from its config alone: where its experts would live, how fast, and why.

    Exit code 4 if it would not run here in any format (with --format: in that one), 0 if it would.
    """
    from moei_cli import render
    from moei_cli.forecasts import shape_of
    from moei_cli.measured_machine import gpu_for, measure_now, model_folders, stored_profile
    from moei_cli.plan_view import print_comparison, print_plan
    from moei_cli.planner import Planner, lengths, usual_format
    from moei_cli.settings import naming_origins, resolve
    from moei_core.errors import DoesNotFitError, UsageError
    from moei_core.forecast.formats import FORMATS

    if form is not None and form not in FORMATS:
        raise UsageError(f"There is no format '{form}'.", hint=f"There are: {', '.join(FORMATS)}.")
    settings = resolve(ram=ram, experts=experts, context=context, device=device, vram=vram)
    limit, budget = settings["ram"].value, settings["experts"].value
    shape, folder = shape_of(model)
    with naming_origins(settings):
        tokens, prompt = lengths(shape, settings["context"].value, prompt_tokens)
    profile = stored_profile()
    if profile is None:
        render.note("This machine has not been measured yet: that takes less than a minute, once.")
        profile, problem = measure_now(model_folders())
        if problem:
            render.note(problem)
    with naming_origins(settings):
        gpu = gpu_for(profile, settings["device"].value, settings["vram"].value)
    planner = Planner(profile, folder, tokens, prompt, limit, budget, gpu, settings["vram"].value)
    if compare:
        ranking = planner.ranking(shape, FORMATS[form] if form else None)
        if not ranking:
            raise UsageError(
                f"Neither {shape.name} nor any well-known model is stored as {form}.",
                hint="Leave --format out to compare all formats.",
            )
        if as_json:
            render.print_json({"model": shape.name, "ranking": [one.report() for one in ranking]})
        else:
            print_comparison(ranking, shape, prompt)
        if not any(one.runs for one in ranking):
            raise typer.Exit(DoesNotFitError.exit_code)
        return
    made = planner.plan(shape, FORMATS[form] if form else usual_format(shape))
    if as_json:
        render.print_json(made.report())
    else:
        print_plan(made)
    if not any(one.runs for one in ([made.chosen] if form else made.all)):
        raise typer.Exit(DoesNotFitError.exit_code)
