"""What a GPU brings: copies against the link's own bandwidth, decoding at several sizes of GPU memory, and a rival.

    python benchmarks/gpu.py [MODEL ...] [--ram 24GiB] [--new-tokens 32] [--limit 480] [--out FOLDER] [--no-tests]

A MODEL is a name, a folder, or NAME:LAYERS of one that can be made with random weights, such as mixtral-8x7b:4 (in
bfloat16, in --models, which should be as large and fast as memory); moei-demo if none is given. Parts:
- tests: with --out, all that need a GPU (``tests-*.txt``, --tests-limit seconds at most).
- kernels: bytes a second of the fused products of single tokens, beside reading GPU memory at the same size.
- copies, of each model's experts: from the engine's own slots, queued as the engine queues them, beside copies from
  memory that torch has pinned. Medians of seven rounds; the engine should reach 90% of torch.
- decode: tokens a second with GPU memory for all experts, half and a quarter of them: by cost, with copies only, with
  copies and what a token computes launched instead of recorded, by cost and with copies with prefetches to the GPU by
  the routers' hints, and with no expert staying there. *bound* is
  what perfect overlap would give: of all the time a token takes with everything in GPU memory, of its copies at the
  link's bandwidth and of its experts in RAM at RAM's, the longest.
- accelerate, if it is installed: the same model, prompt and GPU memory through ``device_map="auto"``.
- with --out, a profiler trace of three tokens at a half with copies only (``NAME.json.gz``, for chrome://tracing) and
  a picture of it (``NAME.png``, with matplotlib). Figures go to ``gpu.json`` after each step, so that a broken run
  keeps what it has. No step begins after --limit seconds.

--stand-in runs everything on two threads instead of a GPU: a test of this file, whose figures mean nothing. The last
line of the output is JSON.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moei_core.config import ExpertBudget, format_size, parse_size
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.devices import CpuDevice, Device
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.measure import measure_requests, summarise
from moei_core.engine.threads import physical_cores
from moei_core.errors import MoeiError
from moei_core.hardware.probe.allowance import Allowance
from moei_core.hardware.probe.bandwidth import make_buffer, read_bandwidth
from moei_core.hub.resolve import resolve_model
from moei_core.hub.synthetic import write_checkpoint
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS
from moei_core.prefetch import PrefetchMode
from moei_core.quant.formats import FORMATS

ROUNDS, COPIED, PROMPT, REPEATS, RIVAL_TOKENS = 7, 1 << 30, 64, 2, 4
WAYS: dict[str, dict[str, Any]] = {
    "by cost": {"misses": "auto"},
    "copies": {"misses": "copy"},
    "launched": {"misses": "copy"},
    "ahead": {"misses": "auto", "predictor": "router", "prefetch": PrefetchMode.ON},
    "copies ahead": {"misses": "copy", "predictor": "router", "prefetch": PrefetchMode.ON},
}
CASES = [
    *(
        (1.0, "copies"),
        (1.0, "launched"),
        (0.25, "launched"),
        (0.25, "copies"),
        (0.25, "by cost"),
        (0.5, "copies"),
        (0.5, "by cost"),
    ),
    *((0.0, "copies"), (0.25, "copies ahead"), (0.25, "ahead"), (0.5, "ahead")),
]
_PARTS = ("framework", "experts", "gpu", "link", "moving", "combining", "decisions", "disk", "sampling")
_FIRST = 8
"""Cases before the rival's."""


def open_device(stand_in: bool) -> Device:
    if stand_in:
        return CpuDevice(8 << 30)
    from moei_core.engine.cuda_device import CudaDevice

    return CudaDevice()


