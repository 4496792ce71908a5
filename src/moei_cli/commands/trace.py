"""``moei trace``: record routing, look at it, train a predictor from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from moei_core.errors import InterruptedTurnError, UsageError

_EPILOG = (
    "Examples:  moei trace show T.safetensors        moei trace show T.safetensors --request 3 --png eam.png"
)

_TRAIN_EPILOG = "Example:  moei trace train T.safetensors -o P.safetensors"

_RECORD_EPILOG = "Example:  moei trace record moei-demo --prompts questions.txt -o T.safetensors"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Recorded routing of chats.", no_args_is_help=True, rich_markup_mode=None)
    group.command(name="show", epilog=_EPILOG)(show)
    group.command(name="record", epilog=_RECORD_EPILOG)(record)
    group.command(name="train", epilog=_TRAIN_EPILOG)(train)
    app.add_typer(group, name="trace")


def show(
    trace: Annotated[str, typer.Argument(help="A trace file.")],
    request: Annotated[int, typer.Option(help="The request whose activations are drawn.")] = 0,
    png: Annotated[
        Path | None, typer.Option(help="Draw the heat map into this file (needs matplotlib).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Popularity and reuse by layer, overlap by lag, the time of turns, a request's activations as a heat map."""
    from moei_cli import render
    from moei_core.trace import read_trace
    from moei_core.trace.summary import layer_summaries, overlap_by_lag, request_matrix
    from moei_core.trace.time_spent import time_spent

    recorded = read_trace(trace)
    requests = len(recorded.requests) - 1
    if not 0 <= request < requests:
        raise UsageError(f"--request: {request} is not one of 0 to {requests - 1}.")
    matrix = request_matrix(recorded, request)
    if png is not None:
        _draw(matrix, png, f"{recorded.model}, request {request}")
        render.note(f"Drawn into {png}.")
    summaries, overlap = layer_summaries(recorded), overlap_by_lag(recorded)
    report: dict[str, Any] = {
        "trace": trace,
        "model": recorded.model,
        "tokens": recorded.tokens,
        "sequences": recorded.sequences,
        "requests": requests,
        "num_experts": recorded.num_experts,
        "num_experts_per_tok": recorded.num_experts_per_tok,
        "uniform_overlap": round(recorded.num_experts_per_tok / recorded.num_experts, 4),
        "overlap_by_lag": {str(lag): round(share, 4) for lag, share in overlap.items()},
        "layers": [
            {
                "layer": one.layer,
                "top_quarter": round(one.top_quarter, 4),
                "entropy": round(one.entropy, 4),
                "reuse": round(one.reuse, 4),
                "touched": one.touched,
            }
            for one in summaries
        ],
        "time_split_s": time_spent(recorded),
    }
    if json:
        render.print_json(report)
        return
    render.trace_summary(report, matrix.tolist(), recorded.moe_layers, request)


def record(
    model: Annotated[str, typer.Argument(help="The model to run.")],
    prompts: Annotated[
        Path, typer.Option(help="One question a line; an empty line starts a new conversation.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace file to write.")],
    experts: Annotated[str | None, typer.Option(help="Bound on the memory for experts.")] = None,
    ram: Annotated[str | None, typer.Option(help="Bound on the memory of the whole process.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens that a reply may have.")] = 256,
    hidden: Annotated[
        int, typer.Option(help="Also keep the layer inputs of so many tokens, for: moei trace train.")
    ] = 0,
    predictor: Annotated[
        str | None, typer.Option(help="Also record what this predictor hints: router, or a trained file.")
    ] = None,
) -> None:
    """Answer a file of questions greedily and record which experts the routers chose."""
    from dataclasses import replace

    from moei_cli import render
    from moei_cli.interrupts import stopping_on_interrupt
    from moei_core.config import ExpertBudget, parse_size
    from moei_core.hub.resolve import resolve_model

    if hidden < 0:
        raise UsageError(f"--hidden: {hidden} is not a number of tokens.")
    conversations = _conversations(prompts)
    _check_writable(output, prompts)
    files = resolve_model(model)
    # An empty value is no bound left out, but one that got lost on its way here.
    budget = ExpertBudget.parse(experts) if experts is not None else None
    limit = parse_size(ram, "--ram") if ram is not None else None
    with render.waiting(f"Loading {files.name}"):
        from moei_cli.prefetch_options import parse_predictor
        from moei_core.engine.chat_session import ChatSession
        from moei_core.engine.loaded_model import LoadedModel, LoadOptions
        from moei_core.trace.hidden import HiddenSampler, sidecar

        loaded = LoadedModel(
            files.folder, LoadOptions(limit, budget, predictor=parse_predictor(predictor, live=True))
        )
    with loaded:
        spec = loaded.spec
        writer = loaded.record(output, files.name, "moei trace record")
        if hidden:
            loaded.runtime.sampler = HiddenSampler(hidden, spec.moe_layers, spec.hidden_size)
        settings = replace(loaded.generation_defaults(), temperature=0.0, max_new_tokens=max_tokens)
        session, early = ChatSession(loaded, settings), None
        # Both errors come between two passes, so that what was recorded until then is whole, and is kept.
        with (
            stopping_on_interrupt(lambda: session.stop()),
            render.progress("recording", sum(map(len, conversations))) as advance,
        ):
            try:
                for questions in conversations:
                    session = ChatSession(loaded, settings)
                    writer.begin_sequence()
                    for question in questions:
                        writer.begin_request()
                        for _ in session.reply(question):
                            pass
                        if session.report is not None and session.report.finish_reason == "interrupted":
                            raise InterruptedTurnError("Interrupted.")
                        advance()
            except (InterruptedTurnError, UsageError) as error:
                early = error
        written = writer.trace()
        if writer.close():
            if loaded.runtime.sampler is not None:
                kept = loaded.runtime.sampler.save(sidecar(output))
                render.note(f"{sidecar(output)}: the layer inputs of {kept} tokens.")
            what = "conversation" if written.sequences == 1 else "conversations"
            render.note(f"{output}: {written.tokens} tokens of {written.sequences} {what}.")
    if early is not None:
        raise early


