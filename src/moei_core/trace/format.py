"""The trace file, version 1: one safetensors file of expert ids. Read memory-mapped, validated, written.

Shapes: [tokens, moe_layers, top_k] for ``experts`` and ``weights``; the value ``num_experts`` means none, a
row is a set. Offsets count tokens and have one entry more than what they delimit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from moei_core.config import PREFILL_CHUNK
from moei_core.errors import DamagedFileError, ModelNotFoundError, UsageError
from moei_core.types import Phase

FORMAT = "moei-trace"
VERSION = "1"
_DTYPES = {"U8": "<u1", "U16": "<u2", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4"}
_MAX_HEADER = 100_000_000
_CHECK_TOKENS = 8192


class TraceEvent(IntEnum):
    """Kinds of rows in ``events``: [forward passes and accesses begun before it, kind, a, b]."""

    START_LOAD = 0
    """A prefetch of expert b of layer a has begun."""
    FINISH_LOAD = 1
    """A prefetch of expert b of layer a is complete."""
    CANCEL_LOAD = 2
    """The bytes of expert b of layer a did not arrive."""
    RESIZE = 3
    """The cache now has a slots for residents."""
    PREFETCH_MODE = 4
    """Prefetching is off (a = 0), on (1) or decides for itself (2)."""
    STALL = 5
    """The pass that ended waited a nanoseconds for experts and took b nanoseconds in all."""
    RESIZE_DEVICE = 6
    """The device's cache now has a slots for residents."""
    SPENT = 7
    """The turn that ended spent b nanoseconds on part a of ``time_spent.PARTS``."""


