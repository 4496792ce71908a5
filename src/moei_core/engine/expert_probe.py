"""How long one layer's experts take in this engine: its runtime over a file of made-up experts, no model around it.

Products measured by themselves say too little: an expert that arrives is computed by itself, while reader threads
want the same cores, and resident ones together. Here the runtime does both, as in a chat.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import DEFAULT_POLICY, POLICIES
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.slots import SlotPool
from moei_core.engine.statistics import RuntimeStatistics
from moei_core.engine.threads import compute_threads, physical_cores
from moei_core.errors import ExpertReadError, MoeiError
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.bandwidth import FILLER
from moei_core.hardware.probe.disk import nameless_file
from moei_core.hardware.profile import ExpertSpeed
from moei_core.quant import native
from moei_core.quant.formats import FORMATS
from moei_core.quant.layouts import PLAIN, can_interleave
from moei_core.scheduler import ExpertScheduler
from moei_core.store.base import PAGE, Extent, StoredTensor, align_up, lay_out
from moei_core.store.file_store import FileStore
from moei_core.store.packing import USUAL_LAYOUT
from moei_core.types import ExpertKey, ModelSpec, Phase


@dataclass(frozen=True, slots=True)
class Geometry:
    """Width of the model and of an expert, and how many experts a token uses."""

    hidden: int
    ffn: int
    top_k: int


@dataclass(frozen=True, slots=True)
class ProbeEffort:
    """seconds: of each setting, at least, while there is time. nbytes: of the file. tokens: of an expert in a prompt.

    geometries: the cheaper first. Larger experts than the last take as long a byte.
    """

    seconds: float = 0.05
    nbytes: int = 3 << 27
    geometries: tuple[Geometry, ...] = (Geometry(2048, 768, 8), Geometry(4096, 7168, 2))
    formats: tuple[str, ...] = ("BF16", "Q8_0", "Q4_0", "MXFP4")
    tokens: tuple[int, ...] = (8, 64)


_MOST_EXPERTS = 256
_DENSE_NBYTES = 64 << 20
_RESIDENT_NBYTES = 256 << 20
"""Of experts that are resident: more than the processor's caches hold, but a token's at least."""
_IN_A_PROMPT, _PROMPT_NBYTES = 32, 128 << 20
"""Experts of one access that stands for a prompt: at most so many, and with so many bytes, but a token's."""
_WRITTEN_AT_ONCE = 32 << 20
_LONG_S = 0.2
"""Seconds of an access from which two samples are enough, else three."""


class _Experts:
    """What the runtime asks of transformers' experts module: a SwiGLU of so many experts."""

    has_gate, is_transposed, has_post_expert_norm = True, False, False

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def _apply_gate(self, given: torch.Tensor) -> torch.Tensor:
        gate, up = given.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class _Store(FileStore):
    """Experts of one shape in one file, hashed like those of a model."""

    def __init__(self, file: Path, geometry: Geometry, form: str, count: int) -> None:
        nbytes = align_up(expert_nbytes(geometry, form))
        super().__init__(
            {ExpertKey(0, i): lay_out(_tensors(file, geometry, form, i * nbytes)) for i in range(count)}
        )
        self._checksums: dict[ExpertKey, str] = {}

    def _check(self, key: ExpertKey, found: str) -> None:
        if self._checksums.setdefault(key, found) != found:
            raise ExpertReadError(
                "The disk gave other bytes at the second reading.", hint="Check the disk and the memory."
            )


class _Filled(_Store):
    """The same experts, but nothing is read: how resident ones came to be where they are is not measured."""

    def read_extent(self, key: ExpertKey, extent: Extent, slot: memoryview) -> None:
        slot[extent.slot_offset : extent.slot_offset + extent.nbytes] = bytes([FILLER]) * extent.nbytes


def expert_nbytes(geometry: Geometry, form: str) -> int:
    """Bytes of an expert's three matrices."""
    return 3 * FORMATS[form].nbytes((geometry.ffn, geometry.hidden))


def _tensors(file: Path, geometry: Geometry, form: str, offset: int) -> Iterator[StoredTensor]:
    up, down = (geometry.ffn, geometry.hidden), (geometry.hidden, geometry.ffn)
    for param, index, shape in (("gate_up_proj", 0, up), ("gate_up_proj", 1, up), ("down_proj", 0, down)):
        nbytes = FORMATS[form].nbytes(shape)
        layout = USUAL_LAYOUT if can_interleave(form, shape) else PLAIN
        yield StoredTensor(param, index, file, offset, nbytes, form, shape, layout=layout)
        offset += nbytes


