"""``moei bench``: a model measured in the engine, or with ``--trace`` and no model, policies in the simulator."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moei_cli.device_options import DeviceOption, MissesOption, VramOption
from moei_core.errors import UsageError

_EPILOG = (
    "Examples:  moei bench moei-demo --experts 25%        "
    "moei bench --synthetic mixtral-8x7b --layers 1 --experts 50%        "
    "moei bench --trace T.safetensors --experts 10%,25%,50%        "
    "moei bench --trace T.safetensors --policy all --half second --json"
)
_SIMULATE = (
    "hardware",
    "sequences",
    "half",
    "interleave",
    "expert_size",
    "disk",
    "workers",
)
_MEASURE = (
    "layers",
    "quant",
    "context",
    "prompt_tokens",
    "new_tokens",
    "repeats",
    "ablation",
    "device",
    "vram",
    "misses",
)
_ABLATED = ("policy", "predictor", "prefetch")


def register(app: typer.Typer) -> None:
    app.command(name="bench", epilog=_EPILOG)(bench)


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Measure this model; left out: simulate --trace.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="A recorded trace: simulated, or with a model, the routing it follows.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Cache policy; for the simulator several, separated by commas, or all.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help="Bound on the experts in memory; for the simulator several.")
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            help="Bound on the whole process; for the simulator: what if RAM kept so many bytes of experts?"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    synthetic: Annotated[
        str | None,
        typer.Option(help="Measure the shapes of a well-known model with random weights."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="MoE layers of --synthetic.")] = None,
    quant: Annotated[
        str | None, typer.Option(help="Format of --synthetic: q8_0 or q4_0 packs it first; none.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of context.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt; 64.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate; 32.")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Requests of each condition; 3. With --ablation: rounds; 2.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="gpu-pcie4, disk-1g, or a JSON or TOML file that describes a machine.",
        ),
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="Replay only so many sequences.")] = None,
    half: Annotated[
        str | None,
        typer.Option(help="all, or the first or second half of the sequences."),
    ] = None,
    interleave: Annotated[
        str | None,
        typer.Option(help="Users whose requests are mixed token by token."),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="What to prefetch by: none, default, a predictor's name; for a model, a file of moei trace train too."
        ),
    ] = None,
    prefetch: Annotated[
        str | None,
        typer.Option(help="off, on, or auto: keep it only if it makes things faster."),
    ] = None,
    hints: Annotated[
        float | None,
        typer.Option(
            help="With --trace: foresee the next layer's experts, each rightly with this probability, "
            "as the model's own routers would; --predictor router follows that."
        ),
    ] = None,
    expert_size: Annotated[str | None, typer.Option(help="Bytes of one expert, such as 4MB.")] = None,
    disk: Annotated[
        str | None,
        typer.Option(help="What if the disk read so fast, such as 7GB/s?"),
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="What each part is worth: a ladder, one part more in each row.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; left out: one a core.", min=1)] = None,
    device: DeviceOption = None,
    vram: VramOption = None,
    misses: MissesOption = None,
) -> None:
    """Measure a model in the engine, or replay a trace through cache policies in the simulator."""
    given: dict[str, Any] = {name: value for name, value in locals().items() if value is not None}
    json = given.pop("json")
    if empty := [name for name, value in given.items() if value == "" and name != "model"]:
        _refuse(given, tuple(empty), "has no value; give one, or leave it out")
    if not ablation:
        del given["ablation"]
    else:
        _refuse(given, _ABLATED, "is what --ablation varies")
    if hints is not None:
        if trace is None:
            raise UsageError("--hints are made for a --trace; a model makes its own.")
        if not ablation and predictor not in ("router", "mixed", "default"):
            raise UsageError("--hints are for --predictor router or default, which look at them.")
        if not 0 <= hints <= 1:
            raise UsageError("--hints: a probability is between 0 and 1.")
    if model is not None and synthetic is not None:
        raise UsageError("Give a model or --synthetic, not both.")
    if model is not None or synthetic is not None:
        _refuse(given, _SIMULATE, "only simulates; leave out the model")
        if synthetic is None and layers is not None:
            raise UsageError("--layers cuts a --synthetic model; a real one runs whole.")
        if synthetic is None and quant is not None:
            raise UsageError(
                "--quant packs a --synthetic model.", hint=f"Of a real one, name the format: {model}:{quant}"
            )
        from moei_cli.bench_model import ModelBenchOptions, run_model_bench

        run_model_bench(ModelBenchOptions(**given), json=json)
        return
    if trace is None:
        raise UsageError(
            "moei bench needs a model, --synthetic NAME or --trace FILE.", hint="See: moei bench --help"
        )
    _refuse(given, _MEASURE, "measures a model; name one")
    from moei_cli.bench_trace import TraceBenchOptions, run_trace_bench

    run_trace_bench(TraceBenchOptions(**given), json=json)


def _refuse(given: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    """No option is dropped silently."""
    wrong = [f"--{name.replace('_', '-')}" for name in names if name in given]
    if wrong:
        raise UsageError(f"{', '.join(wrong)} {why}.", hint="See: moei bench --help")
