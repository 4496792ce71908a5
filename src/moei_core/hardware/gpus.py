"""What NVML says about the GPUs. Facts only; speeds are measured in ``probe.gpu``.

NVML may be missing, of another version than the driver, or unable to answer single questions (MIG slices,
containers, unified memory): each question is asked for itself, and what has no answer is None.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU, or one MIG slice of it. Memory in bytes; used_by_others: by other processes, if that is told.

    capability: (major, minor) of CUDA. pcie_generation and pcie_width are the link's largest; a sleeping GPU
    runs a slower one.
    """

    index: int
    name: str
    uuid: str
    total: int | None
    free: int | None
    used_by_others: int | None
    capability: tuple[int, int] | None
    pcie_generation: int | None
    pcie_width: int | None
    mig: bool


def load_nvml() -> Any:
    """The NVML bindings, or None where they are not installed."""
    with suppress(Exception):
        # A broken installation may raise anything while it is imported.
        return importlib.import_module("pynvml")
    return None


def read_gpus(nvml: Any, own_pid: int) -> tuple[list[GpuFacts], list[str]]:
    """(the GPUs, sentences about what could not be asked). nvml: of ``load_nvml``."""
    if nvml is None:
        return [], ["NVML is not installed, so GPUs were not looked for."]
    try:
        nvml.nvmlInit()
    except Exception as error:
        name = type(error).__name__
        if "LibraryNotFound" in name or "DriverNotLoaded" in name:
            return [], []  # the usual machine without a GPU
        return [], [f"NVML does not start: {_text(error)}."]
    try:
        return _read_all(nvml, own_pid)
    finally:
        with suppress(Exception):
            nvml.nvmlShutdown()


def visible_gpus(gpus: list[GpuFacts], setting: str | None) -> list[GpuFacts]:
    """Those of ``gpus`` that CUDA shows to a process, in its numbering. setting: of CUDA_VISIBLE_DEVICES, None: unset.

    As the driver reads it: numbers, or beginnings of UUIDs; the first that names nothing ends the list, and one that
    is named twice empties it. Numbers are NVML's, as with CUDA_DEVICE_ORDER=PCI_BUS_ID; otherwise CUDA counts the
    fastest first, which differs only between unlike GPUs.
    """
    if setting is None:
        return list(gpus)
    found: list[GpuFacts] = []
    for name in (part.strip() for part in setting.split(",")):
        if name.isdigit():
            named = gpus[int(name) : int(name) + 1]
        else:
            named = [gpu for gpu in gpus if name and gpu.uuid.startswith(name)]
        if len(named) != 1:
            break
        if named[0] in found:
            return []
        found.append(named[0])
    return found


def _text(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _read_all(nvml: Any, own_pid: int) -> tuple[list[GpuFacts], list[str]]:
    found: list[GpuFacts] = []
    notes: list[str] = []
    count = _ask(nvml, "nvmlDeviceGetCount")
    if count is None:
        return [], ["NVML does not tell how many GPUs there are."]
    for index in range(int(count)):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception as error:
            notes.append(f"GPU {index} does not answer: {_text(error)}.")
            continue
        mode = _ask(nvml, "nvmlDeviceGetMigMode", handle)
        if mode and mode[0]:
            slices = _mig_slices(nvml, handle)
            found += [_read_one(nvml, index, part, handle, own_pid, mig=True) for part in slices]
            if not slices:
                notes.append(f"GPU {index} is in MIG mode and shows no slice to this process.")
        else:
            found.append(_read_one(nvml, index, handle, handle, own_pid, mig=False))
    return found, notes


def _mig_slices(nvml: Any, handle: Any) -> list[Any]:
    slices = []
    for number in range(int(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0)):
        part = _ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
        if part is not None:
            slices.append(part)
    return slices


def _read_one(nvml: Any, index: int, handle: Any, board: Any, own_pid: int, *, mig: bool) -> GpuFacts:
    """board: the whole GPU, which alone knows about its link."""
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    processes = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle)
    others = None
    if processes is not None:
        shares = [process.usedGpuMemory for process in processes if process.pid != own_pid]
        # In a container, NVML lists processes without their memory.
        others = sum(shares) if all(isinstance(share, int) for share in shares) else None
    capability = _ask(nvml, "nvmlDeviceGetCudaComputeCapability", board)
    return GpuFacts(
        index,
        _decoded(_ask(nvml, "nvmlDeviceGetName", handle)) or "GPU",
        _decoded(_ask(nvml, "nvmlDeviceGetUUID", handle)),
        None if memory is None else int(memory.total),
        None if memory is None else int(memory.free),
        others,
        None if capability is None else (int(capability[0]), int(capability[1])),
        _ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", board),
        _ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", board),
        mig,
    )


def _ask(nvml: Any, question: str, *arguments: Any) -> Any:
    """The answer, or None: drivers refuse single questions with errors of many kinds, old bindings lack some."""
    with suppress(Exception):
        return getattr(nvml, question)(*arguments)
    return None


def _decoded(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name or "")