def measure_experts(
    folder: Path, effort: ProbeEffort | None = None, allowance: Allowance | None = None
) -> tuple[ExpertSpeed, ...]:
    """Seconds of an expert by format, size and tokens, resident and arriving from a file in ``folder``.

    The file has no name, so that it is gone whatever ends this process. Nothing where no such file can be made.
    allowance: None for as long as all settings take. What it is too short for is left out, or, of experts that
    arrive from a slow disk, taken to be as for resident ones: few reads beside them disturb the computing little.
    """
    effort, allowance = effort or ProbeEffort(), allowance or Allowance(math.inf)
    threads = torch.get_num_threads()
    if native.available():
        native.set_num_threads(physical_cores())
    try:
        descriptor = nameless_file(folder)
    except OSError:
        return ()
    try:
        filled = _fill(descriptor, effort.nbytes, allowance.part(0.25))
        # The stores open files by name; this is the name of one that has none.
        file = Path(f"/proc/self/fd/{descriptor}")
        cells = [(geometry, form) for geometry in effort.geometries for form in effort.formats]
        found: list[ExpertSpeed] = []
        rate = math.inf
        for number, (geometry, form) in enumerate(cells):
            if found and allowance.over:
                break
            share = allowance.part(1 / (len(cells) - number))
            speeds, rate = _measure(file, filled, geometry, form, effort, allowance, share, rate)
            found += speeds
        return tuple(found)
    except (OSError, MoeiError):
        return ()
    finally:
        torch.set_num_threads(threads)
        os.close(descriptor)


def _fill(descriptor: int, nbytes: int, allowance: Allowance) -> int:
    """Write ``nbytes``, or fewer if the time is over. Returns how many."""
    # As a weight or a scale of any format an ordinary number, never a slow denormal.
    block = bytes([FILLER]) * (4 << 20)
    at = 0
    while at < nbytes and not (at and allowance.over):
        at += os.pwrite(descriptor, block[: nbytes - at], at)
        if at % _WRITTEN_AT_ONCE == 0:
            os.fdatasync(descriptor)  # else the page cache takes it all, and the time is spent later
    os.fsync(descriptor)
    return at


