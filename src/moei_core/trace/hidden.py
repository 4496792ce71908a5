"""Sampled layer inputs beside a trace: what predictors are trained on.

One safetensors file: ``tokens`` [n] int64, ascending positions in the trace, and ``hidden_states``
[n, moe_layers, hidden_size] float16, what the experts of each MoE layer were given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from moei_core.errors import DamagedFileError, DoesNotFitError, ModelNotFoundError
from moei_core.trace.format import Trace

_LARGEST = np.float32(np.finfo(np.float16).max)


def sidecar(trace: str | Path) -> Path:
    """Where the samples of a trace are."""
    return Path(trace).with_suffix(".hidden.safetensors")


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """``tokens``: [n]. ``states``: [n, moe_layers, hidden_size] float16."""

    tokens: NDArray[np.int64]
    states: NDArray[np.float16]


class HiddenSampler:
    """Keeps the layer inputs of at most ``count`` tokens, each token of the run being as likely as any other.

    Reservoir sampling (Vitter, ACM Transactions on Mathematical Software 1985, algorithm R), seeded. Memory is
    count x layers x hidden_size x 2 bytes, whatever the length of the run.
    """

    def __init__(self, count: int, moe_layers: tuple[int, ...], hidden_size: int, seed: int = 0) -> None:
        self._position = {layer: at for at, layer in enumerate(moe_layers)}
        try:
            self._states = np.zeros((count, len(moe_layers), hidden_size), np.float16)
            self._tokens = np.full(count, -1, np.int64)
        except (MemoryError, ValueError, OverflowError) as error:
            # numpy's three ways to say that the memory does not exist.
            raise DoesNotFitError(
                f"The layer inputs of {count} tokens do not fit into memory.",
                f"One token's take {len(moe_layers) * hidden_size * 2} bytes.",
                "Ask for fewer: --hidden 2000 is plenty to train on.",
            ) from error
        self._random = np.random.default_rng(seed)
        self._seen = 0
        # Of the pass that runs: rows of it that are kept, and the place of each.
        self._rows: list[int] = []
        self._places: list[int] = []

    def begin_pass(self, tokens: int) -> None:
        """A forward pass over ``tokens`` tokens starts."""
        count, chosen = len(self._tokens), dict[int, int]()
        for row in range(tokens):
            token = self._seen + row
            place = token if token < count else int(self._random.integers(token + 1))
            if place < count:
                self._tokens[place] = token
                chosen[place] = row
        self._seen += tokens
        self._places, self._rows = list(chosen), list(chosen.values())

    @property
    def wants(self) -> list[int]:
        """The rows of this pass that are kept; mostly none."""
        return self._rows

    def record(self, layer: int, rows: NDArray[np.float32]) -> None:
        """rows: [len(wants), hidden_size], what the experts of ``layer`` were given for these tokens; overwritten."""
        np.clip(rows, -_LARGEST, _LARGEST, out=rows)
        self._states[self._places, self._position[layer]] = rows

    def save(self, path: Path) -> int:
        """Write the samples, in the order of their tokens; returns how many there are."""
        order = np.argsort(self._tokens, kind="stable")
        order = order[self._tokens[order] >= 0]
        save_file({"tokens": self._tokens[order], "hidden_states": self._states[order]}, path)
        return len(order)


def read_hidden(path: Path, trace: Trace) -> HiddenStates:
    """The samples that belong to ``trace``. Raises: ModelNotFoundError, DamagedFileError."""
    if not path.is_file():
        raise ModelNotFoundError(
            f"There are no layer inputs beside this trace ({path.name}).",
            hint="Record them: moei trace record MODEL --hidden 2000 --prompts FILE -o TRACE",
        )
    try:
        stored = load_file(path)
        tokens, states = stored["tokens"], stored["hidden_states"]
        fits = (
            tokens.dtype == np.int64
            and tokens.ndim == 1
            and states.dtype == np.float16
            and states.ndim == 3
            and states.shape[:2] == (len(tokens), len(trace.moe_layers))
            and (
                len(tokens) == 0
                or (tokens[0] >= 0 and tokens[-1] < trace.tokens and (np.diff(tokens) > 0).all())
            )
            and bool(np.isfinite(states).all())
        )
    except Exception as error:
        raise DamagedFileError(
            f"The layer inputs {path.name} cannot be read.",
            f"{type(error).__name__}: {error}",
            "Record again.",
        ) from None
    if not fits:
        raise DamagedFileError(
            f"The layer inputs {path.name} do not belong to this trace.", hint="Record both again."
        )
    return HiddenStates(tokens, states)
