"""What a GPU brings: copies against the link's own bandwidth, decoding at several sizes of GPU memory, and a rival.

    python benchmarks/gpu.py [MODEL] [--ram 24GiB] [--new-tokens 64] [--out FOLDER] [--stand-in]

MODEL is a name or a folder, moei-demo if left out. Parts:
- copies: experts from the engine's own slots, queued as the engine queues them, beside copies of the same size from
  memory that torch has pinned. Medians of seven rounds; the engine should reach 90% of torch.
- kernels: bytes a second of the fused products of single tokens, beside reading GPU memory at the same size.
- decode: tokens a second with GPU memory for 25%, 50% and 100% of the experts, by cost and with copies only, and by
  cost with prefetches to the GPU (markov, always on).
- accelerate, if it is installed: the same model, prompt and GPU memory through ``device_map="auto"``.
- --out: first all tests that need a GPU (``tests.txt``, four minutes at most); then, beside the figures
  (``gpu.json``, written after each part, so that a broken run keeps what it has) and their picture (``gpu.png``, with
  matplotlib), a profiler trace of eight tokens at 50% (``trace.json.gz``, for chrome://tracing): copies must overlap
  kernels, and there must be one wait for each layer. No further decoding begins after eight minutes.

--stand-in runs everything on two threads instead of a GPU: a test of this file, whose figures mean nothing. The last
line of the output is JSON.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
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
from moei_core.prefetch import PrefetchMode
from moei_core.quant.formats import FORMATS

SHARES = (0.25, 0.5, 1.0)
ROUNDS, COPIES, PROMPT = 7, 32, 64
LIMIT_S, TESTS_S = 480, 240
WAYS = {
    "auto": {"misses": "auto"},
    "copy": {"misses": "copy"},
    "ahead": {"predictor": "markov", "prefetch": PrefetchMode.ON},
}


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


def kernel_speed(device: Device) -> dict[str, float]:
    """Bytes of weights a second: eight experts' matrices for one token, by format; and reading as much memory."""
    if device.kernels is None or device.place.type != "cuda":
        return {}
    shape, experts, found = (1536, 2048), 8, {}
    inputs = torch.randn((1, shape[1]), device=device.place)
    rows = torch.zeros(experts, dtype=torch.int64, device=device.place)

    def seconds(work: Any) -> float:
        taken = []
        for _ in range(ROUNDS):
            work()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(16):
                work()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 16e3)
        return statistics.median(taken)

    for name in device.kernels.FORMATS:
        nbytes = FORMATS[name].nbytes(shape)
        memory = torch.zeros(experts * nbytes, dtype=torch.uint8, device=device.place)
        starts = torch.arange(experts, device=device.place) * nbytes
        layout = "plain" if FORMATS[name].is_float else "rows16"
        few = lambda: device.kernels.few_rows(name, layout, shape, memory, starts, inputs, rows)  # noqa: B023, E731
        found[name] = experts * nbytes / seconds(few)
    data = memory.view(torch.float32)
    found["read"] = memory.numel() / seconds(data.sum)
    return found


