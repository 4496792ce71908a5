"""What carrying plans out has cost, counted by the runtime."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class RuntimeStatistics:
    """What carrying plans out has cost. Times in seconds of the engine's thread.

    bytes_read: of experts, also what was read in vain. bytes_prefetched: of them by complete prefetches. stall_s:
    waiting for experts. move_s: asking for experts, giving slots out and taking them back. combine_s: gathering rows
    and summing outputs. layers_s: all that the expert layers took; what is left of it is unexplained. copies,
    bytes_copied: of experts to a device, those for the next time (promotions) and those that no router had asked for
    (copies_ahead) included; copies_late: of the latter, those that were chosen before they were there. device_wait_s:
    until a device had computed what the router of a layer chose, and with it everything before.
    """

    loads: int = 0
    prefetches: int = 0
    bytes_read: int = 0
    bytes_prefetched: int = 0
    stall_s: float = 0.0
    expert_compute_s: float = 0.0
    decide_s: float = 0.0
    move_s: float = 0.0
    combine_s: float = 0.0
    layers_s: float = 0.0
    copies: int = 0
    promotions: int = 0
    copies_ahead: int = 0
    copies_late: int = 0
    bytes_copied: int = 0
    device_wait_s: float = 0.0

    def minus(self, earlier: RuntimeStatistics) -> RuntimeStatistics:
        """What happened since ``earlier`` was copied."""
        return RuntimeStatistics(
            *(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self))
        )
