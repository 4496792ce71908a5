"""moei beside llama.cpp: the same random weights, the same bits, the same threads, alternating.

PEER is the folder of a Release build of llama.cpp with ``bin/llama-bench``. In memory, both have the whole model and
llama.cpp runs with and without repacked weights. With ``--cap`` both run in a memory cgroup of that size (half the
model's file by default): llama.cpp maps a read-only direct-io loop device over its file with 128 KiB of
readahead, its best setting, and its file is evicted first; moei gets the same size as ``--ram``. That needs root.

    python benchmarks/vs_llama_cpp.py PEER --model qwen3-30b-a3b --layers 6 --quant q4_0 q8_0
    python benchmarks/vs_llama_cpp.py PEER --model qwen3-30b-a3b --layers 24 --quant q4_0 --cap half --skew 1
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf_export import export
from memory_group import capped, join

from moei_core.adapters.checkpoint import read_tensors
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import CHUNK_NBYTES, READERS, parse_size
from moei_core.engine.slots import SlotPool
from moei_core.hub.resolve import resolve_model
from moei_core.hub.synthetic import write_checkpoint
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS
from moei_core.quant import native
from moei_core.store.base import chunks

_MOEI = [sys.executable, "-c", "from moei_cli.main import main; main()"]
_PEER_SETTINGS = {"mapped": ["-lm", "mmap", "--repack", "0"], "repacked": ["-lm", "none", "--repack", "1"]}
_READAHEAD_SECTORS = "256"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", type=Path)
    parser.add_argument("--model", choices=("mixtral-8x7b", "qwen3-30b-a3b"), required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--quant", nargs="+", default=["q8_0", "q4_0"], choices=("bf16", "q8_0", "q4_0"))
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5, help="0 only makes the models")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cap", help="memory of each: a size, or half of the model's file")
    parser.add_argument(
        "--skew", type=float, default=0.0, help="shared mean of the embedding, in its own deviations"
    )
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help="moei prefetches by its routers' hints from the first token on; a chat decides that within some hundred",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the models are made and kept; a temporary one if left out"
    )
    parser.add_argument(
        "--drop-source",
        action="store_true",
        help="delete the bf16 weights once they are packed, to spare disk",
    )
    parser.add_argument("--output", type=Path, help="append the tables to this file, as JSON lines")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moei-vs-")))
        folder.mkdir(parents=True, exist_ok=True)
        models = prepare(options, folder)
        for form, model in models.items() if options.pairs else ():
            row = compare(options, model, gguf_of(options, folder, form), form)
            print(json.dumps(row, indent=1), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Make what is not there yet: for each format the model's folder, and the same bits as a GGUF file."""
    source = folder / f"{options.model}-{options.layers}-{options.skew:g}"
    models = {form: folder / f"{source.name}-{form}" for form in options.quant}
    for form, model in models.items():
        if not model.exists():
            model.symlink_to(pack(make(options, source), form))
    if options.drop_source and "bf16" not in options.quant:
        for weights in source.glob("*.safetensors"):
            weights.unlink()
    for form, model in models.items():
        peer_file = gguf_of(options, folder, form)
        if not peer_file.exists():
            export(model, peer_file)
    return models


def gguf_of(options: argparse.Namespace, folder: Path, form: str) -> Path:
    return folder / f"{options.model}-{options.layers}-{options.skew:g}-{form}.gguf"


def make(options: argparse.Namespace, place: Path) -> Path:
    """The bf16 checkpoint. With a skew every token's hidden state shares a direction, so that each router's random
    rows give some experts a constant lead: popular and unpopular experts, as trained models have them."""
    model = SYNTHETIC_MODELS[options.model]
    if not (place / "config.json").exists():
        write_checkpoint(model, model.cut(options.layers), place)
        if options.skew:
            entry = read_tensors(place)["model.embed_tokens.weight"]
            table = np.memmap(entry.file, np.uint16, "r+", entry.offset, tuple(entry.shape))
            mean = np.random.default_rng(1).standard_normal(entry.shape[1]).astype(np.float32) * options.skew
            for at in range(0, len(table), 4096):
                values = (table[at : at + 4096].astype(np.uint32) << 16).view(np.float32) + mean
                table[at : at + 4096] = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
            table.flush()
    return place


def pack(source: Path, form: str) -> Path:
    """The folder of the model in this format."""
    if form == "bf16":
        return source
    _run([*_MOEI, "quantize", str(source), form])
    return resolve_model(f"{source}:{form}").folder


