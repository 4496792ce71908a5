"""``moei profile-hardware``: what this machine can do for a Mixture-of-Experts model, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("profile-hardware", epilog="Example: moei profile-hardware --again --json")(profile_hardware)


def profile_hardware(
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="Measure the disk under this folder too; may be repeated."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure even though this machine's figures are stored.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Report as one JSON object.")] = False,
) -> None:
    """Measure memory, disks, GPUs and products (under a minute) and keep the figures for forecasts."""
    from moei_cli import render
    from moei_cli.hardware_view import HEADINGS, rows
    from moei_cli.measured_machine import measure_now, model_folders, stored_profile
    from moei_core.errors import ModelNotFoundError

    for one in folder or ():
        if not one.is_dir():
            raise ModelNotFoundError(f"--folder: {one} is not a folder.", hint="Check the path.")
    folders = [*model_folders(), *(folder or ())]
    profile = None if again else stored_profile(folders)
    stored, problem = profile is not None, ""
    if profile is None:
        profile, problem = measure_now(folders)
    if as_json:
        render.print_json(profile.report() | {"stored": stored or not problem})
    else:
        render.print_table(HEADINGS, rows(profile), right=HEADINGS[1:3])
    for note in (*profile.notes, *([problem] if problem else ())):
        render.note(note)
    if stored:
        render.note(f"Measured {profile.measured_at}; --again measures anew.")
    else:
        render.note(f"Measured in {profile.seconds:.0f} s.")
