"""Forecasts for the commands: of a model by name, and of a loaded one before it runs, with the actual set beside."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moei_core.errors import DoesNotFitError, MoeiError
from moei_core.forecast.forecast import BOTTLENECKS, Forecast, corrected, forecast, plan_budget
from moei_core.forecast.ledger import Actual, correction, write_actual, write_prediction
from moei_core.forecast.shape import ModelShape, bundled_shape, shape_of_folder, shape_of_repo
from moei_core.forecast.speed import Speeds
from moei_core.hardware.profile import HardwareProfile

if TYPE_CHECKING:
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
        if (shape := bundled_shape(text.partition("@")[0])) is not None:
            return shape, None
        if name.kind != "hub":
            raise
        return shape_of_repo(name.repo, name.revision), None
    return shape_of_files(files), files.folder


def shape_of_files(files: ModelFiles) -> ModelShape:
    """The shape of a model here. A synthetic one routes uniformly."""
    return shape_of_folder(files.name, files.folder, uniform_routing=files.source == "synthetic")


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
            f"expected {speed.low:.2g} to {speed.high:.2g} tokens/s, first token of a new "
            f"{self.one.prompt_tokens}-token prompt after {first.low:.2g} to {first.high:.2g} s; "
            f"the limit is {BOTTLENECKS[self.one.bottleneck]}"
        )

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
            "bottleneck": self.one.bottleneck,
            "decode_parts_s": asdict(self.one.decode),
            "prefill_parts_s": asdict(self.one.prefill),
            "corrected": {
                "tokens_per_s": asdict(self.shown.tokens_per_s),
                "ttft_s": asdict(self.shown.ttft_s),
                "runs": self.runs,
            },
        }
        if (actual := self.actual) is not None:
            found["actual"] = asdict(actual) | {"bottleneck": actual.bottleneck}
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
    model: LoadedModel, shape: ModelShape, prompt_tokens: int, what: str
) -> Prediction | None:
    """Forecast ``model``, loaded but not yet run, and write that down. None if this machine was never measured."""
    from moei_cli.measured_machine import stored_profile

    profile = stored_profile()
    if profile is None:
        return None
    speeds = Speeds.of(profile, profile.disk_of(model.folder))
    one = forecast(shape, shape.format, speeds, model.budget, prompt_tokens)
    learned = correction(profile.fingerprint, one)
    identity = write_prediction(profile.fingerprint, shape, one, what)
    return Prediction(identity, one, corrected(one, learned.decode, learned.ttft), learned.runs)


def speed_of_the_smallest(error: DoesNotFitError, files: ModelFiles, profile: HardwareProfile | None) -> str:
    """What the smallest budget that ``error`` names would come to, as a sentence; empty if that is not known."""
    if error.smallest_slots is None or profile is None:
        return ""
    from moei_core.config import ExpertBudget

    try:
        shape = shape_of_files(files)
        speeds = Speeds.of(profile, profile.disk_of(files.folder))
        share = ExpertBudget(fraction=min(1.0, error.smallest_slots / shape.total_experts + 1e-6))
        budget = plan_budget(shape, shape.format, speeds, 1 << 60, 4096, experts=share)
        one = forecast(shape, shape.format, speeds, budget, 256)
    except MoeiError:
        return ""
    return f" It would decode about {one.tokens_per_s.value:.2g} tokens/s."


