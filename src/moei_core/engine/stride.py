"""The stride predictor: a small network for each layer, trained on recorded layer inputs.

ProMoE (arXiv 2410.22134): from the input of layer l predict the gate's choice of layer l + 1 + stride, so that
there is a whole layer's time to fetch. Two layers a network, trained in minutes on a processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from moei_core.errors import DamagedFileError, ModelNotFoundError, UsageError
from moei_core.trace.format import Trace
from moei_core.trace.hidden import HiddenStates

FORMAT, VERSION = "moei-stride-predictor", "1"
BATCH, LEARNING_RATE, STEPS = 256, 2e-3, 300
_KINDS = ("mean", "scale", "w1", "b1", "w2", "b2")
Weights = dict[str, torch.Tensor]


@dataclass(slots=True)
class StridePredictor:
    """``layers``: the MoE layers of the model in order. ``weights``: by the layer whose input is looked at.

    mean, scale: [hidden_size], applied to the input. w1: [width, hidden_size]. w2: [num_experts, width].
    """

    model: str
    stride: int
    layers: tuple[int, ...]
    weights: dict[int, Weights]

    def predict(self, layer: int, hidden_states: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """(the layer predicted, the probability of each of its experts); None where there is no such layer.

        hidden_states: [1, hidden_size], what the experts of ``layer`` are given.
        """
        weights = self.weights.get(layer)
        if weights is None:
            return None
        with torch.inference_mode():
            logits = _forward(weights, hidden_states.reshape(1, -1).to(torch.float32))
        return self.layers[self.layers.index(layer) + 1 + self.stride], torch.sigmoid(logits[0])

    def check(self, num_experts: Mapping[int, int], hidden_size: int) -> None:
        """Raises: UsageError if this was trained for a model of another shape."""
        first = next(iter(self.weights.values()))
        widest = max(num_experts.values())
        if (
            self.layers != tuple(num_experts)
            or first["w1"].shape[1] != hidden_size
            or len(first["b2"]) != widest
        ):
            raise UsageError(
                "This predictor was trained for another model.",
                f"It belongs to {self.model or 'a model'} with {len(self.layers)} MoE layers of {len(first['b2'])} "
                f"experts.",
                "Record and train one: moei trace record MODEL --hidden 2000 ..., then moei trace train.",
            )

    def save(self, file: Path) -> None:
        """Write ``file``, creating its folder."""
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "stride": str(self.stride),
            "layers": json.dumps(self.layers),
        }
        tensors = {
            f"{layer}.{kind}": w[kind].contiguous() for layer, w in self.weights.items() for kind in _KINDS
        }
        save_file(tensors, file, metadata)

    @classmethod
    def load(cls, file: Path) -> StridePredictor:
        """Raises: ModelNotFoundError, DamagedFileError."""
        if not file.is_file():
            raise ModelNotFoundError(f"There is no predictor file {file}.", hint="Make one: moei trace train")
        try:
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                    raise ValueError("its format is another one")
                weights: dict[int, Weights] = {}
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    layer, _, kind = name.partition(".")
                    weights.setdefault(int(layer), {})[kind] = stored.get_tensor(name)
                layers = tuple(int(layer) for layer in json.loads(metadata["layers"]))
                if not weights or any(set(w) != set(_KINDS) for w in weights.values()):
                    raise ValueError("tensors are missing")
                return cls(metadata["model"], int(metadata["stride"]), layers, weights)
        except Exception as error:
            raise DamagedFileError(
                f"The predictor {file.name} cannot be used.",
                f"{type(error).__name__}: {error}",
                "Train it again: moei trace train",
            ) from None


def _forward(weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(
        nn.functional.linear((inputs - weights["mean"]) * weights["scale"], weights["w1"], weights["b1"])
    )
    return nn.functional.linear(hidden, weights["w2"], weights["b2"])


def train(
    trace: Trace,
    hidden: HiddenStates,
    *,
    stride: int = 1,
    width: int = 128,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> tuple[StridePredictor, dict[int, float]]:
    """Fit one network a layer; returns it and the recall of each on sequences that it did not learn from.

    Recall is the share of the chosen experts among as many predicted ones, by the layer looked at. Deterministic
    on one machine. Raises: UsageError if there are too few samples, or too few layers.
    """
    layers = trace.moe_layers
    if len(layers) < 2 + stride:
        raise UsageError(f"--stride {stride} reaches beyond the {len(layers)} MoE layers of this model.")
    sequence = np.searchsorted(trace.sequence_offsets, hidden.tokens, side="right") - 1
    # Every fourth sequence is for judging: consecutive tokens are alike, so never split within one.
    known, judged = np.flatnonzero(sequence % 4 != 3), np.flatnonzero(sequence % 4 == 3)
    if len(judged) < 16 or len(known) < 64:
        raise UsageError(
            f"{len(hidden.tokens)} samples of {len(set(sequence.tolist()))} conversations are too few to train on.",
            hint="Record more: at least four conversations and --hidden 500.",
        )
    weights: dict[int, Weights] = {}
    recalls: dict[int, float] = {}
    for at in range(len(layers) - 1 - stride):
        inputs = torch.from_numpy(hidden.states[:, at].astype(np.float32))
        chosen = np.asarray(trace.experts[hidden.tokens, at + 1 + stride], np.int64)
        targets = torch.zeros((len(inputs), trace.num_experts + 1))
        targets.scatter_(1, torch.from_numpy(chosen), 1.0)
        targets = targets[:, : trace.num_experts]
        fitted = _fit(inputs[known], targets[known], width, seed + at)
        weights[layers[at]] = fitted
        recalls[layers[at]] = _recall(_forward(fitted, inputs[judged]), targets[judged])
        progress()
    return StridePredictor(trace.model, stride, layers, weights), recalls


def _fit(inputs: torch.Tensor, targets: torch.Tensor, width: int, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    hidden, experts = inputs.shape[1], targets.shape[1]
    mean, scale = inputs.mean(0), 1 / (inputs.std(0) + 1e-4)
    # The popularity of each expert is the starting point, so that early steps need not learn it.
    popularity = targets.mean(0).clamp(1e-3, 1 - 1e-3)
    trained = {
        "w1": torch.randn((width, hidden), generator=generator) / hidden**0.5,
        "b1": torch.zeros(width),
        "w2": torch.randn((experts, width), generator=generator) * 0.01,
        "b2": torch.log(popularity / (1 - popularity)),
    }
    for parameter in trained.values():
        parameter.requires_grad_()
    weights = {"mean": mean, "scale": scale, **trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(inputs), (min(BATCH, len(inputs)),), generator=generator)
        loss = nn.functional.binary_cross_entropy_with_logits(_forward(weights, inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return {kind: value.detach() for kind, value in weights.items()}


def _recall(logits: torch.Tensor, targets: torch.Tensor) -> float:
    count = int(targets.sum(1).max())
    best: NDArray[np.intp] = torch.topk(logits, count).indices.numpy()
    right = np.take_along_axis(targets.numpy(), best, 1).sum()
    return float(right / targets.sum())