def train(
    trace: Annotated[str, typer.Argument(help="A trace recorded with --hidden.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The predictor file to write.")],
    stride: Annotated[
        int, typer.Option(help="Layers between the one looked at and the one predicted.", min=0)
    ] = 1,
    width: Annotated[int, typer.Option(help="Hidden units of each network.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Makes training repeatable.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Fit a predictor of later layers' experts to recorded layer inputs; minutes on a processor."""
    from moei_cli import render
    from moei_core.trace import read_trace
    from moei_core.trace.hidden import read_hidden, sidecar

    _check_writable(output, Path(trace), sidecar(trace))
    recorded = read_trace(trace)
    hidden = read_hidden(sidecar(trace), recorded)
    from moei_core.engine import stride as engine

    with render.progress("training", max(0, len(recorded.moe_layers) - 1 - stride)) as advance:
        predictor, recalls = engine.train(
            recorded, hidden, stride=stride, width=width, seed=seed, progress=advance
        )
    predictor.save(output)
    mean = sum(recalls.values()) / len(recalls)
    report: dict[str, Any] = {
        "predictor": str(output),
        "model": recorded.model,
        "stride": stride,
        "samples": len(hidden.tokens),
        "recall": round(mean, 4),
        "chance": round(recorded.num_experts_per_tok / recorded.num_experts, 4),
        "recall_by_layer": {str(layer): round(recall, 4) for layer, recall in recalls.items()},
    }
    if json:
        render.print_json(report)
        return
    render.note(
        f"{output}: names {mean:.0%} of the experts that are chosen {stride + 1} MoE layers later "
        f"(by chance: {report['chance']:.0%}), on conversations that it did not learn from."
    )


def _check_writable(output: Path, *read: Path) -> None:
    """Refuse before hours of work what could not be written after them, or would replace what they ``read``.

    Raises: UsageError.
    """
    if any(one.exists() and output.exists() and output.samefile(one) for one in read):
        raise UsageError(
            f"--output: {output} is what is read; it would be replaced.", hint="Name another file to write."
        )
    if output.exists() and not output.is_dir() and not output.is_file():
        # What is written takes the place of the old file, and a device has none to take.
        raise UsageError(f"--output: {output} is a device, not a file.", hint="Name a file to write.")
    if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"--output: {output} cannot be written.",
            hint="Name a file in a folder that is there and is yours.",
        )


def _conversations(path: Path) -> list[list[str]]:
    """The questions of a file, by conversation. Raises: UsageError."""
    try:
        blocks = path.read_text(encoding="utf-8").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts: {path} cannot be read.", str(error)) from None
    conversations = [[line.strip() for line in block.splitlines() if line.strip()] for block in blocks]
    conversations = [questions for questions in conversations if questions]
    if not conversations:
        raise UsageError(f"--prompts: there is no question in {path}.", hint="Write one a line.")
    return conversations


def _draw(matrix: Any, path: Path, title: str) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError(
            "--png needs matplotlib, which is not installed.",
            hint="Install it with: pip install 'moei[plots]'",
        ) from None
    figure, axes = plt.subplots(figsize=(8, 4), dpi=100)
    axes.imshow(matrix, aspect="auto", interpolation="nearest", cmap="magma")
    axes.set(xlabel="expert", ylabel="MoE layer", title=title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
