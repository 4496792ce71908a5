"""``moei chat``: interactive, or one answer for a prompt given as an argument or through a pipe."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moei_cli.device_options import (
    DeviceOption,
    MissesOption,
    VramOption,
    chosen_device,
    device_sentence,
)
from moei_core.errors import ModelNotFoundError, UsageError
from moei_core.hub.resolve import DEMO_NAME, ModelFiles, resolve_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moei_cli.forecasts import Prediction
    from moei_cli.settings import Setting
    from moei_core.engine.chat_session import ChatSession

DEMO_EXPERTS = "25%"
_USUAL_PROMPT = 256
"""Tokens of the prompt that a chat's forecast is about before anything is typed."""

_EPILOG = (
    "Examples:  moei chat        moei chat moei-demo --experts 25%        "
    'moei chat moei-demo "What is an expert?" --json        echo "Hello" | moei chat'
)


def register(app: typer.Typer) -> None:
    app.command(name="chat", epilog=_EPILOG)(chat)


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A name, with :q4_0 if packed so, a folder or a .gguf file; left out: the last one, or moei-demo."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="Answer this and exit.")] = None,
    experts: Annotated[
        str | None,
        typer.Option(help="Bound on the memory for experts: a size or a percentage of all of them."),
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="Bound on the memory of the whole process, such as 8GiB.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens that a conversation may have.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that a reply may have.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0: off.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this mass; 1: off.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest; 0: off.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 avoids what was said; 1: off.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the reply; may be repeated.")
    ] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="For models that can think before they answer.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Cache policy.")] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="What to prefetch by: default, none, a predictor's name, or a file of moei trace train."
        ),
    ] = None,
    prefetch: Annotated[
        str | None, typer.Option(help="off, on, or auto: follow the predictor only while that is faster.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute in float32, bfloat16 or float16.")] = None,
    device: DeviceOption = None,
    vram: VramOption = None,
    misses: MissesOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With a prompt: one JSON object with the answer and all figures.")
    ] = False,
) -> None:
    """Chat with a model whose experts are read from disk through a cache."""
    from moei_cli import last_model, render

    files, prompt = _model_and_prompt(model, prompt)
    if prompt is None and not sys.stdin.isatty():
        prompt = _piped()
    elif prompt is not None:
        prompt = _text(prompt, "the prompt")
    if as_json and prompt is None:
        raise UsageError("--json answers one prompt.", hint='Add it: moei chat moei-demo "..." --json')
    if prompt is None and not sys.stdout.isatty():
        raise UsageError(
            "An interactive chat needs a terminal.", hint='For one answer: moei chat moei-demo "..."'
        )
    if system is not None:
        _check_encodes(system, "--system")
    for text in stop or ():
        _check_encodes(text, "--stop")
    overrides = {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    from moei_cli.settings import naming_origins, resolve

    chosen = resolve(
        ram=ram,
        experts=experts,
        context=context,
        policy=policy,
        predictor=predictor,
        prefetch=prefetch,
        device=device,
        vram=vram,
        misses=misses,
    )
    with naming_origins(chosen):
        session = _open(files, chosen, dtype, system, overrides, quiet=as_json)
    try:
        session.thinking = think
        last_model.remember(files)
        from moei_cli.forecasts import predict

        length = _USUAL_PROMPT if prompt is None else session.count_prompt(prompt)
        # What will be refused takes no time.
        refused = prompt is not None and length >= session.model.context
        prediction = None if refused else predict(session.model, files, length, "chat")
        if prediction is not None and not as_json:
            render.note(f"{prediction.line[0].upper()}{prediction.line[1:]}.")
        if prompt is None:
            from moei_cli.chat_loop import ChatLoop

            ChatLoop(session, files.name, prediction).run()
        else:
            _answer_once(session, files, prompt, as_json, prediction)
    finally:
        session.model.close()


def _piped() -> str:
    try:
        return _text(sys.stdin.read().strip(), "standard input")
    except UnicodeDecodeError as error:
        raise _no_text("Standard input") from error


def _text(prompt: str, what: str) -> str:
    """``prompt`` if it can be asked. Raises: UsageError, naming ``what``."""
    if not prompt.strip():
        raise UsageError(
            f"There is nothing to answer: {what} was empty.",
            hint=f'For example: moei chat {DEMO_NAME} "What is an expert?"',
        )
    _check_encodes(prompt, f"{what[0].upper()}{what[1:]}")
    return prompt


def _check_encodes(text: str, what: str) -> None:
    """Bytes that are no UTF-8 come as lone surrogates, which no tokenizer takes. Raises: UsageError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _no_text(what) from error


def _no_text(what: str) -> UsageError:
    return UsageError(f"{what} is no text in UTF-8.", hint="For example: iconv -f latin1 FILE | moei chat")


def _model_and_prompt(model: str | None, prompt: str | None) -> tuple[ModelFiles, str | None]:
    """Tell a lone argument apart: a model if it names one, else a prompt if it has several words."""
    from moei_cli import last_model, render

    if model is None:
        return last_model.recall() or resolve_model(DEMO_NAME), prompt
    try:
        # The first look at a GGUF file takes seconds.
        with render.waiting(f"Looking at {model}") if model.lower().endswith(".gguf") else nullcontext():
            return resolve_model(model), prompt
    except ModelNotFoundError as error:
        if prompt is None and len(model.split()) > 1:
            return last_model.recall() or resolve_model(DEMO_NAME), model
        if prompt is None:
            error.hint += f' To ask a question: moei chat {DEMO_NAME} "{model}"'
        raise


def _open(
    files: ModelFiles,
    chosen: Mapping[str, Setting],
    dtype: str | None,
    system: str | None,
    overrides: dict[str, Any],
    quiet: bool,
) -> ChatSession:
    """Check the options, load the model, print the plan in one line."""
    from dataclasses import replace

    from moei_core.config import ExpertBudget, GenerationSettings, format_size

    given = {name: value for name, value in overrides.items() if value is not None}
    GenerationSettings(**given)  # a wrong value is told before gigabytes are read
    ram, experts, context = (chosen[name].value for name in ("ram", "experts", "context"))
    to_watch = experts is None and ram is None and files.name.partition(":")[0] == DEMO_NAME
    if to_watch:
        # The whole demo would fit; with a quarter of it there is something to watch.
        experts = ExpertBudget.parse(DEMO_EXPERTS)

    from moei_cli import render
    from moei_cli.forecasts import refusals_with_speed

    with render.waiting(f"Loading {files.name}"):
        from moei_cli.prefetch_options import prefetching
        from moei_core.cache.policies import DEFAULT_POLICY
        from moei_core.engine.chat_session import ChatSession
        from moei_core.engine.loaded_model import LoadedModel, LoadOptions

        predictor, mode = prefetching(
            chosen["predictor"].text or "default", chosen["prefetch"].text or "auto", live=True
        )
        with refusals_with_speed(files):
            model = LoadedModel(
                files.folder,
                LoadOptions(
                    ram,
                    experts,
                    context,
                    chosen["policy"].value or DEFAULT_POLICY,
                    dtype,
                    predictor,
                    mode,
                    **chosen_device(chosen),
                ),
            )
    try:
        settings = replace(model.generation_defaults(), **given)
    except BaseException:
        model.close()
        raise
    for sentence in model.notes:
        render.note(sentence)
    if not quiet:
        spec, slots = model.spec, model.budget
        reason = "so that the cache has work to show; --experts 100% holds all" if to_watch else slots.reason
        everything = slots.experts == spec.total_experts
        where = "all of its" if everything else f"{slots.experts} of its"
        rest = "" if everything else ", the others on disk"
        render.note(
            f"{files.name} runs with {where} {spec.total_experts} experts in RAM "
            f"({format_size(slots.nbytes)}){rest}: {reason}."
        )
        if (sentence := device_sentence(model)) is not None:
            render.note(sentence)
    return ChatSession(model, settings, system)


def _answer_once(
    session: ChatSession, files: ModelFiles, prompt: str, as_json: bool, prediction: Prediction | None
) -> None:
    from moei_cli import render
    from moei_cli.forecasts import actual_of
    from moei_cli.interrupts import stopping_on_interrupt

    with stopping_on_interrupt(session.stop):
        if as_json:
            pieces = list(render.after_prompt(session.reply(prompt), session))
        else:
            render.show_reply(session.reply(prompt), session)
    if prediction is not None and session.report is not None:
        prediction.settle(actual_of(session.report, session.model))
        if not as_json:
            render.note(f"{prediction.beside[0].upper()}{prediction.beside[1:]}.")
    if as_json:
        told = None if prediction is None else prediction.report()
        render.print_json(_report(session, files, pieces) | {"prediction": told})
    if session.report is not None and session.report.finish_reason == "interrupted":
        raise typer.Exit(130)


def _report(session: ChatSession, files: ModelFiles, pieces: list[Any]) -> dict[str, Any]:
    """The JSON object of a one-shot answer."""
    from dataclasses import asdict

    assert session.report is not None
    model = session.model
    return {
        "model": files.name,
        "answer": session.messages[-1]["content"],
        "thinking": "".join(piece.text for piece in pieces if piece.thinking).strip(),
        **session.report.as_dict(),
        "experts": {
            "slots": model.budget.slots,
            "working_slots": model.budget.working,
            "total": model.spec.total_experts,
            "slot_bytes": model.budget.slot_nbytes,
            "slots_bytes": model.budget.nbytes,
            "expert_bytes": model.spec.total_expert_nbytes,
            "resident": model.scheduler.resident_count,
            "reason": model.budget.reason,
            "budget": [asdict(line) for line in model.budget.lines],
            "policy": model.options.policy,
        },
        "device_budget": None if model.device_budget is None else asdict(model.device_budget),
        "dense_bytes": model.adapter.dense_nbytes,
        "ram_limit_bytes": model.options.ram,
        "load_s": round(model.load_s, 3),
        "settings": asdict(session.settings),
    }
