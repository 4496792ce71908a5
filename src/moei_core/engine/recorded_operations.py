"""Recordings of what torch computes, to be done again: the interface, and a stand-in without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VALUES = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


class Recording(Protocol):
    """Pieces of work on one device. Nothing is computed while it is recorded, and results keep their places.

    Pieces must be done in the order in which they were recorded, all of them: they share memory.
    """

    def begin(self) -> None:
        """What torch is told to compute from now on is recorded."""

    def end(self) -> Callable[[], None]:
        """The piece ends. Returns what queues it to be computed."""

    def abandon(self) -> None:
        """Something went wrong: record no longer."""


class OperationRecording:
    """A ``Recording`` of torch's operations on a processor, one after the other.

    As with CUDA graphs a piece only sees what is in its tensors when it is done again: numbers that Python took
    from them stay as they were. What a piece has not computed yet is NaN.
    """

    def __init__(self) -> None:
        self._operations: _Operations | None = None

    def begin(self) -> None:
        assert self._operations is None
        self._operations = _Operations()
        self._operations.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> Callable[[], None]:
        operations = self._operations
        assert operations is not None
        self.abandon()
        operations.forget_results()
        return operations.repeat

    def abandon(self) -> None:
        if self._operations is not None:
            self._operations.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._operations = None


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
