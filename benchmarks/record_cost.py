"""What recording a trace costs: processor time inside the recorder as a share of decoding.

    python benchmarks/record_cost.py [MODEL] [--tokens 200] [--experts 25%]

Every call of the recorder (and of the sampler of layer inputs, kept for 500 tokens) is timed within a live run,
since two whole runs differ by more than the 2% that it may cost. The bundled model is the hardest case: its
layers are the smallest. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hub.resolve import resolve_model
from moei_core.trace.hidden import HiddenSampler

CEILING = 0.02
QUESTIONS = ("What does moei do?", "What is an expert?", "Why do experts live on disk?", "What is a router?")


class Timed:
    """Stands before ``target`` and sums the processor time of its calls, the timing of them included."""

    def __init__(self, target: object) -> None:
        self.target, self.seconds = target, 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return value(*arguments)
            finally:
                self.seconds += time.thread_time() - started

        return call


def measure(model: str, tokens: int, experts: str, sampled: int) -> tuple[float, float]:
    """(seconds of processor time in the recorder, of the thread in all) for about ``tokens`` tokens."""
    with (
        TemporaryDirectory() as folder,
        LoadedModel(resolve_model(model).folder, LoadOptions(experts=ExpertBudget.parse(experts))) as loaded,
    ):
        spec = loaded.spec
        settings = GenerationSettings(max_new_tokens=tokens // len(QUESTIONS), temperature=1.0, seed=1)

        def ask() -> None:
            for question in QUESTIONS:
                list(ChatSession(loaded, settings).reply(question))

        ask()
        file = Path(folder) / "t"
        recorder = Timed(loaded.record(file, model))
        loaded.runtime.recorder = recorder  # type: ignore[assignment]
        parts = [recorder]
        if sampled:
            parts.append(Timed(HiddenSampler(sampled, spec.moe_layers, spec.hidden_size)))
            loaded.runtime.sampler = parts[1]  # type: ignore[assignment]
        started = time.thread_time()
        ask()
        return sum(part.seconds for part in parts), time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="moei-demo")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--experts", default="25%")
    options = parser.parse_args()
    report: dict[str, Any] = {"model": options.model, "ceiling": CEILING}
    for name, sampled in (("routing", 0), ("routing and layer inputs", 500)):
        recording, whole = measure(options.model, options.tokens, options.experts, sampled)
        report[name] = round(recording / whole, 5)
        print(f"recording {name}: {recording / whole:.2%} of {whole:.2f} s (ceiling {CEILING:.0%})")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