@dataclass(frozen=True)
class Trace:
    """Routing of whole conversations, as stored. Arrays may be views of the memory-mapped file.

    hint_distances: for each column of the hints how many MoE layers before theirs they arose; empty: one.
    """

    model: str
    num_experts: int
    num_experts_per_tok: int
    moe_layers: tuple[int, ...]
    experts: NDArray[Any]
    sequence_offsets: NDArray[np.int64]
    pass_offsets: NDArray[np.int64] | None = None
    request_offsets: NDArray[np.int64] | None = None
    phase: NDArray[np.uint8] | None = None
    weights: NDArray[np.float16] | None = None
    hints_experts: NDArray[Any] | None = None
    hints_scores: NDArray[Any] | None = None
    hint_distances: tuple[int, ...] = ()
    events: NDArray[np.int64] | None = None
    sequence_tasks: tuple[str, ...] = ()
    source: str = ""
    note: str = ""
    path: str = field(default="", compare=False)

    @property
    def tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def sequences(self) -> int:
        return len(self.sequence_offsets) - 1

    @property
    def passes(self) -> NDArray[np.int64]:
        """First token of each forward pass, and the end."""
        if self.pass_offsets is not None:
            return self.pass_offsets
        return np.arange(self.tokens + 1, dtype=np.int64)

    @property
    def requests(self) -> NDArray[np.int64]:
        """First token of each turn, and the end."""
        return self.sequence_offsets if self.request_offsets is None else self.request_offsets

    @property
    def experts_by_layer(self) -> dict[int, int]:
        """num_experts by decoder layer, as policies want it."""
        return dict.fromkeys(self.moe_layers, self.num_experts)

    def subset(self, start: int, stop: int) -> Trace:
        """Sequences ``start`` .. ``stop`` - 1 as a trace of their own (views, no copy). Events are dropped:
        they belong to the whole run.

        Raises: UsageError for an empty or impossible range.
        """
        if not 0 <= start < stop <= self.sequences:
            raise UsageError(f"Sequences {start} to {stop} are not in a trace of {self.sequences}.")
        first, last = int(self.sequence_offsets[start]), int(self.sequence_offsets[stop])

        def tokens(array: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if array is None else array[first:last]

        def offsets(array: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
            return None if array is None else array[(array >= first) & (array <= last)] - first

        return replace(
            self,
            experts=self.experts[first:last],
            sequence_offsets=self.sequence_offsets[start : stop + 1] - first,
            pass_offsets=offsets(self.pass_offsets),
            request_offsets=offsets(self.request_offsets),
            phase=tokens(self.phase),
            weights=tokens(self.weights),
            hints_experts=tokens(self.hints_experts),
            hints_scores=tokens(self.hints_scores),
            events=None,
            sequence_tasks=self.sequence_tasks[start:stop],
        )

    def as_requests(
        self, requests: Sequence[tuple[int, int]], start: int = 0, chunk: int = PREFILL_CHUNK
    ) -> Trace:
        """The tokens from ``start`` on as other requests, each a sequence of its own; after the last token comes
        the first again. requests: (tokens of the prompt, tokens of the reply).

        Prompts are in passes of ``chunk`` tokens, replies of one token each. Only routing and hints are kept.
        """
        bounds, phase, ends = [0], [], [0]
        for prompt, reply in requests:
            begin, middle = bounds[-1], bounds[-1] + prompt
            bounds += [*range(begin + chunk, middle, chunk), *([middle] if prompt else [])]
            bounds += range(middle + 1, middle + reply + 1)
            phase += [Phase.PREFILL] * prompt + [Phase.DECODE] * reply
            ends.append(bounds[-1])
        rows = np.arange(start, start + ends[-1]) % self.tokens
        return Trace(
            self.model,
            self.num_experts,
            self.num_experts_per_tok,
            self.moe_layers,
            self.experts[rows],
            np.array(ends, np.int64),
            pass_offsets=np.array(bounds, np.int64),
            phase=np.array(phase, np.uint8),
            hints_experts=None if self.hints_experts is None else self.hints_experts[rows],
            hints_scores=None if self.hints_scores is None else self.hints_scores[rows],
            hint_distances=self.hint_distances,
            source=self.source,
        )


def read_trace(path: str | Path) -> Trace:
    """Open and check a trace; the big arrays stay memory-mapped.

    Raises: ModelNotFoundError if there is no such file; DamagedFileError for anything that is not a valid
    trace of version 1, saying what is wrong and where.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFoundError(f"There is no trace file {path}.")
    tensors, metadata = _map_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise _damaged(path, "it is not a moei trace (metadata 'format')")
    if metadata.get("version") != VERSION:
        raise _damaged(
            path,
            f"it has version {metadata.get('version')!r}; this program reads version {VERSION}",
            "Use the program that wrote it, or record it again.",
        )
    known = {
        "experts",
        "sequence_offsets",
        "pass_offsets",
        "request_offsets",
        "phase",
        "weights",
        "hints_experts",
        "hints_scores",
        "events",
    }
    for needed in ("experts", "sequence_offsets"):
        if needed not in tensors:
            raise _damaged(path, f"the tensor '{needed}' is missing")
    try:
        tasks = json.loads(metadata.get("sequence_tasks", "[]"))
        trace = Trace(
            model=metadata.get("model", ""),
            num_experts=int(metadata["num_experts"]),
            num_experts_per_tok=int(metadata["num_experts_per_tok"]),
            moe_layers=tuple(int(layer) for layer in json.loads(metadata["moe_layers"])),
            sequence_tasks=tuple(str(task) for task in tasks),
            hint_distances=tuple(int(d) for d in json.loads(metadata.get("hint_distances", "[]"))),
            source=metadata.get("source", ""),
            note=metadata.get("note", ""),
            path=str(path),
            **{name: array for name, array in tensors.items() if name in known},
        )
    except KeyError as error:
        raise _damaged(path, f"the metadata lacks {error}") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(path, f"its metadata cannot be understood ({error})") from None
    problem = find_problem(trace)
    if problem:
        raise _damaged(path, problem)
    return trace


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write ``trace`` to ``path``, whole or not at all. Raises: UsageError if the trace is not valid."""
    problem = find_problem(trace)
    if problem:
        raise UsageError(f"This trace cannot be written: {problem}.")
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": trace.model,
        "num_experts": str(trace.num_experts),
        "num_experts_per_tok": str(trace.num_experts_per_tok),
        "moe_layers": json.dumps(list(trace.moe_layers)),
        "source": trace.source,
        "note": trace.note,
    }
    if trace.sequence_tasks:
        metadata["sequence_tasks"] = json.dumps(list(trace.sequence_tasks))
    if trace.hints_experts is not None and trace.hint_distances:
        metadata["hint_distances"] = json.dumps(list(trace.hint_distances))
    tensors = {
        "experts": trace.experts,
        "sequence_offsets": trace.sequence_offsets,
        "pass_offsets": trace.pass_offsets,
        "request_offsets": trace.request_offsets,
        "phase": trace.phase,
        "weights": trace.weights,
        "hints_experts": trace.hints_experts,
        "hints_scores": trace.hints_scores,
        "events": trace.events,
    }
    present = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.touch()
    # As the umask has it; safetensors keeps its files from others.
    mode = temporary.stat().st_mode
    try:
        save_file(present, temporary, metadata)
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def find_problem(trace: Trace) -> str | None:
    """What is wrong with ``trace``, as the end of a sentence; None: nothing."""
    return next(_problems(trace), None)


def _problems(trace: Trace) -> Iterator[str]:
    layers, count, top_k = trace.moe_layers, trace.num_experts, trace.num_experts_per_tok
    experts = trace.experts
    if count < 1 or not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
        yield "num_experts must be at least 1 and moe_layers an ascending list"
        return
    if experts.dtype not in (np.uint8, np.uint16):
        yield f"'experts' has type {experts.dtype}, not uint8 or uint16"
        return
    if top_k > count or count > 1 << 8 * experts.itemsize:
        yield f"{top_k} of {count} experts are too many for 'experts' of type {experts.dtype}"
        return
    if experts.ndim != 3 or experts.shape[1] != len(layers) or not 1 <= experts.shape[2] <= top_k:
        yield (
            f"'experts' has shape {list(experts.shape)}, "
            f"not [tokens, {len(layers)} layers, 1 to {top_k} experts]"
        )
        return
    tokens = trace.tokens
    yield from _offset_problems("sequence_offsets", trace.sequence_offsets, tokens)
    if trace.pass_offsets is not None:
        yield from _offset_problems("pass_offsets", trace.pass_offsets, tokens)
    if trace.request_offsets is not None:
        yield from _offset_problems("request_offsets", trace.request_offsets, tokens)
    if not np.isin(trace.sequence_offsets, trace.requests).all():
        yield "a sequence begins in the middle of a request"
    if not np.isin(trace.requests, trace.passes).all():
        yield "a request begins in the middle of a forward pass"
    if trace.sequence_tasks and len(trace.sequence_tasks) != trace.sequences:
        yield f"'sequence_tasks' names {len(trace.sequence_tasks)} tasks for {trace.sequences} sequences"
    if trace.phase is not None and (
        trace.phase.dtype != np.uint8 or trace.phase.shape != (tokens,) or (trace.phase > 1).any()
    ):
        yield "'phase' is not one 0 (prefill) or 1 (decode) for each token"
    if trace.weights is not None and (
        trace.weights.dtype != np.float16 or trace.weights.shape != experts.shape
    ):
        yield "'weights' is not float16 in the shape of 'experts'"
    yield from _hint_problems(trace)
    if trace.events is not None:
        events = trace.events
        if events.dtype != np.int64 or events.ndim != 2 or events.shape[1] != 4:
            yield "'events' is not int64 in the shape [n, 4]"
        elif len(events) and (
            (np.diff(events[:, 0]) < 0).any()
            or not np.isin(events[:, 1], [int(kind) for kind in TraceEvent]).all()
        ):
            yield "'events' is out of order or holds an unknown kind"
    yield from _id_problems(experts, count)


def _offset_problems(name: str, offsets: NDArray[np.int64], tokens: int) -> Iterator[str]:
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2:
        yield f"'{name}' is not a list of int64 with at least two entries"
    elif offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) <= 0).any():
        yield f"'{name}' does not ascend from 0 to the {tokens} tokens of 'experts'"


