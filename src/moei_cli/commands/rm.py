"""``moei rm``: remove a model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("rm", epilog="Example: moei rm mixtral-8x7b")(rm)


def rm(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An alias or owner/name, with @revision if wanted.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Also remove what other programs downloaded, without asking.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Report as one JSON object.")] = False,
) -> None:
    """Remove what moei downloaded of a model; about files of other programs it asks first."""
    from moei_cli.render import note, print_json
    from moei_core.config import format_size
    from moei_core.errors import UsageError
    from moei_core.hub.removal import plan_removal, remove

    removal = plan_removal(model)
    own, other = removal.nbytes(removal.own), removal.nbytes(removal.foreign)
    if removal.own:
        note(f"Removing {removal.name}: {len(removal.own)} files that moei brought, {format_size(own)}.")
    for path, why in removal.kept:
        note(f"Keeping {path}: {why}.")
    take_others = yes
    if removal.foreign and not yes:
        sentence = f"{len(removal.foreign)} files ({format_size(other)}) of it came from another program."
        if sys.stdin.isatty() and not as_json:
            take_others = typer.confirm(f"{sentence} Remove them too?", err=True)
        elif not removal.own:
            raise UsageError(sentence, hint="Nothing was removed. Add --yes to remove them.")
        else:
            note(f"{sentence} They stay; --yes removes them too.")
    freed = remove(removal, foreign=take_others) if removal.own or not removal.foreign or take_others else 0
    if as_json:
        print_json(
            {
                "model": removal.cache.repo or removal.name,
                "freed_bytes": freed,
                "removed": [str(path) for path in (*removal.own, *(removal.foreign if take_others else ()))],
                "kept": [
                    *(str(path) for path, _ in removal.kept),
                    *(str(path) for path in (() if take_others else removal.foreign)),
                ],
            }
        )
    else:
        note(f"{format_size(freed)} freed.")
