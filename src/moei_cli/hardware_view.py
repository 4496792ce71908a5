"""A profile as a table whose last column says what each number means for decoding a Mixture-of-Experts model."""

from __future__ import annotations

from moei_core.config import format_size
from moei_core.hardware.profile import (
    DiskProfile,
    ExpertSpeed,
    Figure,
    GpuProfile,
    HardwareProfile,
    KernelSpeed,
)

Row = tuple[str, str, str, str]
HEADINGS = ("what", "measured", "spread", "what it means for MoE decode")


def rows(profile: HardwareProfile) -> list[Row]:
    """One row a number: (what, the value, its spread, its meaning)."""
    memory, cpu = profile.memory, profile.cpu
    quota = "" if cpu.quota is None else f", {cpu.quota:g} allowed"
    found: list[Row] = [
        (
            "processor",
            f"{cpu.cores} cores{quota}",
            "",
            f"{cpu.model} ({', '.join(cpu.features) or 'no vectors'})",
        ),
        ("RAM", format_size(memory.total), "", "holds the dense part and as many experts as fit"),
        ("RAM usable now", format_size(memory.usable), "", memory.reason),
        ("swap", format_size(memory.swap_total), "", "never used by a plan: an expert in swap is read twice"),
    ]
    if memory.cgroup is not None:
        group = memory.cgroup
        found.insert(2, (f"RAM limit (cgroup v{group.version})", format_size(group.limit), "", group.path))
    for threads, figure in profile.memory_bandwidth.items():
        best = figure == profile.best_memory_bandwidth
        meaning = f"ceiling of resident decode: with 1 GB of active weights {figure.value / 1e9:.1f} tokens/s"
        found.append(
            (f"memory read, {threads} threads", _rate(figure), _spread(figure), meaning if best else "")
        )
    found += [row for kernel in profile.kernels if kernel.rows == 1 for row in _kernel_rows(kernel, profile)]
    found += [_expert_row(one, profile) for one in profile.experts if one.tokens == 1]
    for disk in profile.disks:
        found += _disk_rows(disk)
    for gpu in profile.gpus:
        found += _gpu_rows(gpu)
    cost = profile.framework
    if cost is not None:
        found += [
            (
                f"framework, a layer of {format_size(one.nbytes)}",
                f"{one.native * 1e3:.2f} ms",
                "",
                f"Python around it, in each layer; {one.torch * 1e3:.2f} ms with transformers' attention",
            )
            for one in cost.layers
        ]
        found += [
            ("framework, an expert", f"{cost.expert * 1e6:.0f} us", "", "calling one, whatever its size"),
            (
                "first pass",
                f"{cost.first_pass * 1e3:.0f} ms",
                "",
                "what the first prompt of a process pays once",
            ),
            ("process", format_size(cost.process_nbytes), "", "memory before any weight is loaded"),
        ]
    return found


def _rate(figure: Figure) -> str:
    return f"{figure.value / 1e9:.2f} GB/s"


def _spread(figure: Figure) -> str:
    return f"+-{figure.spread:.0%}"


def _kernel_rows(kernel: KernelSpeed, profile: HardwareProfile) -> list[Row]:
    speed = kernel.nbytes / kernel.seconds.value
    share = speed / profile.best_memory_bandwidth.value
    return [
        (
            f"{kernel.format} product of {format_size(kernel.nbytes)} ({kernel.kernel})",
            f"{speed / 1e9:.2f} GB/s",
            _spread(kernel.seconds),
            f"{share:.0%} of the memory's speed: an expert of three such matrices takes "
            f"{3e3 * kernel.seconds.value:.2f} ms",
        )
    ]


def _expert_row(one: ExpertSpeed, profile: HardwareProfile) -> Row:
    speed = one.nbytes / one.resident
    share = speed / profile.best_memory_bandwidth.value
    return (
        f"{one.format} expert of {format_size(one.nbytes)}",
        _rate(Figure(speed, speed, speed)),
        "",
        f"{share:.0%} of the memory's speed: {1e3 * one.resident:.2f} ms, and {1e3 * one.arriving:.2f} ms while "
        "others are read",
    )