def copy_bandwidth(device: Device, nbytes: int) -> dict[str, float]:
    """Bytes a second of copies in a row, ``COPIED`` bytes or two: the engine's way, and from memory pinned by torch."""
    copies = min(max(2, COPIED // nbytes), 128)
    pool = LinkedSlotPool(copies, nbytes, device)
    slots = DeviceSlots(device, 0, copies, nbytes)
    held = [pool.take() for _ in range(copies)]
    for slot in held:
        pool.view(slot)[:] = b"\x3c" * nbytes
    targets = [slots.bytes_of(slots.take(stays=False), nbytes) for _ in held]
    rates = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for slot, target in zip(held, targets, strict=True):
            event = device.copy_in(pool.view(slot), target, None)
        event.wait()
        rates.append(copies * nbytes / (time.perf_counter() - started))
    pool.close()
    found = {"engine": statistics.median(rates)}
    if device.place.type == "cuda":
        pinned = torch.full((copies, nbytes), 0x3C, dtype=torch.uint8).pin_memory()
        rates = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for row, target in zip(pinned, targets, strict=True):
                target.copy_(row, non_blocking=True)
            torch.cuda.synchronize()
            rates.append(copies * nbytes / (time.perf_counter() - started))
        found["torch"] = statistics.median(rates)
        found["share"] = found["engine"] / found["torch"]
    return found


def kernel_speed(device: Device) -> dict[str, float]:
    """Bytes of weights a second: eight experts' matrices for one token, by format; and reading as much memory."""
    if device.kernels is None or device.place.type != "cuda":
        return {}
    kernels, shape, experts, found = device.kernels, (1536, 2048), 32, {}
    inputs = torch.randn((1, shape[1]), device=device.place)

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

    for name in kernels.FORMATS:
        nbytes = FORMATS[name].nbytes(shape)
        memory = torch.randint(0, 256, (experts * nbytes,), dtype=torch.uint8, device=device.place)
        pairs = torch.zeros((4, experts), dtype=torch.int64, device=device.place)
        pairs[3] = torch.arange(experts, device=device.place) * nbytes
        layout = "plain" if FORMATS[name].is_float else "rows16"
        few = lambda: kernels.few_rows(name, layout, shape, memory, pairs, 3, inputs, aligned=True)  # noqa: B023, E731
        found[name] = experts * nbytes / seconds(few)
        outputs = torch.empty(shape, dtype=torch.bfloat16, device=device.place)
        decode = lambda: kernels.decode(name, layout, shape, memory[:nbytes], outputs)  # noqa: B023, E731
        found[f"{name}, decoded"] = nbytes / seconds(decode)
    data = torch.zeros(experts * FORMATS["BF16"].nbytes(shape) // 4, device=device.place)
    found["read"] = 4 * data.numel() / seconds(data.sum)
    return found


def run_tests(out: Path, limit: float) -> dict[str, Any]:
    """All tests that need a GPU; what they say is in ``tests-*.txt``."""
    started = time.perf_counter()
    common = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
    alone = "tests/core/test_cuda_device.py"  # measures times and free memory
    found: dict[str, Any] = {}
    for name, more in (("alone", [alone]), ("others", ["-n", "8", "--ignore", alone])):
        left = max(1.0, limit - (time.perf_counter() - started))
        file = out / f"tests-{name}.txt"
        with file.open("w") as output:
            try:
                run = subprocess.run(
                    [*common, *more], stdout=output, stderr=output, timeout=left, check=False
                )
                code = run.returncode
            except subprocess.TimeoutExpired:
                code = -1
        last = file.read_text().strip().splitlines()[-1:]
        found[name] = {"exit_code": code, "summary": "".join(last)}
    return {"seconds": round(time.perf_counter() - started, 1), **found}


def draw(trace: dict[str, Any], file: Path, title: str) -> None:
    """What the GPU copied and computed in the last third of a profiler trace, one line each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes: dict[str, list[tuple[float, float]]] = {"kernels": [], "copies to the GPU": [], "copies back": []}
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            lanes["kernels"].append((event["ts"] / 1e3, event["dur"] / 1e3))
        elif event.get("cat") == "gpu_memcpy":
            back = "DtoH" in event["name"]
            lanes["copies back" if back else "copies to the GPU"].append(
                (event["ts"] / 1e3, event["dur"] / 1e3)
            )
    begin = min(start for lane in lanes.values() for start, _ in lane)
    end = max(start + length for lane in lanes.values() for start, length in lane)
    shown = begin + (end - begin) * 2 / 3
    figure, axes = pyplot.subplots(figsize=(12, 2.6))
    for place, (name, lane) in enumerate(lanes.items()):
        bars = [(start - shown, length) for start, length in lane if start >= shown]
        axes.broken_barh(bars, (place - 0.4, 0.8), color=f"C{place}", label=name)
    axes.set(xlabel="milliseconds", yticks=range(len(lanes)), yticklabels=list(lanes), title=title)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def vram_for(folder: Path, ram: int | None, share: float, stand_in: bool) -> int:
    """Bytes of GPU memory with slots for ``share`` of all experts beside the dense model; some only pass through."""
    with LoadedModel(folder, LoadOptions(ram=ram), open_device(stand_in)) as model:
        budget = model.device_budget
        assert budget is not None, model.notes
        others = sum(line.nbytes for line in budget.lines[:-1])
        slots = max(2, int(share * model.spec.total_experts)) if share < 1 else model.spec.total_experts + 2
        return others + slots * budget.slot_nbytes


def decode(
    options: LoadOptions, folder: Path, stand_in: bool, new_tokens: int, recorded: bool
) -> dict[str, Any]:
    with LoadedModel(folder, options, open_device(stand_in)) as model:
        if not recorded:
            model.graphs = None
        moved = _MovedBytes(model)
        found = measure_requests(model, PROMPT, new_tokens, REPEATS)
        assert model.device_budget is not None, model.notes
        return {
            "vram_bytes": options.vram,
            "resident": model.device_budget.resident,
            "ram_slots": model.budget.resident,
            "load_s": model.load_s,
            "notes": model.notes,
            "ahead": asdict(model.device_prefetch_statistics),
            "copies_late": model.runtime.statistics.copies_late,
            "changing": summarise(found["changing"]),
            "moved_per_token": moved.per_token(REPEATS, new_tokens),
        }


class _MovedBytes:
    """Bytes that each token copies, and computes in RAM."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._end_pass = model, model.runtime.end_pass
        self._passes: list[tuple[int, int]] = []
        model.runtime.end_pass = self._noted  # type: ignore[method-assign]

    def _noted(self) -> None:
        self._end_pass()
        work, device = self._model.runtime.statistics, self._model.device_statistics
        assert device is not None
        demanded = work.copies - work.promotions - work.copies_ahead
        self._passes.append((work.bytes_copied, device.misses - demanded))

    def per_token(self, requests: int, new_tokens: int) -> dict[str, float]:
        """Of the last requests, without their prompts, whose copies are many."""
        totals = [0, 0]
        for last in range(requests):
            end = len(self._passes) - 1 - last * new_tokens
            for i in range(2):
                totals[i] += self._passes[end][i] - self._passes[end - new_tokens + 1][i]
        tokens = requests * (new_tokens - 1)
        nbytes = max(self._model.spec.expert_nbytes.values())
        return {"copied": totals[0] / tokens, "in_ram": totals[1] * nbytes / tokens}


def rival(folder: Path, vram: int) -> dict[str, Any]:
    """transformers with accelerate, which moves whole layers, greedy, the same prompt length."""
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={0: vram, "cpu": 1 << 40}, dtype="auto"
    )
    loaded = time.perf_counter() - started
    prompt = torch.randint(
        0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    prompt = prompt.to("cuda")
    seconds = []
    for count in (1, 1, RIVAL_TOKENS):
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    places = [str(place) for place in model.hf_device_map.values()]
    return {
        "vram_bytes": vram,
        "load_s": loaded,
        "layers_by_place": {place: places.count(place) for place in set(places)},
        "tokens_per_s": (RIVAL_TOKENS - 1) / (seconds[-1] - seconds[-2]),
    }


def write_trace(options: LoadOptions, folder: Path, stand_in: bool, file: Path, title: str) -> None:
    with LoadedModel(folder, options, open_device(stand_in)) as model:
        measure_requests(model, PROMPT, 4, 1)
        with torch.profiler.profile() as profiler:
            measure_requests(model, 1, 3, 0)
        profiler.export_chrome_trace(str(file))
    text = file.read_bytes()
    with gzip.open(f"{file}.gz", "wb") as packed:
        packed.write(text)
    file.unlink()
    if importlib.util.find_spec("matplotlib") and not stand_in:
        draw(json.loads(text), file.with_suffix(".png"), title)


class Report:
    """What was measured so far. ``step`` does the next thing, unless the time is over; a failure is a figure too."""

    def __init__(self, out: Path | None, limit: float) -> None:
        self.found: dict[str, Any] = {}
        self._out, self._limit, self._started = out, limit, time.perf_counter()

    def step(self, name: str, place: dict[str, Any], key: str, work: Any, *arguments: Any) -> Any:
        if time.perf_counter() - self._started > self._limit:
            print(f"{name}: not measured, the time is over", flush=True)
            return None
        try:
            place[key] = work(*arguments)
        except Exception as error:
            traceback.print_exc()
            place[key] = {"failure": f"{type(error).__name__}: {error}"[:300]}
        # What a part has left behind would take the next one's GPU memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.found["seconds"] = round(time.perf_counter() - self._started, 1)
        if self._out is not None:
            (self._out / "gpu.json").write_text(json.dumps(self.found, indent=1))
        print(f"[{self.found['seconds']:6.1f} s] {name}: {_short(place[key])}", flush=True)
        return place[key]


def _short(found: Any) -> str:
    if not isinstance(found, dict) or "changing" not in found:
        return str(found)[:600]
    changing = found["changing"]
    split = {name: changing[f"{name}_s"]["median"] for name in _PARTS}
    return (
        f"{changing['decode_tokens_per_s']['median']:.2f} tokens/s, bound {found.get('bound', 0):.2f}, "
        f"{changing['gpu_hit_rate']['median']:.1%} hits, ttft {changing['ttft_s']['median']:.2f} s, {split}, "
        f"{found['moved_per_token']}"
    )


def measure(report: Report, given: argparse.Namespace, name: str, folder: Path) -> None:
    ram = parse_size(given.ram, "--ram") if given.ram else None
    found: dict[str, Any] = {}
    report.found.setdefault("models", {})[name] = found
    everything = LoadOptions(experts=ExpertBudget(fraction=1.0), device="cpu")
    with LoadedModel(folder, everything) as model:
        slot = model.budget.slot_nbytes
    device = open_device(given.stand_in)
    copies = report.step(
        f"{name}, copies of {format_size(slot)}", found, "copies", copy_bandwidth, device, slot
    )
    device.close()
    vram = {share: vram_for(folder, ram, share, given.stand_in) for share in {share for share, _ in CASES}}
    resident_s = 0.0

    def case(share: float, way: str) -> dict[str, Any]:
        nonlocal resident_s
        options = LoadOptions(ram=ram, vram=vram[share], **WAYS[way])
        one = decode(options, folder, given.stand_in, given.new_tokens, recorded=way != "launched")
        speed, moved = one["changing"]["decode_tokens_per_s"]["median"], one["moved_per_token"]
        resident_s = resident_s or 1 / speed
        link_s, ram_s = moved["copied"] / copies["engine"], moved["in_ram"] / report.found["ram_bandwidth"]
        one["bound"] = 1 / max(resident_s, link_s, ram_s)
        return {"share": share, "way": way, "tokens_per_s": speed, "of_bound": speed / one["bound"], **one}

    for share, way in CASES[:_FIRST]:
        report.step(f"{name}, {share:.0%}, {way}", found, f"{share:.0%} {way}", case, share, way)
    if given.out is not None:
        options = LoadOptions(ram=ram, vram=vram[0.5], misses="copy")
        file, title = given.out / f"{name}.json", f"{name}, half of the experts on the GPU"
        report.step(f"{name}, trace", {}, "", write_trace, options, folder, given.stand_in, file, title)
    if importlib.util.find_spec("accelerate") and not given.stand_in:
        for share in (0.25, 0.5):
            place = f"{share:.0%} accelerate"
            report.step(f"{name}, {place}", found, place, rival, folder, vram[share])
    for share, way in CASES[_FIRST:]:
        report.step(f"{name}, {share:.0%}, {way}", found, f"{share:.0%} {way}", case, share, way)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=["moei-demo"])
    parser.add_argument("--models", dest="place", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--ram", default=None)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--limit", type=float, default=480)
    parser.add_argument("--tests-limit", type=float, default=240)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--stand-in", action="store_true")
    given = parser.parse_args()
    if not given.stand_in and not torch.cuda.is_available():
        print("There is no CUDA device here, and these figures are about one.", file=sys.stderr)
        print("--stand-in runs the same code without one; its figures mean nothing.", file=sys.stderr)
        return 1
    report = Report(given.out, given.limit)
    found = report.found
    found["gpu"] = "none (stand-in)" if given.stand_in else torch.cuda.get_device_name()
    found["torch"], found["cores"] = torch.__version__, physical_cores()
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        if not given.stand_in and not given.no_tests:
            report.step("tests", found, "tests", run_tests, given.out, given.tests_limit)
    found["ram_bandwidth"] = read_bandwidth(make_buffer(1 << 29), physical_cores(), Allowance(1.0)).value
    device = open_device(given.stand_in)
    found["device_note"] = getattr(device, "note", "")
    report.step("kernels", found, "kernels", kernel_speed, device)
    device.close()
    del device
    for name in given.models:
        kind, _, layers = name.partition(":")
        if not layers:
            measure(report, given, name, resolve_model(name).folder)
            continue
        model, folder = SYNTHETIC_MODELS[kind], given.place / f"moei-gpu-{kind}-{layers}"
        started = time.perf_counter()
        try:
            if not (folder / "config.json").exists():
                write_checkpoint(model, model.cut(int(layers)), folder)
            print(f"{name} made in {time.perf_counter() - started:.1f} s", flush=True)
            measure(report, given, kind, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoeiError as error:
        sys.exit(str(error))
