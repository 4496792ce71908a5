"""The one place that decides how many expert slots there are. Every number carries its reason."""

from __future__ import annotations

from dataclasses import dataclass

from moei_core.config import ExpertBudget, format_size
from moei_core.errors import DoesNotFitError
from moei_core.types import ModelSpec

_SAFETY = 0.9
"""Share of the free memory that is used when nobody gave a limit."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What the process needs beside expert slots, in bytes.

    process: what it holds now, dense weights included. kv: keys and values for the whole context.
    workspace: the largest temporary memory of a forward pass.
    """

    process: int
    kv: int
    workspace: int

    @property
    def margin(self) -> int:
        """For what cannot be foreseen: allocator, threads' stacks, kernel memory, libraries' caches."""
        return (24 << 20) + (self.process + self.kv + self.workspace) // 50

    @property
    def total(self) -> int:
        return self.process + self.kv + self.workspace + self.margin


@dataclass(frozen=True, slots=True)
class SlotBudget:
    """How many experts are held at once, and why so many.

    working: slots for misses in passing. spare: slots that prefetches arrive in. resident: slots for experts
    that stay; with a slot for every expert all of them stay, and none needs to pass.
    """

    slots: int
    working: int
    resident: int
    slot_nbytes: int
    reason: str
    spare: int = 0

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_nbytes


def plan_slots(
    spec: ModelSpec,
    slot_nbytes: int,
    use: MemoryUse,
    available: int,
    ram: int | None = None,
    experts: ExpertBudget | None = None,
    spare: int = 0,
) -> SlotBudget:
    """How many slots of ``slot_nbytes`` to have, ``spare`` of them (if there are so many) for prefetching.

    ram: bound on the whole process. experts: bound on the slots alone. With both, the smaller counts; with
    neither, what ``available`` memory allows. Raises: DoesNotFitError, naming the smallest that works.
    """
    working = spec.num_experts_per_tok
    total = spec.total_experts
    bounds: list[tuple[int, str]] = [(total, f"all {total} routed experts fit")]
    if experts is not None:
        slots = experts.slots(total, slot_nbytes)
        asked = (
            f"{experts.fraction:.0%}" if experts.fraction is not None else format_size(experts.nbytes or 0)
        )
        if slots < working:
            smallest = f"{working / total * 100 + 0.05:.1f}%"
            raise DoesNotFitError(
                f"--experts {asked} is too small: it pays for {slots} of {total} experts.",
                f"One token uses {working} experts of a layer at once, "
                f"{format_size(slot_nbytes)} each, so that many slots are the least.",
                f"The smallest that works is --experts {smallest} ({_up(working * slot_nbytes)}).",
            )
        bounds.append((slots, f"--experts {asked} of {total} routed experts"))
    if ram is not None:
        slots = (ram - use.total) // slot_nbytes
        if slots < working:
            raise too_small(ram, use, working * slot_nbytes)
        bounds.append((slots, f"--ram {format_size(ram)} - {_explain(use)}"))
    elif experts is None:
        free = int(available * _SAFETY) - use.kv - use.workspace
        if free // slot_nbytes < working:
            raise DoesNotFitError(
                f"There is not enough free memory: {format_size(available)} are available.",
                f"Beside what is loaded, {_up(use.kv + use.workspace + working * slot_nbytes)} are needed.",
                "Close other programs, or ask for a shorter context with --context.",
            )
        bounds.append((free // slot_nbytes, f"{_SAFETY:.0%} of {format_size(available)} free memory"))
    slots, reason = min(bounds, key=lambda bound: bound[0])
    spare = 0 if slots == total else min(spare, slots - working)
    resident = total if slots == total else slots - working - spare
    return SlotBudget(int(slots), working, int(resident), slot_nbytes, reason, int(spare))


def too_small(ram: int, use: MemoryUse, working_nbytes: int) -> DoesNotFitError:
    """The refusal of a ``--ram`` that cannot hold even the working set."""
    return DoesNotFitError(
        f"--ram {format_size(ram)} is too small for this model.",
        f"It needs {_explain(use)}, and {format_size(working_nbytes)} for the experts of one token.",
        f"The smallest that works is --ram {_up(use.total + working_nbytes)}.",
    )


def _explain(use: MemoryUse) -> str:
    parts = (("process and dense weights", use.process), ("context", use.kv), ("workspace", use.workspace))
    return ", ".join(f"{format_size(nbytes)} {name}" for name, nbytes in (*parts, ("margin", use.margin)))


def _up(nbytes: int) -> str:
    """A size that can be typed back and is no smaller than ``nbytes``, with 2% to spare."""
    return f"{-(-nbytes * 102 // 100 >> 20) + 1}MiB"