def _hint_problems(trace: Trace) -> Iterator[str]:
    hints, scores = trace.hints_experts, trace.hints_scores
    if (hints is None) != (scores is None):
        yield "'hints_experts' and 'hints_scores' must come together"
    elif hints is not None and scores is not None:
        if hints.ndim != 3 or hints.shape[:2] != trace.experts.shape[:2] or scores.shape != hints.shape:
            yield "the hints do not have the shape [tokens, moe_layers, h]"
        elif hints.dtype not in (np.uint8, np.uint16) or (hints > trace.num_experts).any():
            yield "'hints_experts' holds an id above num_experts"
        elif not np.isfinite(scores).all() or (scores < 0).any():
            yield "'hints_scores' holds a negative or infinite score"
        elif trace.hint_distances and (
            len(trace.hint_distances) != hints.shape[2] or min(trace.hint_distances) < 1
        ):
            yield "'hint_distances' does not give a distance of at least 1 for each column of the hints"


def _id_problems(experts: NDArray[Any], count: int) -> Iterator[str]:
    # In blocks: a trace may be far larger than what should be in memory at once.
    for start in range(0, len(experts), _CHECK_TOKENS):
        rows = np.sort(experts[start : start + _CHECK_TOKENS], axis=2)
        if int(rows[:, :, -1].max(initial=0)) > count:
            token = start + int(np.argmax((rows > count).any(axis=(1, 2))))
            yield f"token {token} names an expert above {count - 1}"
            return
        repeated = ((rows[:, :, 1:] == rows[:, :, :-1]) & (rows[:, :, 1:] < count)).any(axis=2)
        if repeated.any():
            token, layer = np.argwhere(repeated)[0]
            yield f"token {start + token} names an expert twice in MoE layer number {layer}"
            return


def _map_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a safetensors file as views of its mapping, and the metadata strings."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _damaged(path, "it ends before its header does")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors: dict[str, NDArray[Any]] = {}
        mapped = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
        for name, entry in header.items():
            begin, end = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(extent) for extent in entry["shape"])
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            nbytes = dtype.itemsize * int(np.prod(shape, dtype=object))
            if (
                not 0 <= begin <= end <= size - 8 - length
                or end - begin != nbytes
                or min(shape, default=0) < 0
            ):
                raise _damaged(path, f"the tensor '{name}' does not fit into the file")
            raw = mapped[8 + length + begin : 8 + length + end]
            # numpy reads unaligned views, only slower; everything but the big array is copied and so aligned.
            tensors[name] = (
                raw.view(dtype).reshape(shape)
                if dtype.itemsize == 1 or (8 + length + begin) % dtype.itemsize == 0
                else (np.frombuffer(raw.tobytes(), dtype).reshape(shape))
            )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path, f"its header is not that of a safetensors file ({error})") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata are not strings")
    return tensors, metadata


def _damaged(path: Path, why: str, hint: str = "Copy or record it again.") -> DamagedFileError:
    return DamagedFileError(f"The trace {path.name} cannot be used: {why}.", hint=hint)
