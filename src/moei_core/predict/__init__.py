"""Predictors of the experts that later layers will choose, and the one registry of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moei_core.predict.base import ExpertPredictor
from moei_core.predict.eamc import EAMCPredictor
from moei_core.predict.markov import MarkovPredictor, PopularityPredictor
from moei_core.predict.mixture import HintPredictor, MixedPredictor, NoisePredictor

PREDICTORS: dict[str, Callable[[Mapping[int, int]], ExpertPredictor]] = {
    "mixed": MixedPredictor,
    "eamc": EAMCPredictor,
    "markov": MarkovPredictor,
    "popularity": PopularityPredictor,
    "router": HintPredictor,
    "stride": HintPredictor,
    "noise": NoisePredictor,
}
"""Name to constructor(num_experts by layer). ``router`` and ``stride`` hand on hints, which the engine computes."""

DEFAULT_PREDICTOR = "mixed"

__all__ = ["DEFAULT_PREDICTOR", "PREDICTORS", "ExpertPredictor"]
