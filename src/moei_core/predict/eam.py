"""Expert activation matrices and collections of them (MoE-Infinity, arXiv 2401.14361)."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from moei_core.errors import DamagedFileError
from moei_core.types import LayerAccess, Phase

VERSION = 1
Array = NDArray[np.float32]


class ExpertActivationMatrix:
    """How many tokens each expert of each layer served: [layers, experts].

    *iEAM*: of one forward pass, rows of layers that have not run being zero. *rEAM*: of a request, prefill
    and decode apart, because mixing their very different counts blurs both.
    """

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        self._position = {layer: i for i, layer in enumerate(num_experts)}
        shape = (len(num_experts), max(num_experts.values()))
        self.current: Array = np.zeros(shape, np.float32)
        self.request: dict[Phase, Array] = {phase: np.zeros(shape, np.float32) for phase in Phase}

    def start_request(self) -> None:
        """Forget the request before."""
        for matrix in self.request.values():
            matrix.fill(0)
        self.current.fill(0)

    def start_pass(self) -> None:
        """Forget the pass before."""
        self.current.fill(0)

    def record(self, access: LayerAccess) -> tuple[NDArray[np.intp], Array]:
        """Count one access in the pass's and in the request's matrix; returns (experts, counts) as arrays."""
        i = self._position[access.layer]
        experts, counts = np.array(access.experts, np.intp), np.array(access.token_counts, np.float32)
        self.current[i, experts] = counts
        self.request[access.phase][i, experts] += counts
        return experts, counts


def sum_of_squares(counts: Array) -> float:
    """Of whole numbers, exactly."""
    return float(np.square(counts, dtype=np.float64).sum())


class Matcher:
    """Cosine similarities of a growing query to every entry of a collection, row by row.

    The matrices are compared over the rows executed so far: rows not yet executed are masked out on both
    sides (otherwise all entries tie in the first pass). A new row touches only the columns of its experts,
    so a whole token at capacity 1,000 of 48 x 128 costs well below a millisecond.
    """

    def __init__(self, entries: Array, norms: Array) -> None:
        """entries: [layers, experts, capacity]. norms: [layers + 1, capacity], squares summed up to a row."""
        self._entries, self._norms = entries, norms
        self._dot = np.zeros(entries.shape[2], np.float32)
        self._square = 0.0
        self._rows = 0

    def add_row(
        self, i: int, experts: NDArray[np.intp], counts: Array, *, added_square: float | None = None
    ) -> None:
        """The row of layer number ``i`` has gained ``counts`` at ``experts``."""
        # Not a matrix product: libraries sum in an order of their own, and plans must not depend on it.
        self._dot += (self._entries[i].take(experts, axis=0) * counts[:, None]).sum(axis=0)
        self._square += sum_of_squares(counts) if added_square is None else added_square
        self._rows = max(self._rows, i + 1)

    def similarities(self) -> Array:
        """[capacity], 0 where an entry is empty over the executed rows."""
        norm = self._norms[self._rows] * np.float32(self._square)
        similar: Array = self._dot / np.sqrt(np.maximum(norm, np.float32(1e-12)))
        return similar


class ExpertActivationMatrixCollection:
    """A bounded collection of rEAMs of one phase, filled online at the end of each request.

    When it is full, a newcomer replaces the entry nearest to it by cosine distance, so the collection stays
    diverse. Rows are normalised to sum 1, so that long and short requests count alike.
    """

    def __init__(self, num_experts: Mapping[int, int], capacity: int = 128) -> None:
        assert capacity >= 1
        self.capacity = capacity
        self._shape = (len(num_experts), max(num_experts.values()))
        # Entries last: what a row update reads is then contiguous.
        self._entries = np.zeros((*self._shape, capacity), np.float32)
        self._norms = np.zeros((self._shape[0] + 1, capacity), np.float32)
        self.size = 0
        # More than the collection holds would only replace each other when they are saved.
        self.unsaved: deque[Array] = deque(maxlen=capacity)

    def matcher(self) -> Matcher:
        """A fresh query over what the collection holds now."""
        return Matcher(self._entries[:, :, : self.size], self._norms[:, : self.size])

    def entry(self, at: int) -> Array:
        """[layers, experts], rows summing to 1 (or 0 where a layer did not run)."""
        return self._entries[:, :, at]

    def combine(self, nearest: NDArray[np.intp], i: int) -> Array:
        """Row ``i`` of the sum of the entries ``nearest``, normalised."""
        row: Array = self._entries[i].take(nearest, axis=1).sum(axis=1)
        total = float(row.sum())
        return row / np.float32(total) if total else row

    def add(self, matrix: Array, *, remember: bool = True) -> None:
        """File the rEAM of a request that has ended; an empty one is ignored."""
        sums = matrix.sum(axis=1, keepdims=True)
        if not sums.any():
            return
        rows = (matrix / np.maximum(sums, np.float32(1e-9))).astype(np.float32)
        at = self.size
        if self.size == self.capacity:
            at = self._nearest(rows)
        else:
            self.size += 1
        self._entries[:, :, at] = rows
        self._norms[1:, at] = np.cumsum((rows**2).sum(axis=1))
        if remember:
            self.unsaved.append(rows)

    def _nearest(self, rows: Array) -> int:
        dot = np.zeros(self.capacity, np.float32)
        for entries, row in zip(self._entries, rows, strict=True):
            dot += (entries * row[:, None]).sum(axis=0)
        return int(np.argmax(dot / np.sqrt(np.maximum(self._norms[-1], np.float32(1e-12)))))

    def save(self, path: str | Path) -> None:
        """Merge what is new here into the file at ``path``, whole or not at all.

        Two processes that end at once do not lose each other's requests: under a lock, each adds its own new
        entries to what the file holds by then.

        Raises: DamagedFileError if the file there is not such a collection of this shape.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            merged = ExpertActivationMatrixCollection(
                dict.fromkeys(range(self._shape[0]), self._shape[1]), self.capacity
            )
            if path.exists():
                merged.load(path)
            for rows in self.unsaved:
                merged.add(rows, remember=False)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
            os.close(handle)
            try:
                stored = np.ascontiguousarray(np.moveaxis(merged._entries[:, :, : merged.size], 2, 0))
                save_file({"entries": stored.astype(np.float16)}, temporary, {"version": str(VERSION)})
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        self.unsaved.clear()

    def load(self, path: str | Path) -> None:
        """Add the entries of a saved collection, the oldest first. Raises: DamagedFileError."""
        path = Path(path)
        try:
            stored = load_file(path)["entries"]
        except Exception as error:
            raise DamagedFileError(
                f"The expert statistics {path} cannot be read.",
                f"{type(error).__name__}: {error}",
                "Delete the file; it is learned again.",
            ) from None
        if stored.ndim != 3 or stored.shape[1:] != self._shape or not np.isfinite(stored).all():
            raise DamagedFileError(
                f"The expert statistics {path} belong to another model.",
                f"They have the shape {stored.shape[1:]}, the model {self._shape}.",
                "Delete the file; it is learned again.",
            )
        for rows in stored.astype(np.float32):
            self.add(rows, remember=False)
