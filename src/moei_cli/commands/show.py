"""``moei show``: one model in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moei_core.errors import UsageError

if TYPE_CHECKING:
    from moei_core.hub.aliases import Alias
    from moei_core.hub.library import LibraryModel


def register(app: typer.Typer) -> None:
    app.command("show", epilog="Example: moei show mixtral-8x7b")(show)


def show(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="An alias, owner/name, a folder, a .gguf file or moei-demo; with --settings it may be left out.",
        ),
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="What a chat would be set to on this machine, and why.")
    ] = False,
    ram: Annotated[str | None, typer.Option(help="With --settings: as of moei chat.")] = None,
    experts: Annotated[str | None, typer.Option(help="With --settings: as of moei chat.")] = None,
    context: Annotated[int | None, typer.Option(help="With --settings: as of moei chat.", min=16)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Report as one JSON object.")] = False,
) -> None:
    """Show what a model is, where its bytes are and how many a token needs."""
    if settings:
        from moei_cli.settings import resolve_all
        from moei_cli.settings_view import show_settings

        show_settings(model, resolve_all(ram=ram, experts=experts, context=context), as_json=as_json)
        return
    if (ram, experts, context) != (None, None, None):
        raise UsageError("--ram, --experts and --context belong to --settings.", hint="See: moei show --help")
    if model is None:
        raise UsageError("Which model?", hint="moei list names those here; moei show --settings needs none.")
    from dataclasses import asdict

    from moei_cli.commands.list_models import report
    from moei_cli.render import print_json
    from moei_core.errors import ModelNotFoundError
    from moei_core.hub.aliases import find_alias
    from moei_core.hub.library import describe
    from moei_core.hub.packed import UNPACKED
    from moei_core.hub.resolve import parse_name

    models = describe(model)
    alias = find_alias(model.partition("@")[0])
    if not models and alias is None:
        asked = parse_name(model)
        if asked.format in (None, UNPACKED):
            hint = f"Download it with: moei pull {asked.text}"
        elif asked.kind == "hub":
            hint = f"Make it with: moei pull {asked.text} --quant {asked.format}"
        else:
            hint = f"Make it with: moei quantize {asked.text} {asked.format}"
        raise ModelNotFoundError(f"{model} is not on this machine.", hint=hint)
    if as_json:
        known = asdict(alias) if alias is not None else None
        print_json({"model": model, "alias": known, "here": [report(found) for found in models]})
        return
    for number, found in enumerate(models):
        if number:
            print()
        _print_model(found, alias)
    if not models and alias is not None:
        _print_alias(alias)


def _print_model(model: LibraryModel, alias: Alias | None) -> None:
    from moei_cli.commands.list_models import state
    from moei_cli.render import print_facts
    from moei_core.config import format_size

    origin = {
        "moei": "downloaded by moei",
        "other": "downloaded by another program",
        "mixed": "downloaded in part by moei",
        "bundled": "part of moei",
        "folder": "a local folder",
        "gguf": "a GGUF file, read where it is",
        "packed": "packed by moei from another one",
        "synthetic": "made by moei: real shapes, random weights",
    }
    facts = [
        ("model", model.name),
        ("folder", str(model.folder)),
        ("from", origin.get(model.source, model.source)),
    ]
    if model.commit:
        facts.append(("revision", " ".join((*model.revisions, model.commit[:12]))))
    licence = model.licence or (alias.licence if alias else "")
    facts += [("licence", licence or "not stated here; see the model's page")] if model.repo else []
    facts += [("on disk", format_size(model.nbytes)), ("state", state(model))]
    if (summary := model.summary) is not None:
        total = max(1, summary.total_nbytes)
        active_share = f"{100 * summary.active_nbytes / total:.0f}% of all weights"
        formats = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in summary.formats.items())
        experts = summary.moe_layers * summary.num_experts
        facts += [
            ("type", f"{summary.model_type}, context {summary.context}"),
            ("shape", f"{summary.shape} (MoE layers x experts x top-k; {summary.num_hidden_layers} layers)"),
            ("format", summary.format + (f" ({formats})" if summary.formats else "")),
            (
                "experts",
                f"{format_size(summary.experts_nbytes)} ({100 * summary.experts_nbytes / total:.0f}%): "
                f"{experts} of {format_size(summary.expert_nbytes)}",
            ),
            ("dense", f"{format_size(summary.dense_nbytes)} (attention, norms, routers, embeddings)"),
            (
                "per token",
                f"{format_size(summary.active_nbytes)} ({active_share})",
            ),
        ]
        if (obstacle := _obstacle(model)) is not None:
            facts.append(("to run it", obstacle))
        if summary.unused_nbytes:
            facts.append(("unused", f"{format_size(summary.unused_nbytes)} (layers that a chat never runs)"))
    print_facts(facts)


def _obstacle(model: LibraryModel) -> str | None:
    """Why a chat would refuse it, and what to do; None if nothing is known."""
    from moei_core.hub.runnable import quant_method, why_not
    from moei_core.hub.summary import read_config

    if model.source == "packed":
        return None
    config = read_config(model.folder)
    if (reason := why_not(config)) is not None:
        return f"cannot be done. {' '.join(reason)}"
    if quant_method(config) == "fp8":
        return f"pack it first: moei quantize {model.name} q8_0 (or q4_0)"
    return None


def _print_alias(alias: Alias) -> None:
    from moei_cli.render import print_facts

    print_facts(
        [
            ("model", f"{alias.name}: {alias.repo}"),
            ("state", f"not on this machine; download it with: moei pull {alias.name}"),
            ("size", f"{alias.gb:g} GB as published ({alias.format})"),
            ("shape", f"{alias.shape} (MoE layers x experts x top-k)"),
            ("context", str(alias.context)),
            ("licence", alias.licence),
        ]
    )