def _measure(
    file: Path,
    nbytes: int,
    geometry: Geometry,
    form: str,
    effort: ProbeEffort,
    whole: Allowance,
    allowance: Allowance,
    rate: float,
) -> tuple[list[ExpertSpeed], float]:
    """(all settings of one size and format, none if too few such experts fit; bytes a second that came from disk).

    nbytes: of the file. whole: allowance of this and all later ones. rate: what came from disk before.
    """
    count = min(_MOST_EXPERTS, nbytes // align_up(expert_nbytes(geometry, form) + PAGE))
    if count < geometry.top_k:
        return [], rate
    found: dict[bool, list[tuple[float, float] | None]] = {}
    rows = (1, *effort.tokens)
    for resident in (True, False):
        half = allowance.part(0.4 if resident else 1.0)
        if not resident and geometry.top_k * expert_nbytes(geometry, form) / rate > whole.left / 2:
            found[resident] = [None for _ in rows]
            continue
        layer = _Layer(file, geometry, form, count, resident, allowance.clock)
        try:
            found[resident] = [
                None
                if whole.over
                else layer.expert_seconds(tokens, effort.seconds, half.part(1 / (len(rows) - number)))
                for number, tokens in enumerate(rows)
            ]
        finally:
            layer.close()
        rate = rate if resident else layer.rate
    speeds = []
    for tokens, there, came in zip(rows, found[True], found[False], strict=True):
        if there is not None:
            (here, less), (arriving, more) = there, came or there
            speeds.append(
                ExpertSpeed(
                    form.lower(),
                    expert_nbytes(geometry, form),
                    tokens,
                    here,
                    arriving,
                    max(0.0, more - less),
                )
            )
    return speeds, rate


class _Layer:
    """One layer of experts behind the runtime, all of them resident or none."""

    def __init__(
        self,
        file: Path,
        geometry: Geometry,
        form: str,
        count: int,
        resident: bool,
        clock: Callable[[], float],
    ) -> None:
        nbytes = expert_nbytes(geometry, form)
        if resident:
            count = min(count, max(geometry.top_k, _RESIDENT_NBYTES // nbytes))
        self._geometry, self._count, self._nbytes, self._clock = geometry, count, nbytes, clock
        most = min(_IN_A_PROMPT, count, max(geometry.top_k, _PROMPT_NBYTES // nbytes))
        self._in_a_prompt = most - most % geometry.top_k
        self._module = _Experts(count)
        store = (_Filled if resident else _Store)(file, geometry, form, count)
        slot = max(store.layout(key).slot_nbytes for key in store.experts())
        capacity = count if resident else 0
        policy = POLICIES[DEFAULT_POLICY](capacity, {0: count})
        scheduler = ExpertScheduler(ExpertCache(capacity, policy), geometry.top_k)
        # All that is computed and gone again never needs more slots than one access has experts.
        slots = count if resident else self._in_a_prompt
        pool = SlotPool(slots + geometry.top_k, slot)
        spec = ModelSpec("probe", {0: count}, geometry.top_k, geometry.hidden, {0: nbytes})
        self._runtime = ExpertRuntime(store, pool, scheduler, threads=compute_threads(spec))
        self._pool = None if resident else pool
        self._dense = torch.ones(_DENSE_NBYTES // 4)
        self._random = torch.Generator().manual_seed(0)
        started = clock()
        self._access(list(range(slots)), 1, Phase.PREFILL)  # brings what stays, and pays for first touches
        self.rate = slots * nbytes / max(clock() - started, 1e-9)
        """Bytes a second at which they came, computed as well."""

    def expert_seconds(self, tokens: int, seconds: float, allowance: Allowance) -> tuple[float, float]:
        """Of one expert with so many tokens: (computing it, all else that the layer does but waiting for it)."""
        phase = Phase.DECODE if tokens == 1 else Phase.PREFILL
        chosen = self._geometry.top_k if tokens == 1 else self._in_a_prompt
        samples: list[tuple[float, float]] = []
        clock = self._clock
        started = clock()
        first = self._access(self._choose(chosen), tokens, phase)  # the first of a kind pays for set-up
        ready = clock()
        least = 2 if ready - started > _LONG_S else 3
        while len(samples) < least or clock() < ready + seconds:
            # The next one takes as long as the first.
            if allowance.left < ready - started:
                break
            samples.append(self._of_one(self._access(self._choose(chosen), tokens, phase), chosen))
        computing, beside = zip(*(samples or [self._of_one(first, chosen)]), strict=True)
        return statistics.median(computing), statistics.median(beside)

    @staticmethod
    def _of_one(spent: RuntimeStatistics, chosen: int) -> tuple[float, float]:
        beside = spent.decide_s + spent.move_s + spent.combine_s
        return spent.expert_compute_s / chosen, beside / chosen

    def _choose(self, count: int) -> list[int]:
        return sorted(torch.randperm(self._count, generator=self._random)[:count].tolist())

    def _access(self, experts: Sequence[int], tokens: int, phase: Phase) -> RuntimeStatistics:
        """One layer in which each of ``experts`` has ``tokens`` tokens."""
        top_k = self._geometry.top_k
        # Each token takes its neighbours' experts, so that all have the same number.
        groups = torch.tensor(list(experts) + list(experts[: -len(experts) % top_k])).view(-1, top_k)
        index = groups.repeat_interleave(tokens, dim=0)
        hidden = torch.full((len(index), self._geometry.hidden), 0.01, dtype=torch.bfloat16)
        self._runtime.forward_pass(phase, len(index))
        if phase is Phase.PREFILL and self._pool is not None:
            # The first prompt's experts go to slots that were never used, and whoever clears their pages takes time
            # from whoever computes.
            self._pool.resize(self._pool.count)
        # A layer's dense part: it leaves nothing of the experts in the caches, and the other threads go to sleep.
        self._dense.sum()
        before = self._runtime.snapshot()
        with torch.inference_mode():
            self._runtime.run_layer(
                self._module, 0, hidden, index, torch.full(index.shape, 1 / top_k, dtype=torch.bfloat16)
            )
        spent = self._runtime.statistics.minus(before)
        self._runtime.end_pass()
        return spent

    def close(self) -> None:
        self._runtime.close()
