"""``moei pull``: download a model."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moei_core.hub.pull import PullPlan


_EPILOG = "Examples:  moei pull qwen3-30b-a3b --dry-run        moei pull mixtral-8x7b --quant q4_0"


def register(app: typer.Typer) -> None:
    app.command("pull", epilog=_EPILOG)(pull)


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An alias, or owner/name of the hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be downloaded and whether it fits; write nothing."),
    ] = False,
    quant: Annotated[
        str | None,
        typer.Option(help="Pack it afterwards: q8_0, q4_0, mxfp4 (published so); none: use it as it is."),
    ] = None,
    keep_source: Annotated[
        bool,
        typer.Option(
            "--keep-source/--drop-source", help="With --quant: whether the downloaded weights stay."
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Report as one JSON object.")] = False,
) -> None:
    """Download a model into the Hugging Face cache. An interrupted download goes on where it stopped."""
    from moei_cli.render import PullBar, note, print_json
    from moei_core.errors import UsageError
    from moei_core.hub import pull as hub
    from moei_core.hub.packed import UNPACKED, check_format, place_of, prefer
    from moei_core.hub.remote import Remote
    from moei_core.hub.resolve import parse_name

    for option, value in (("--quant", quant), ("--revision", revision)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} is empty.", hint="Give it a value, or leave it out.")
    name = parse_name(model)
    if name.format is not None and quant not in (None, name.format):
        raise UsageError(f"{model} and --quant {quant} name two formats.", hint="Give one of them.")
    wanted = quant or name.format
    form = check_format(wanted, UNPACKED) if wanted else None
    packs = form not in (None, UNPACKED)
    if not keep_source and not packs:
        raise UsageError("--drop-source needs --quant with a format: without it nothing would be left.")
    if name.kind != "hub":
        kinds = {
            "bundled": "part of moei",
            "folder": "a folder of yours",
            "gguf": "a file of yours",
            "synthetic": "made by `moei bench`",
        }
        raise UsageError(f"{model} is not on the hub: it is {kinds[name.kind]}.")
    if revision is not None and name.revision is not None and revision != name.revision:
        raise UsageError(f"{model} and --revision {revision} name two revisions.", hint="Give one of them.")
    revision = revision or name.revision
    with PullBar(name.repo) as bar:
        remote = Remote(name.repo, note=bar.note)
        plan = hub.plan_pull(name.repo, revision, remote=remote, packed_as=form if packs else None)
        before = plan.needed_nbytes
        if not plan.is_moe:
            bar.note(f"{plan.repo} does not look like a Mixture-of-Experts model; moei may not run it.")
        if plan.quant_method == "fp8" and not packs:
            bar.note(
                f"{plan.repo} is published in FP8, which runs once it is packed: "
                f"moei pull {name.text} --quant q8_0 (or q4_0)."
            )
        if not dry_run and not plan.is_packed:
            try:
                folder = hub.pull(plan, bar, remote=remote)
            except KeyboardInterrupt:
                bar.note("Interrupted. What has arrived is kept; the same command goes on from there.")
                raise typer.Exit(130) from None
    if not dry_run and form is not None:
        place = place_of("hub", _shown(name.repo, revision), plan.commit)
        if packs and not plan.is_packed:
            folder = _pack(plan, form, revision, keep_source)
        else:
            folder = place / form if packs else folder
            prefer(place, form)
            if not keep_source:
                _drop_what_is_left(plan, revision)
    report = {
        "model": plan.repo,
        "revision": plan.revision,
        "commit": plan.commit,
        "folder": str(plan.folder if dry_run else folder),
        "format": form or UNPACKED,
        "online": plan.online,
        "licence": plan.licence,
        "gated": plan.gated,
        "mixture_of_experts": plan.is_moe,
        "total_bytes": plan.total_nbytes,
        "needed_bytes": before,
        "free_bytes": plan.free_nbytes,
        "fits": plan.fits,
        "dry_run": dry_run,
        "files": [{"name": file.name, "bytes": file.nbytes, "etag": file.etag} for file in plan.files],
    }
    if as_json:
        print_json(report)
    elif dry_run:
        _print_dry_run(plan)
    else:
        if not plan.online:
            note("Offline: whether the hub has a newer version was not checked.")
        print(folder)


def _shown(repo: str, revision: str | None) -> str:
    from moei_core.hub.resolve import ModelName, shown_name

    return shown_name(ModelName(repo, "hub", repo=repo, revision=revision))


def _pack(plan: PullPlan, form: str, revision: str | None, keep_source: bool) -> Path:
    from moei_cli.packing import pack_model
    from moei_cli.render import PullBar
    from moei_core.hub.resolve import ModelFiles

    files = ModelFiles(_shown(plan.repo, revision), plan.folder, "hub", plan.commit)
    with PullBar(plan.repo, verb="Packing") as bar:
        folder = pack_model(files, form, bar, revision)
    if not keep_source:
        _drop_what_is_left(plan, revision)
    return folder


def _drop_what_is_left(plan: PullPlan, revision: str | None) -> None:
    """Delete the source of a complete store; all of it, or what is left if dropping it was interrupted."""
    from moei_cli.packing import drop_source
    from moei_cli.render import PullBar
    from moei_core.errors import ModelNotFoundError

    with PullBar(plan.repo) as bar, suppress(ModelNotFoundError):
        drop_source(plan.repo if revision is None else f"{plan.repo}@{revision}", bar)


def _print_dry_run(plan: PullPlan) -> None:
    from moei_cli.render import print_facts
    from moei_core.config import format_size

    if plan.is_packed:
        print_facts([("model", plan.repo), ("state", f"packed already: {plan.packed_as}")])
        return
    if not plan.online:
        print_facts([("model", plan.repo), ("state", "complete; offline, so not compared with the hub")])
        return
    weights = [file for file in plan.files if file.name.endswith(".safetensors")]
    others = [file for file in plan.files if file not in weights]
    sizes = f"{format_size(plan.needed_nbytes)} needed, {format_size(plan.free_nbytes)} free"
    print_facts(
        [
            ("model", f"{plan.repo} ({plan.revision}, commit {plan.commit[:12]})"),
            ("licence", (plan.licence or "not stated") + (" (gated, and open to you)" if plan.gated else "")),
            ("weights", f"{len(weights)} files, {format_size(sum(file.nbytes for file in weights))}"),
            ("others", ", ".join(file.name for file in others)),
            ("download", f"{format_size(plan.needed_nbytes)} of {format_size(plan.total_nbytes)}"),
            *([("packing", f"about {format_size(plan.packed_nbytes)} more")] if plan.packed_nbytes else []),
            ("disk", f"{sizes} in {plan.cache.cache_dir}: " + ("fits" if plan.fits else "does not fit")),
        ]
    )