def _disk_rows(disk: DiskProfile) -> list[Row]:
    facts = disk.facts
    kind = {True: "spinning, or says so", False: "solid state", None: "kind unknown"}[facts.rotational]
    about = f"{facts.file_system} on {facts.device or '?'}, {kind}, {format_size(facts.free)} free"
    if facts.in_memory:
        about += "; files here take RAM"
    found: list[Row] = [(f"disk at {facts.mount}", "O_DIRECT" if disk.direct else "buffered", "", about)]
    if not disk.reads:
        return [(f"disk at {facts.mount}", "not measured", "", disk.note)]
    for nbytes in sorted({read.nbytes for read in disk.reads}):
        same = [read for read in disk.reads if read.nbytes == nbytes]
        one, best = same[0], max(same, key=lambda read: read.bandwidth.value)
        found.append(
            (
                f"  {format_size(nbytes)} blocks, {best.depth} at a time",
                _rate(best.bandwidth),
                _spread(best.bandwidth),
                f"one missing expert of that size stalls for {1e3 * one.latency.value:.1f} ms",
            )
        )
    for read in disk.experts:
        found.append(
            (
                f"  experts of {format_size(read.nbytes)}",
                _rate(read.bandwidth),
                _spread(read.bandwidth),
                f"read as the engine does, in chunks: one takes {1e3 * read.nbytes / read.bandwidth.value:.1f} ms",
            )
        )
    if disk.fresh is not None:
        found.append(
            (
                "  into fresh memory",
                _rate(disk.fresh.bandwidth),
                _spread(disk.fresh.bandwidth),
                "a cold prompt fills slots that were never used",
            )
        )
    if disk.sustained is not None:
        found.append(
            (
                "  sustained",
                _rate(disk.sustained),
                _spread(disk.sustained),
                f"1 GB of missed experts a token, {disk.sustained.value / 1e9:.2f} tokens/s at best",
            )
        )
    found.append(("  read was", "", "", disk.source))
    return found


def _gpu_rows(gpu: GpuProfile) -> list[Row]:
    facts = gpu.facts
    parts = [
        f"capability {facts.capability[0]}.{facts.capability[1]}"
        if facts.capability
        else "capability unknown",
        f"PCIe {facts.pcie_generation or '?'} x{facts.pcie_width or '?'}",
    ]
    if facts.used_by_others:
        parts.append(f"{format_size(facts.used_by_others)} used by others")
    if facts.mig:
        parts.append("a MIG slice")
    memory = "memory unknown" if facts.free is None else f"{format_size(facts.free)} free"
    if facts.total is not None:
        memory += f" of {format_size(facts.total)}"
    found: list[Row] = [(f"GPU {facts.index}: {facts.name}", memory, "", ", ".join(parts))]
    if gpu.note:
        found.append(("  not measured", "", "", gpu.note))
    for copy in gpu.copies:
        found.append(
            (
                f"  copy of {format_size(copy.nbytes)}, pinned",
                _rate(copy.pinned),
                _spread(copy.pinned),
                f"an expert of that size arrives after {1e3 * copy.nbytes / copy.pinned.value:.2f} ms "
                f"({_rate(copy.pageable)} from ordinary memory)",
            )
        )
    if gpu.bandwidth is not None:
        found.append(
            ("  its memory", _rate(gpu.bandwidth), _spread(gpu.bandwidth), "ceiling of what lies in VRAM")
        )
    if gpu.launch is not None and gpu.read_back is not None:
        found.append(
            (
                "  launch, read-back",
                f"{gpu.launch.value * 1e6:.0f}, {gpu.read_back.value * 1e6:.0f} us",
                _spread(gpu.read_back),
                "asking the router's choice costs one read-back a layer",
            )
        )
    return found
