"""``HardwareProfile``: what was measured on this machine, kept with a fingerprint of the machine.

Stored under the state directory. A profile of another machine (other processor, memory, disks or GPUs)
or of an older format is not used; where the home cannot be written, the profile is kept until the machine restarts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import statistics
import tempfile
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from moei_core.hardware.disks import DiskFacts
from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.system import CpuFacts, MemoryFacts
from moei_core.paths import state_dir

FORMAT_VERSION = 4


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value with its spread: the median, and the 10th and 90th percentile."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figure:
        """The figure of one or more samples."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])

    @property
    def spread(self) -> float:
        """Half of the range as a share of the value."""
        return (self.high - self.low) / (2 * self.value) if self.value else 0.0


@dataclass(frozen=True, slots=True)
class ReadSpeed:
    """Reading blocks of ``nbytes``, ``depth`` at a time. bandwidth: bytes a second; latency: of one, in seconds."""

    nbytes: int
    depth: int
    bandwidth: Figure
    latency: Figure


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """A disk and its reads. direct: with O_DIRECT. source: what was read. note: why something is missing.

    reads: whole blocks. experts: blocks as the engine reads experts of that size, in chunks that ``depth`` readers
    take in turn, and hashed; fresh: one size of them read into memory that was never used. Their samples are spread
    over the whole measurement. sustained: the best setting kept up for seconds, bytes a second; None if it was not
    reached.
    """

    facts: DiskFacts
    direct: bool
    source: str
    reads: tuple[ReadSpeed, ...]
    experts: tuple[ReadSpeed, ...]
    sustained: Figure | None
    note: str = ""
    fresh: ReadSpeed | None = None

    def at_another_moment(self, now: ReadSpeed, fresh: ReadSpeed | None) -> DiskProfile:
        """This disk as it is when experts of one size are read as in ``now``: others as much faster or slower.

        The range is as wide as it was, or as what was seen now. Only for a disk that was measured.
        """
        factor = now.bandwidth.value / self.expert_bandwidth(now.nbytes).value
        seen = now.bandwidth

        def moved(read: ReadSpeed) -> ReadSpeed:
            then = read.bandwidth
            value = factor * then.value
            low = value * min(then.low / then.value, seen.low / seen.value)
            high = value * max(then.high / then.value, seen.high / seen.value)
            latency = Figure(
                *(one / factor for one in (read.latency.value, read.latency.low, read.latency.high))
            )
            return replace(read, bandwidth=Figure(value, low, high), latency=latency)

        return replace(self, experts=tuple(moved(read) for read in self.experts), fresh=fresh)

    def expert_bandwidth(self, nbytes: int) -> Figure:
        """Bytes a second at which experts of ``nbytes`` are read: between the measured sizes, level beyond them.

        Only for a disk that was measured.
        """
        known = sorted(self.experts, key=lambda read: read.nbytes)
        above = next((read for read in known if read.nbytes >= nbytes), known[-1])
        below = next((read for read in reversed(known) if read.nbytes <= nbytes), known[0])
        if above.nbytes <= below.nbytes:
            return above.bandwidth
        share = math.log(nbytes / below.nbytes) / math.log(above.nbytes / below.nbytes)
        low, high = below.bandwidth, above.bandwidth
        return Figure(
            *(
                getattr(low, name) + share * (getattr(high, name) - getattr(low, name))
                for name in ("value", "low", "high")
            )
        )


@dataclass(frozen=True, slots=True)
class CopySpeed:
    """Copies of ``nbytes`` to the GPU, bytes a second."""

    nbytes: int
    pinned: Figure
    pageable: Figure


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """A GPU and its speeds. bandwidth: of its own memory. launch, read_back: seconds of one empty kernel, and of
    bringing one number to the CPU."""

    facts: GpuFacts
    copies: tuple[CopySpeed, ...] = ()
    bandwidth: Figure | None = None
    launch: Figure | None = None
    read_back: Figure | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """``rows`` inputs times one matrix of ``nbytes`` in ``format``, which is not in any cache.

    seconds: of one product. kernel: whose code it is.
    """

    format: str
    kernel: str
    nbytes: int
    rows: int
    threads: int
    seconds: Figure


