"""``moei quantize``: pack a model that is here into blocks of fewer bits."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("quantize", epilog="Example: moei quantize mixtral-8x7b q4_0")(quantize)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model that is here as published.")],
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="q8_0, q4_0, or mxfp4 for models in MXFP4.")],
    keep_source: Annotated[
        bool,
        typer.Option(
            "--keep-source/--drop-source",
            help="Dropping deletes the original weights, if moei downloaded or made them.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Report as one JSON object.")] = False,
) -> None:
    """Pack a model into blocks of few bits. Interrupted packing goes on where it stopped."""
    from moei_cli.packing import drop_source, pack_model
    from moei_cli.render import PullBar, print_json
    from moei_core.errors import UsageError
    from moei_core.hub.packed import UNPACKED, check_format
    from moei_core.hub.resolve import parse_name, resolve_model

    form = check_format(form)
    name = parse_name(model)
    if name.format not in (None, UNPACKED):
        raise UsageError(f"{model} names a packed model.", hint=f"Write: moei quantize {name.text} {form}")
    if not keep_source and name.kind in ("bundled", "folder"):
        raise UsageError(
            f"The weights of {name.text} are not moei's to drop.",
            hint="--drop-source deletes only what moei downloaded or made itself.",
        )
    files = resolve_model(f"{name.text}:{UNPACKED}")
    with PullBar(files.name, verb="Packing") as bar:
        folder = pack_model(files, form, bar, name.revision)
        freed = 0 if keep_source else drop_source(name.text, bar)
    if as_json:
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
        print_json(
            {
                "model": f"{name.text}:{form}",
                "folder": str(folder),
                "format": form,
                "bytes": nbytes,
                "source_freed_bytes": freed,
            }
        )
    else:
        print(folder)