def compare(options: argparse.Namespace, model: Path, peer_file: Path, form: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": options.model, "layers": options.layers, "format": form, "skew": options.skew,
        "prefetch": options.prefetch,
        "file_bytes": peer_file.stat().st_size, "threads": options.threads,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        cap = None
        if options.cap:
            cap = peer_file.stat().st_size // 2 if options.cap == "half" else parse_size(options.cap)
            row["cap_bytes"] = cap
            peer_path = str(stack.enter_context(_loop_device(peer_file)))
        else:
            peer_path = str(peer_file)
            row["read_bandwidth"] = _read_bandwidth(options.threads)
        settings = {"mapped": _PEER_SETTINGS["mapped"]} if cap else _PEER_SETTINGS
        ours, theirs = [], {setting: [] for setting in settings}
        for _ in range(options.pairs):
            ours.append(_measure_moei(options, model, cap))
            for setting, flags in settings.items():
                if cap:
                    _evict(peer_file)
                theirs[setting].append(_measure_peer(options, peer_path, flags, cap))
    return row | _summary(ours, theirs)


def _measure_moei(options: argparse.Namespace, model: Path, cap: int | None) -> dict[str, float]:
    figures: dict[str, float] = {}
    prefetch = ["--predictor", "router", "--prefetch", "on"] if options.prefetch else []
    # Capped, prefill reads nearly all of the file: that figure is the disk's, and benchmarks/tiers.py has it.
    for prompt in options.prompt_tokens[:1] if cap else options.prompt_tokens:
        budget = ["--ram", f"{cap >> 20}MiB"] if cap else ["--experts", "100%"]
        report = json.loads(
            _run(
                [*_MOEI, "bench", str(model), *budget, "--prompt-tokens", str(prompt), "--new-tokens",
                 str(options.new_tokens), "--repeats", "2" if cap else "3", "--json", *prefetch],
                cap,
            )
        )  # fmt: skip
        changing = report["conditions"]["changing"]
        if prompt == options.prompt_tokens[0]:
            figures["decode"] = changing["decode_tokens_per_s"]["median"]
            figures["hit_rate"] = changing["decode_hit_rate"]["median"]
            figures["missed_bytes_per_token"] = (
                (1 - figures["hit_rate"])
                * report["moe_layers"]
                * report["num_experts_per_tok"]
                * report["expert_bytes"]
            )
            figures["peak_bytes"] = report["peak_memory_bytes"]
            if cap:
                figures["disk_bandwidth"] = _disk_bandwidth(model)
                bound = figures["disk_bandwidth"] / figures["missed_bytes_per_token"]
                figures["share_of_disk_bound"] = figures["decode"] / bound
        if not cap:
            figures[f"prefill {prompt}"] = changing["prefill_tokens_per_s"]["median"]
    return figures


def _measure_peer(
    options: argparse.Namespace, file: str, flags: list[str], cap: int | None
) -> dict[str, float]:
    prompts = "0" if cap else ",".join(map(str, options.prompt_tokens))
    command = [
        str(options.peer / "bin" / "llama-bench"), "-m", file, "-t", str(options.threads), "-p", prompts,
        "-n", str(options.new_tokens), "-r", "2" if cap else "3", "-o", "json", *flags,
    ]  # fmt: skip
    figures = {}
    for test in json.loads(_run(command, cap)):
        figures["decode" if test["n_gen"] else f"prefill {test['n_prompt']}"] = statistics.median(
            test["samples_ts"]
        )
    return figures


def _summary(ours: list[dict[str, float]], theirs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the median and range of the ratios of pairs against the peer's better setting."""
    row: dict[str, Any] = {
        "moei": {key: round(statistics.median(one[key] for one in ours), 3) for key in ours[0]}
    }
    for figure in next(iter(theirs.values()))[0]:
        medians = {name: statistics.median(one[figure] for one in runs) for name, runs in theirs.items()}
        best = max(medians, key=lambda name: medians[name])
        ratios = [mine[figure] / other[figure] for mine, other in zip(ours, theirs[best], strict=True)]
        row[figure] = {
            "moei": row["moei"][figure],
            "llama.cpp": {name: round(value, 2) for name, value in medians.items()},
            "ratio": round(statistics.median(ratios), 2),
            "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return row


def _run(command: list[str], cap: int | None = None) -> str:
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(capped(cap)) if cap else None
        if cap and group is None:
            sys.exit("No memory cgroup can be made here: --cap needs root.")
        enter = None if group is None else partial(join, group)
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def _loop_device(file: Path) -> Iterator[str]:
    found = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", "--direct-io=on", str(file)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    device = found.stdout.strip()
    try:
        subprocess.run(["blockdev", "--setra", _READAHEAD_SECTORS, device], check=True)
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=False)


def _evict(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_bandwidth(threads: int) -> float:
    native.set_num_threads(threads)
    return native.read_bandwidth(np.ones(1 << 30, np.uint8), 5)


def _disk_bandwidth(model: Path, seconds: float = 3.0) -> float:
    """Bytes a second of experts in random order, past the page cache, by the engine's READERS in its chunks."""
    store = TransformersAdapter(model).open_store()
    experts = list(store.experts())
    random.Random(0).shuffle(experts)
    pool = SlotPool(READERS, max(store.layout(key).slot_nbytes for key in experts))
    ends = time.perf_counter() + seconds

    def read(reader: int) -> int:
        nbytes = 0
        for key in itertools.cycle(experts[reader::READERS]):
            for extent in chunks(store.layout(key), CHUNK_NBYTES):
                store.read_extent(key, extent, pool.view(reader))
            nbytes += store.layout(key).nbytes
            if time.perf_counter() > ends:
                return nbytes
        return nbytes

    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as readers:
        total = sum(readers.map(read, range(READERS)))
    taken = time.perf_counter() - started
    assert store.direct, "this file system refuses O_DIRECT: the page cache would be measured"
    store.close()
    return total / taken


if __name__ == "__main__":
    main()
