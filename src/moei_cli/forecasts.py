"""Forecasts for the commands: of a model by name, and of a loaded one before it runs, with the actual set beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moei_core.config import ExpertBudget
from moei_core.errors import DoesNotFitError, MoeiError
from moei_core.forecast.forecast import Forecast, corrected, forecast, plan_budget
from moei_core.forecast.formats import StorageFormat
from moei_core.forecast.gpu import GpuPlan
from moei_core.forecast.ledger import Actual, correction, write_actual, write_prediction
from moei_core.forecast.limits import WORDS, agree, in_words
from moei_core.forecast.shape import ModelShape, bundled_shape, shape_of_folder, shape_of_repo
from moei_core.forecast.speed import Speeds
from moei_core.hardware.profile import DiskProfile, HardwareProfile
from moei_core.hub.layout import weights_folder

if TYPE_CHECKING:
    from moei_core.engine.chat_session import TurnReport
    from moei_core.engine.loaded_model import LoadedModel
    from moei_core.hub.resolve import ModelFiles


def shape_of(text: str) -> tuple[ModelShape, Path | None]:
    """(the shape of the model that ``text`` names, its folder if it is here). The network only as the last resort.

    Raises: what resolving a name, reading a folder or asking the hub raises.
    """
    from moei_core.errors import ModelNotFoundError
    from moei_core.hub.resolve import parse_name, resolve_model

    name = parse_name(text)
    try:
        files = resolve_model(text)
    except ModelNotFoundError:
        if (shape := bundled_shape(text.partition("@")[0].partition(":")[0])) is not None:
            return shape, None
        if name.kind != "hub":
            raise
        return shape_of_repo(name.repo, name.revision), None
    return shape_of_files(files), weights_folder(files.folder)


def shape_of_files(files: ModelFiles) -> ModelShape:
    """The shape of a model here. A synthetic one routes uniformly."""
    return shape_of_folder(files.name, files.folder, uniform_routing=files.source == "synthetic")


_LEAST_TOKENS = 8
_AGAIN_S = 0.5
_LEAST_NBYTES = 256 << 20
"""Of all experts, from which the disk is looked at again: few are read at once, whatever it gives."""
NEVER_MEASURED = "No forecast: this machine has not been measured. Once: moei profile-hardware"


@dataclass(slots=True)
class Prediction:
    """A forecast that was written down before a run. one: uncorrected; shown: with what this machine has taught."""

    identity: str
    one: Forecast
    shown: Forecast
    runs: int
    actual: Actual | None = None

    @property
    def line(self) -> str:
        """For people: what is expected and why no more."""
        speed, first = self.shown.tokens_per_s, self.shown.ttft_s
        return (
            f"expected {short(speed.low)} to {short(speed.high)} tokens/s, first token of a new "
            f"{self.one.prompt_tokens}-token prompt after {short(first.low)} to {short(first.high)} s; "
            f"the limit is {in_words(self.one.limits)}"
        )

    @property
    def beside(self) -> str:
        """Predicted and actual speed in one line, as far as the run was long enough to tell."""
        actual, shown = self.actual, self.shown
        text = f"forecast {short(shown.tokens_per_s.value, 3)} tokens/s, limited by {_names(self.one.limits)}"
        if actual is not None and actual.tokens_per_s is not None:
            text += f"; came {short(actual.tokens_per_s, 3)}, limited by {_names(actual.limits)}"
        if actual is not None and actual.ttft_s is not None:
            text += f"; first token forecast after {short(shown.ttft_s.value)} s, came after {short(actual.ttft_s)} s"
        return text

    def settle(self, actual: Actual) -> None:
        """Set what came beside it."""
        self.actual = actual
        write_actual(self.identity, actual)

    def report(self) -> dict[str, Any]:
        """For JSON: predicted, corrected, actual and the errors, as shares of the actual."""
        found: dict[str, Any] = {
            "tokens_per_s": asdict(self.one.tokens_per_s),
            "ttft_s": asdict(self.one.ttft_s),
            "hit_rate": self.one.hit.value,
            "limits": self.one.limits,
            "decode_parts_s": asdict(self.one.decode),
            "prefill_parts_s": asdict(self.one.prefill),
            "corrected": {
                "tokens_per_s": asdict(self.shown.tokens_per_s),
                "ttft_s": asdict(self.shown.ttft_s),
                "runs": self.runs,
            },
        }
        if (actual := self.actual) is not None:
            found["actual"] = asdict(actual) | {"limits": actual.limits}
            found["error"] = {
                name: predicted.value / came - 1
                for name, predicted, came in (
                    ("tokens_per_s", self.one.tokens_per_s, actual.tokens_per_s),
                    ("ttft_s", self.one.ttft_s, actual.ttft_s),
                )
                if came
            }
        return found


def predict(
    model: LoadedModel, files: ModelFiles, prompt_tokens: int, what: str, *, follows_trace: bool = False
) -> Prediction | None:
    """Forecast ``model``, loaded but not yet run, and write that down. Reads a little of it: how fast is its disk now?

    follows_trace: its routing is recorded, not its own. None if this machine, or the GPU that computes, was never
    measured, or if the model is of a kind whose config cannot be counted: a forecast never keeps a model from running.
    """
    from moei_cli.measured_machine import gpu_for, stored_profile

    profile = stored_profile()
    if profile is None:
        return None
    try:
        shape = shape_of_files(files)
        gpu = None if model.device_budget is None else gpu_for(profile, model.options.device, None)
    except MoeiError:
        return None
    if follows_trace:
        shape = replace(shape, uniform_routing=False)
    if model.device_budget is not None and gpu is None:
        return None
    disk = profile.disk_of(weights_folder(model.folder))
    speeds = Speeds.of(profile, disk)
    plan = None
    if gpu is not None and model.device_budget is not None:
        plan = GpuPlan(gpu, model.device_budget, speeds.memory_bandwidth, model.options.misses == "copy")
    one = forecast(shape, shape.format, speeds, model.budget, prompt_tokens, gpu=plan)
    # A first prompt takes a moment, replies take long: that one has the disk of now, they what it gave over a while.
    if disk is not None and (now := _disk_now(disk, model.folder, shape)) is not None:
        first = forecast(shape, shape.format, Speeds.of(profile, now), model.budget, prompt_tokens, gpu=plan)
        one = replace(one, ttft_s=first.ttft_s, prefill=first.prefill)
    learned = correction(profile.fingerprint, one)
    identity = write_prediction(profile.fingerprint, shape, one, what)
    return Prediction(identity, one, corrected(one, learned.decode, learned.ttft), learned.runs)


def _disk_now(disk: DiskProfile, folder: Path, shape: ModelShape) -> DiskProfile | None:
    """``disk``, that of the model in ``folder``, as fast as it is now; None where that is not found out.

    What a disk gives changes: shared ones are fast after a rest, and slow once much was read. Some of the model's bytes
    are read, and forgotten.
    """
    from moei_core.hardware.probe.reads import read_again

    nbytes = shape.expert_nbytes(shape.format)
    if shape.total_experts * nbytes < _LEAST_NBYTES:
        return None
    # So small that a slow disk gives several in the time.
    nbytes = min(nbytes, max(1 << 20, int(disk.expert_bandwidth(nbytes).value * _AGAIN_S / 32)))
    with suppress(OSError):
        files = [path.resolve() for path in folder.iterdir() if path.is_file()]
        found = read_again(max(files, key=lambda path: path.stat().st_size), nbytes, _AGAIN_S)
        if found is not None:
            return disk.at_another_moment(*found)
    return None


@contextmanager
def refusals_with_speed(files: ModelFiles) -> Iterator[None]:
    """A budget that is refused names the smallest that works; add what that would come to."""
    from moei_cli.measured_machine import stored_profile

    try:
        yield
    except DoesNotFitError as error:
        profile = stored_profile()
        with suppress(MoeiError):
            shape = shape_of_files(files)
            error.hint += speed_of_the_smallest(
                error, shape, shape.format, profile, weights_folder(files.folder)
            )
        raise


def speed_of_the_smallest(
    error: DoesNotFitError,
    shape: ModelShape,
    form: StorageFormat,
    profile: HardwareProfile | None,
    folder: Path | None,
) -> str:
    """What the smallest budget that ``error`` names would come to, as a sentence; empty if that is not known."""
    if error.smallest_slots is None or profile is None:
        return ""
    speeds = Speeds.of(profile, profile.disk_of(folder))
    share = ExpertBudget(fraction=min(1.0, error.smallest_slots / shape.total_experts + 1e-6))
    try:
        budget = plan_budget(shape, form, speeds, 1 << 60, 4096, experts=share)
        one = forecast(shape, form, speeds, budget, 256)
    except MoeiError:
        return ""
    return f" It would decode about {short(one.tokens_per_s.value)} tokens/s."


def short(value: float, digits: int = 2) -> str:
    """A speed or a duration for people: ``digits`` figures that count, and never an exponent for a large one."""
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def actual_of(report: TurnReport, model: LoadedModel, *, cold: bool = True) -> Actual:
    """What a turn came to. cold: its prompt was read by an empty cache. A few tokens are no measure of speed."""
    from moei_core.engine.measure import decode_hit_rate

    stall, experts, on_gpu = report.decode_shares
    measured = len(report.times.token_s) >= _LEAST_TOKENS
    return Actual(
        report.decode_tokens_per_s if measured else None,
        report.times.prefill_s if cold and report.times.prefill_s else None,
        decode_hit_rate(report.cache.misses, len(report.times.token_s), report.times, model.spec)
        if measured
        else None,
        stall if measured else None,
        experts if measured else None,
        on_gpu if measured else None,
    )


def _names(limits: Sequence[str]) -> str:
    return ", ".join(WORDS[name] for name in limits) or "?"


def print_beside(prediction: Prediction) -> None:
    """Predicted and actual, on standard output."""
    from moei_cli import render

    actual = prediction.actual
    if actual is None:
        return
    one, shown = prediction.one, prediction.shown
    rows = []
    for name, predicted, learned, came in (
        ("tokens/s", one.tokens_per_s, shown.tokens_per_s, actual.tokens_per_s),
        ("first token, cold, s", one.ttft_s, shown.ttft_s, actual.ttft_s),
    ):
        if came:
            span = f"{short(predicted.value, 3)} ({short(predicted.low, 3)} - {short(predicted.high, 3)})"
            error = f"{predicted.value / came - 1:+.0%}"
            rows.append((name, span, short(learned.value, 3), short(came, 3), error))
    expected, came_by = _names(one.limits), _names(actual.limits)
    right = "" if not actual.limits else "right" if agree(one.limits, actual.limits) else "wrong"
    rows.append(("limited by", expected, expected, came_by, right))
    print()
    headings = ("forecast", "before the run", f"with {prediction.runs} runs learned", "came", "error")
    render.print_table(headings, rows, right=headings[1:])
