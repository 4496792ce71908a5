"""``moei list``: the models on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moei_core.hub.library import LibraryModel


def register(app: typer.Typer) -> None:
    app.command("list", epilog="Example: moei list --known")(list_models)


def list_models(
    known: Annotated[
        bool, typer.Option("--known", help="List the short names that moei knows instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Report as one JSON object.")] = False,
) -> None:
    """List the Mixture-of-Experts models on this machine."""
    from moei_cli.render import note, print_json, print_table
    from moei_core.config import format_size
    from moei_core.hub.layout import default_cache_dir
    from moei_core.hub.library import list_models as list_library

    if known:
        _list_known(as_json)
        return
    models = list_library()
    if as_json:
        print_json({"cache": str(default_cache_dir()), "models": [report(model) for model in models]})
        return
    if not models:
        note(
            "No Mixture-of-Experts model is here yet. `moei list --known` shows short names, `moei pull` one."
        )
        return
    rows = []
    for model in models:
        summary = model.summary
        rows.append(
            (
                model.name,
                format_size(model.nbytes),
                summary.format if summary else "",
                summary.shape if summary else "",
                format_size(summary.active_nbytes) if summary else "",
                model.source,
                state(model),
            )
        )
    headings = ("model", "on disk", "format", "layers x experts", "per token", "from", "state")
    print_table(headings, rows, right=("on disk", "per token"))


def state(model: LibraryModel) -> str:
    """``complete``, or what is missing and the way on."""
    if model.state == "complete":
        return "complete"
    if model.state == "partial" and model.source != "packed" and model.expected_nbytes:
        return f"partial: {100 * model.nbytes / model.expected_nbytes:.0f}%, `moei pull` resumes"
    return f"{model.state}: {model.problem}"


def report(model: LibraryModel) -> dict[str, Any]:
    """``model`` for ``--json``."""
    summary = model.summary
    content: dict[str, Any] = {
        "name": model.name,
        "folder": str(model.folder),
        "source": model.source,
        "state": model.state,
        "problem": model.problem,
        "bytes_on_disk": model.nbytes,
        "expected_bytes": model.expected_nbytes,
        "repo": model.repo,
        "revisions": list(model.revisions),
        "commit": model.commit,
        "licence": model.licence,
    }
    if summary is not None:
        content |= {
            "model_type": summary.model_type,
            "num_hidden_layers": summary.num_hidden_layers,
            "moe_layers": summary.moe_layers,
            "num_experts": summary.num_experts,
            "num_experts_per_tok": summary.top_k,
            "context": summary.context,
            "format": summary.format,
            "formats": dict(summary.formats),
            "expert_bytes": summary.expert_nbytes,
            "experts_bytes": summary.experts_nbytes,
            "dense_bytes": summary.dense_nbytes,
            "unused_bytes": summary.unused_nbytes,
            "active_bytes_per_token": summary.active_nbytes,
        }
    return content


def _list_known(as_json: bool) -> None:
    from dataclasses import asdict

    from moei_cli.render import print_json, print_table
    from moei_core.hub.aliases import aliases

    if as_json:
        print_json({"aliases": [asdict(alias) for alias in aliases().values()]})
        return
    headings = ("name", "GB", "format", "layers x experts", "context", "licence", "repository")
    rows = [
        (a.name, f"{a.gb:g}", a.format, a.shape, str(a.context), a.licence, a.repo)
        for a in aliases().values()
    ]
    print_table(headings, rows, right=("GB", "context"))
