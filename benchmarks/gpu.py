"""What a GPU brings: copies against the link's own bandwidth, decoding at several sizes of GPU memory, and a rival.

    python benchmarks/gpu.py [MODEL] [--ram 24GiB] [--new-tokens 64] [--trace trace.json] [--stand-in]

MODEL is a name or a folder, moei-demo if left out. Parts:
- copies: experts from the engine's own slots, queued as the engine queues them, beside copies of the same size from
  memory that torch has pinned. Medians of seven rounds; the engine should reach 90% of torch.
- decode: tokens a second with GPU memory for 25%, 50% and 100% of the experts, by cost and with copies only.
- accelerate, if it is installed: the same model, prompt and GPU memory through ``device_map="auto"``.
- --trace: a profiler trace of eight tokens at 50%, for chrome://tracing: copies must overlap kernels, and there must
  be one wait for each layer.

--stand-in runs everything on two threads instead of a GPU: a test of this file, whose figures mean nothing. The last
line of the output is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moei_core.config import ExpertBudget, format_size, parse_size
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.devices import CpuDevice, Device
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.measure import measure_requests, summarise
from moei_core.errors import MoeiError
from moei_core.hub.resolve import resolve_model

SHARES = (0.25, 0.5, 1.0)
ROUNDS, COPIES, PROMPT = 7, 32, 64


def open_device(stand_in: bool) -> Device:
    if stand_in:
        return CpuDevice(8 << 30)
    from moei_core.engine.cuda_device import CudaDevice

    return CudaDevice()


def copy_bandwidth(device: Device, nbytes: int) -> dict[str, float]:
    """Bytes a second of ``COPIES`` copies in a row: the engine's way, and from memory pinned by torch."""
    pool = LinkedSlotPool(COPIES, nbytes, device)
    slots = DeviceSlots(device, 0, COPIES, nbytes)
    held = [pool.take() for _ in range(COPIES)]
    for slot in held:
        pool.view(slot)[:] = b"\x3c" * nbytes
    targets = [slots.bytes_of(slots.take(stays=False), nbytes) for _ in held]
    rates = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for slot, target in zip(held, targets, strict=True):
            event = device.copy_in(pool.view(slot), target, None)
        event.wait()
        rates.append(COPIES * nbytes / (time.perf_counter() - started))
    pool.close()
    found = {"engine": statistics.median(rates)}
    if device.place.type == "cuda":
        pinned = torch.full((COPIES, nbytes), 0x3C, dtype=torch.uint8).pin_memory()
        rates = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for row, target in zip(pinned, targets, strict=True):
                target.copy_(row, non_blocking=True)
            torch.cuda.synchronize()
            rates.append(COPIES * nbytes / (time.perf_counter() - started))
        found["torch"] = statistics.median(rates)
        found["share"] = found["engine"] / found["torch"]
    return found


def vram_for(folder: Path, ram: int | None, share: float, stand_in: bool) -> int:
    """Bytes of GPU memory that hold ``share`` of all experts beside the dense model."""
    with LoadedModel(folder, LoadOptions(ram=ram), open_device(stand_in)) as model:
        budget = model.device_budget
        assert budget is not None, model.notes
        others = sum(line.nbytes for line in budget.lines[:-1])
        ring = budget.slots - budget.resident
        return others + (int(share * model.spec.total_experts) + ring) * budget.slot_nbytes


def decode(options: LoadOptions, folder: Path, stand_in: bool, new_tokens: int) -> dict[str, Any]:
    with LoadedModel(folder, options, open_device(stand_in)) as model:
        found = measure_requests(model, PROMPT, new_tokens, 3)
        assert model.device_budget is not None
        return {
            "vram_bytes": options.vram,
            "resident": model.device_budget.resident,
            "misses": options.misses,
            "changing": summarise(found["changing"]),
        }


def rival(folder: Path, vram: int, new_tokens: int) -> dict[str, Any]:
    """transformers with accelerate, which moves whole layers, greedy, the same prompt length."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={0: vram, "cpu": 1 << 40}, dtype="auto"
    )
    prompt = torch.randint(
        0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    prompt = prompt.to("cuda")
    seconds = []
    for count in (1, new_tokens):
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"vram_bytes": vram, "decode_tokens_per_s": (new_tokens - 1) / (seconds[1] - seconds[0])}


def write_trace(options: LoadOptions, folder: Path, stand_in: bool, file: str) -> None:
    with LoadedModel(folder, options, open_device(stand_in)) as model:
        measure_requests(model, PROMPT, 8, 1)
        with torch.profiler.profile() as profiler:
            measure_requests(model, PROMPT, 8, 1)
        profiler.export_chrome_trace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="moei-demo")
    parser.add_argument("--ram", default=None)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--trace", default=None)
    parser.add_argument("--stand-in", action="store_true")
    given = parser.parse_args()
    if not given.stand_in and not torch.cuda.is_available():
        print("There is no CUDA device here, and these figures are about one.", file=sys.stderr)
        print("--stand-in runs the same code without one; its figures mean nothing.", file=sys.stderr)
        return 1
    ram = parse_size(given.ram, "--ram") if given.ram else None
    folder = resolve_model(given.model).folder
    gpu = "none (stand-in)" if given.stand_in else torch.cuda.get_device_name()
    report: dict[str, Any] = {"gpu": gpu, "model": given.model, "torch": torch.__version__}
    with LoadedModel(folder, LoadOptions(experts=ExpertBudget(fraction=1.0), device="cpu")) as model:
        slot = model.budget.slot_nbytes
    device = open_device(given.stand_in)
    report["copies"] = {"bytes": slot, **copy_bandwidth(device, slot)}
    device.close()
    print(f"copies of {format_size(slot)}: {report['copies']}")
    report["decode"] = []
    for share in SHARES:
        vram = vram_for(folder, ram, share, given.stand_in)
        for misses in ("auto", "copy"):
            one = decode(
                LoadOptions(ram=ram, vram=vram, misses=misses), folder, given.stand_in, given.new_tokens
            )
            report["decode"].append({"share": share, **one})
            speed = one["changing"]["decode_tokens_per_s"]["median"]
            hits = one["changing"]["gpu_hit_rate"]["median"]
            print(f"{share:.0%} of experts on the GPU, {misses}: {speed:.2f} tokens/s, {hits:.1%} hits there")
        if importlib.util.find_spec("accelerate") and not given.stand_in:
            found = rival(folder, vram, given.new_tokens)
            report.setdefault("accelerate", []).append({"share": share, **found})
            print(f"{share:.0%} with accelerate: {found['decode_tokens_per_s']:.2f} tokens/s")
    if given.trace:
        vram = vram_for(folder, ram, 0.5, given.stand_in)
        write_trace(LoadOptions(ram=ram, vram=vram), folder, given.stand_in, given.trace)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoeiError as error:
        sys.exit(str(error))
