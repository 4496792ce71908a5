"""How many threads compute."""

from __future__ import annotations

import os

import psutil

from moei_core.types import ModelSpec

_WORTH_SHARING = 1 << 20
"""Bytes of an expert from which a product is worth more than one thread."""


def compute_threads(spec: ModelSpec) -> int:
    """How many threads torch computes with: a property of model and machine, never of a budget (other counts round
    otherwise).

    Products of small experts are over before a second thread has woken up. The native kernels decide that for each
    call, and give the same bits with any number of threads.
    """
    return physical_cores() if max(spec.expert_nbytes.values()) >= _WORTH_SHARING else 1


def physical_cores() -> int:
    """Cores that this process may use."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return cores