def run_tests(out: Path) -> dict[str, Any]:
    """All tests that need a GPU; what they say is in ``tests.txt``."""
    started = time.perf_counter()
    with (out / "tests.txt").open("w") as file:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=20"]
        try:
            code = subprocess.run(command, stdout=file, stderr=file, timeout=TESTS_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
    last = (out / "tests.txt").read_text().strip().splitlines()[-1:]
    return {"exit_code": code, "seconds": round(time.perf_counter() - started, 1), "summary": "".join(last)}


def draw(report: dict[str, Any], file: Path) -> None:
    """Tokens a second by share of experts on the GPU, one line a way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way in (*WAYS, "accelerate"):
        rows = [row for row in [*report["decode"], *report.get("accelerate", [])] if row["way"] == way]
        if rows:
            axes.plot([row["share"] for row in rows], [row["tokens_per_s"] for row in rows], "o-", label=way)
    axes.set(xlabel="experts on the GPU", ylabel="tokens a second", ylim=(0, None), title=report["gpu"])
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


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
            "notes": model.notes,
            "ahead": asdict(model.device_prefetch_statistics),
            "copies_late": model.runtime.statistics.copies_late,
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
    return {
        "way": "accelerate",
        "vram_bytes": vram,
        "tokens_per_s": (new_tokens - 1) / (seconds[1] - seconds[0]),
    }


def write_trace(options: LoadOptions, folder: Path, stand_in: bool, file: Path) -> None:
    with LoadedModel(folder, options, open_device(stand_in)) as model:
        measure_requests(model, PROMPT, 8, 1)
        with torch.profiler.profile() as profiler:
            measure_requests(model, PROMPT, 8, 1)
        profiler.export_chrome_trace(str(file))
    with gzip.open(f"{file}.gz", "wb") as packed:
        packed.write(file.read_bytes())
    file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="moei-demo")
    parser.add_argument("--ram", default=None)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--stand-in", action="store_true")
    given = parser.parse_args()
    if not given.stand_in and not torch.cuda.is_available():
        print("There is no CUDA device here, and these figures are about one.", file=sys.stderr)
        print("--stand-in runs the same code without one; its figures mean nothing.", file=sys.stderr)
        return 1
    ram = parse_size(given.ram, "--ram") if given.ram else None
    folder = resolve_model(given.model).folder
    gpu = "none (stand-in)" if given.stand_in else torch.cuda.get_device_name()
    started = time.perf_counter()
    report: dict[str, Any] = {"gpu": gpu, "model": given.model, "torch": torch.__version__, "decode": []}

    def save() -> None:
        # What a part has left behind would take the next one's GPU memory.
        gc.collect()
        report["seconds"] = round(time.perf_counter() - started, 1)
        if given.out is not None:
            (given.out / "gpu.json").write_text(json.dumps(report, indent=1))

    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        if not given.stand_in:
            report["tests"] = run_tests(given.out)
            print(f"tests: {report['tests']}")
            save()
    with LoadedModel(folder, LoadOptions(experts=ExpertBudget(fraction=1.0), device="cpu")) as model:
        slot = model.budget.slot_nbytes
    device = open_device(given.stand_in)
    report["copies"] = {"bytes": slot, **copy_bandwidth(device, slot)}
    report["kernels"] = kernel_speed(device)
    device.close()
    del device
    print(f"copies of {format_size(slot)}: {report['copies']}\nkernels: {report['kernels']}")
    save()
    if given.out is not None:
        vram = vram_for(folder, ram, 0.5, given.stand_in)
        save()
        write_trace(LoadOptions(ram=ram, vram=vram), folder, given.stand_in, given.out / "trace.json")
        save()
    for share in SHARES:
        vram = vram_for(folder, ram, share, given.stand_in)
        for way, settings in WAYS.items():
            save()
            if time.perf_counter() - started > LIMIT_S:
                print(f"{share:.0%}, {way}: not measured, the time is over")
                continue
            options = LoadOptions(ram=ram, vram=vram, **settings)
            one = decode(options, folder, given.stand_in, given.new_tokens)
            speed = one["changing"]["decode_tokens_per_s"]["median"]
            hits = one["changing"]["gpu_hit_rate"]["median"]
            report["decode"].append({"share": share, "way": way, "tokens_per_s": speed, **one})
            print(f"{share:.0%} of experts on the GPU, {way}: {speed:.2f} tokens/s, {hits:.1%} hits there")
        if importlib.util.find_spec("accelerate") and not given.stand_in:
            try:
                found = rival(folder, vram, given.new_tokens)
            except Exception as error:  # another program's failure is a figure too
                found = {"way": "accelerate", "tokens_per_s": 0.0, "failure": str(error)[:200]}
            report.setdefault("accelerate", []).append({"share": share, **found})
            print(f"{share:.0%} with accelerate: {found['tokens_per_s']:.2f} tokens/s")
    save()
    if given.out is not None and importlib.util.find_spec("matplotlib"):
        draw(report, given.out / "gpu.png")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoeiError as error:
        sys.exit(str(error))