@dataclass(frozen=True, slots=True)
class ExpertSpeed:
    """One expert of ``nbytes`` in ``format`` with ``tokens`` tokens, as the engine computes it.

    resident: seconds of one among others that are resident. arriving: of one that others are read beside, in a prompt
    (several tokens) into memory that was never used. handling: what one that arrives costs the engine more than a
    resident one beside reading and computing it.
    """

    format: str
    nbytes: int
    tokens: int
    resident: float
    arriving: float
    handling: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Seconds of what Python, torch and the engine do around a layer of one token, experts' products left out.

    nbytes: of weights that went through the processor's caches in the meantime and pushed out what that work needs.
    native: with attention as one native call; torch: with the attention of transformers.
    """

    nbytes: int
    native: float
    torch: float


@dataclass(frozen=True, slots=True)
class FrameworkCost:
    """What a token costs beside reading weights, measured on a model whose weights are next to nothing.

    Seconds. layers, token: of one decode step, by layer (least bytes first) and once. expert: calling one expert in it.
    prefill_*: the same of a prefill pass. sampling: of one token, by vocabulary entry. first_pass: what the first
    pass of a process takes longer than later ones. process_nbytes: memory of the process without any weights.
    """

    layers: tuple[LayerCost, ...]
    token: float
    expert: float
    prefill_layer: float
    prefill_expert: float
    sampling: float
    first_pass: float
    process_nbytes: int
    source: str

    def layer(self, nbytes: float, *, native: bool = True) -> float:
        """Seconds around a layer of one token with ``nbytes`` of weights: between those measured, level beyond."""
        known = [(one.nbytes, one.native if native else one.torch) for one in self.layers]
        if nbytes <= known[0][0]:
            return known[0][1]
        for (less, low), (more, high) in pairwise(known):
            if nbytes <= more:
                return low + (high - low) * (nbytes - less) / (more - less)
        return known[-1][1]


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One machine. memory_bandwidth: bytes a second by number of reading threads. seconds: of measuring."""

    fingerprint: str
    measured_at: str
    seconds: float
    memory: MemoryFacts
    cpu: CpuFacts
    memory_bandwidth: dict[str, Figure]
    disks: tuple[DiskProfile, ...]
    gpus: tuple[GpuProfile, ...]
    kernels: tuple[KernelSpeed, ...]
    experts: tuple[ExpertSpeed, ...]
    framework: FrameworkCost | None
    notes: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def best_memory_bandwidth(self) -> Figure:
        """With the best number of threads. Every profile has at least one."""
        return max(self.memory_bandwidth.values(), key=lambda figure: figure.value)

    def disk_of(self, folder: Path | None) -> DiskProfile | None:
        """The measured disk that holds ``folder``; without one, or for a folder elsewhere, the first measured."""
        usable = [disk for disk in self.disks if disk.experts]
        if folder is not None:
            from moei_core.hardware.disks import read_disk

            number = read_disk(folder).number
            here = [disk for disk in usable if disk.facts.number == number]
            if here:
                return here[0]
        return next((disk for disk in usable if not disk.facts.in_memory), None) or next(iter(usable), None)

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def fingerprint(
    memory: MemoryFacts, cpu: CpuFacts, disks: Sequence[DiskFacts], gpus: Sequence[GpuFacts]
) -> str:
    """What makes a machine another one. Not what changes by the minute, such as free memory.

    Nor a control group's memory limit: it changes what fits, which is read anew each time, and no speed.
    """
    parts: list[Any] = [
        FORMAT_VERSION,
        cpu.model,
        cpu.cores,
        cpu.quota,
        cpu.features,
        # The kernel keeps a little more or less for itself at each boot.
        round(memory.total / (256 << 20)),
        sorted({(disk.number, disk.file_system, disk.model) for disk in disks}),
        sorted((gpu.name, gpu.uuid, gpu.total, gpu.mig) for gpu in gpus),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def profile_path() -> Path:
    """Where the profile of this machine is kept."""
    return state_dir() / "hardware.json"


def _passing_path() -> Path:
    """Where it is kept until the machine restarts, if the state directory cannot be written."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir(), f"moei-{os.getuid()}")
    return folder / f"moei-{profile_path().name}"


def save_profile(profile: HardwareProfile) -> str:
    """Keep ``profile``. Returns why it is not kept for good, else an empty string."""
    problem = _write(profile_path(), profile)
    if not problem:
        return ""
    passing = _passing_path()
    if _write(passing, profile, 0o700):
        return f"The profile is not kept: {problem}."
    return f"The profile is kept until the machine restarts ({passing}): {problem}."


def _write(path: Path, profile: HardwareProfile, mode: int = 0o777) -> str:
    """Why that failed, or an empty string. mode: of a folder that has to be made."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(mode, parents=True, exist_ok=True)
        if mode == 0o700 and not _is_ours(path.parent):
            return f"{path.parent} is somebody else's"
        unfinished.write_text(json.dumps(profile.report(), indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        return f"{path.parent} cannot be written ({error.strerror})"
    return ""


def _is_ours(folder: Path) -> bool:
    """Whether nobody else could have put a file or a link there."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def load_profile() -> HardwareProfile | None:
    """The stored profile, whatever machine it is of; None if there is none or it cannot be understood."""
    for path in (profile_path(), _passing_path()):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if path != profile_path() and not _is_ours(path.parent):
                continue
            content = json.loads(path.read_text())
            if content["format_version"] == FORMAT_VERSION:
                decoded: HardwareProfile = _decode(HardwareProfile, content)
                if decoded.memory_bandwidth:
                    return decoded
    return None


def _decode(kind: Any, value: Any) -> Any:
    """``value`` as JSON gave it, as an instance of the type ``kind``. Raises: what a wrong shape raises."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _decode(next(one for one in arguments if one is not type(None)), value)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [one.name for one in fields(kind)]
        return typing.cast(Any, kind)(**{name: _decode(hints[name], value[name]) for name in names})
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], one) for one in value)
        return tuple(_decode(one, part) for one, part in zip(arguments, value, strict=True))
    if origin is dict:
        return {str(name): _decode(arguments[1], one) for name, one in value.items()}
    if kind is float:
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value
