"""Recordings of what torch computes, to be done again: the interface, and a stand-in without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VALUES = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


class Recording(Protocol):
    """Pieces of work on one device, to be done again; their results keep their places.

    Pieces share memory: what one leaves for a later one must be held as long as they are, and those that do so are
    done in the order in which they were recorded. A piece whose results lie elsewhere (``to_host``, a tensor from
    before) may be left out. What a piece gives while it is recorded means nothing.
    """

    def begin(self) -> None:
        """What torch is told to compute from now on is recorded."""

    def end(self) -> Callable[[], None]:
        """The piece ends. Returns what queues it to be computed."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the host finds what ``tensor`` holds when the piece at hand is done."""

    def from_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(where the host writes before it queues the piece at hand, where the device then finds it)."""

    def call(self, work: Callable[[], None]) -> None:
        """Record what ``work`` computes, with kernels of our own; all results are in tensors that stay."""

    def abandon(self) -> None:
        """Something went wrong: record no longer."""


@dataclass(slots=True)
class RecordedLayer:
    """What a recorded piece ends with: one token has come to the experts of a layer.

    hidden_states: [1, hidden_size] on the device. host: hidden states, experts and weights of the router's choice,
    [1, hidden_size], [1, top_k] and [1, top_k], on the host once the piece is done. output: where the experts' output
    belongs, on the device. residual: the residual stream before the layer's norm, if it is wanted. experts: what the
    runtime has recorded for its own part, if it has. early: what the next layer's router chooses already now, with its
    norm and without: what queues it, and where the host finds it then.
    """

    module: Any
    layer: int
    hidden_states: torch.Tensor
    host: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    output: torch.Tensor
    residual: torch.Tensor | None
    experts: Any = None
    early: dict[bool, tuple[Callable[[], None], torch.Tensor]] = field(default_factory=dict)


class OperationRecording:
    """A ``Recording`` of torch's operations on a processor, one after the other.

    It does them once while it records. As with CUDA graphs a piece only sees what is in its tensors when it is done
    again: numbers that Python took from them stay as they were. What a piece has not computed yet is NaN. And no piece
    may be given up while another is recorded.
    """

    def __init__(self) -> None:
        self._operations: _Operations | None = None

    def begin(self) -> None:
        assert self._operations is None
        self._operations, self._given_up = _Operations(), _Operations.given_up
        self._operations.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> Callable[[], None]:
        operations = self._operations
        assert operations is not None
        self.abandon()
        if _Operations.given_up != self._given_up:
            raise RuntimeError(
                "operation failed due to a previous error during capture: a piece was given up"
            )
        operations.forget_results()
        return operations.repeat

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def from_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        # Not by an operation, which would be done again.
        memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
        both = torch.from_numpy(memory).view(dtype).view(shape)
        return both, both

    def call(self, work: Callable[[], None]) -> None:
        assert self._operations is not None
        self._operations.add(work)

    def abandon(self) -> None:
        if self._operations is not None:
            self._operations.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._operations = None


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    given_up = 0

    def __del__(self) -> None:
        _Operations.given_up += 1

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._done: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUES:
            raise RuntimeError("operation not permitted while it is recorded: the host asks for a value")
        result = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        results = [tensor for tensor in _tensors(result) if _memory(tensor) not in given]
        # Memory is only taken once, and a view of what it was given has its values already.
        if "empty" not in func._schema.name and (results or func._schema.is_mutable):
            self._done.append((func, args, kwargs, results))
        return result

    def add(self, work: Callable[[], None]) -> None:
        self._done.append((work, (), {}, []))

    def forget_results(self) -> None:
        """Nothing has been computed yet: whoever reads a result now would see it."""
        for *_, results in self._done:
            for tensor in results:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    def repeat(self) -> None:
        for func, args, kwargs, results in self._done:
            again = _tensors(func(*args, **kwargs))
            for tensor, value in zip(results, again, strict=False):
                tensor.copy_(value)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
