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
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf_export import export
from memory_group import capped, join

from moei_core.adapters.checkpoint import read_tensors
from moei_core.config import parse_size
from moei_core.hub.synthetic import write_checkpoint
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS
from moei_core.quant import native

_MOEI = [sys.executable, "-c", "from moei_cli.main import main; main()"]
_PEER_SETTINGS = {"mapped": ["-lm", "mmap"], "repacked": ["-lm", "none", "--repack", "1"]}
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
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cap", help="memory of each: a size, or half of the model's file")
    parser.add_argument(
        "--skew", type=float, default=0.0, help="shared mean of the embedding, in its own deviations"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the models are made and kept; a temporary one if left out"
    )
    parser.add_argument("--output", type=Path, help="append the tables to this file, as JSON lines")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moei-vs-")))
        folder.mkdir(parents=True, exist_ok=True)
        source = make(options, folder)
        for form in options.quant:
            row = compare(options, folder, source, form)
            print(json.dumps(row, indent=1), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def make(options: argparse.Namespace, folder: Path) -> Path:
    """The bf16 checkpoint. With a skew every token's hidden state shares a direction, so that each router's random
    rows give some experts a constant lead: popular and unpopular experts, as trained models have them."""
    model = SYNTHETIC_MODELS[options.model]
    place = folder / f"{options.model}-{options.layers}-{options.skew:g}"
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


def compare(options: argparse.Namespace, folder: Path, source: Path, form: str) -> dict[str, Any]:
    name = str(source) if form == "bf16" else f"{source}:{form}"
    if form != "bf16":
        _run([*_MOEI, "quantize", str(source), form])
    packed = _resolve(name)
    peer_file = folder / f"{source.name}-{form}.gguf"
    if not peer_file.exists():
        export(packed, peer_file)
    row: dict[str, Any] = {
        "model": options.model, "layers": options.layers, "format": form, "skew": options.skew,
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
            ours.append(_measure_moei(options, name, cap))
            for setting, flags in settings.items():
                if cap:
                    _evict(peer_file)
                theirs[setting].append(_measure_peer(options, peer_path, flags, cap))
    peer_file.unlink()
    return row | _summary(ours, theirs)


def _measure_moei(options: argparse.Namespace, name: str, cap: int | None) -> dict[str, float]:
    figures: dict[str, float] = {}
    # Capped, prefill reads nearly all of the file: that figure is the disk's, and benchmarks/tiers.py has it.
    for prompt in options.prompt_tokens[:1] if cap else options.prompt_tokens:
        budget = ["--ram", f"{cap >> 20}MiB"] if cap else ["--experts", "100%"]
        report = json.loads(
            _run(
                [*_MOEI, "bench", name, *budget, "--prompt-tokens", str(prompt), "--new-tokens",
                 str(options.new_tokens), "--repeats", "2" if cap else "3", "--json"],
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


def _resolve(name: str) -> Path:
    from moei_core.hub.resolve import resolve_model

    return resolve_model(name).folder


if __name__ == "__main__":
    main()
