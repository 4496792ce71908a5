"""The forecast with a GPU against first principles, and against the simulator on machines that chance has made.

No GPU was met yet, so what is checked is the arithmetic: that a token takes the bytes it moves over the rate of the
lane that moves them, and that the closed form agrees with the simulator's clock wherever both describe one machine.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from moei_core.forecast.formats import FORMATS
from moei_core.forecast.gpu import GpuPlan, GpuSpeeds, decode_on_gpu, prefill_on_gpu
from moei_core.forecast.parts import Parts
from moei_core.forecast.shape import ModelShape
from moei_core.forecast.speed import Speeds
from moei_core.hardware.budget import DeviceBudget
from moei_core.sim.hardware import Hardware
from tests.forecast.test_gpu import NOTHING, board, replayed, shape_of, uniform_trace
from tests.hardware.fakes import made_profile

BF16 = FORMATS["bf16"]
VRAM, LINK, RAM, DISK = 800e9, 24e9, 40e9, 2e9


def small_shape(layers: int, experts: int, top_k: int, nbytes: int, **changes: int) -> ModelShape:
    parts = {"active_weights": 0, "head_weights": 0} | changes
    return replace(
        shape_of("mixtral-8x7b"), layers=layers, moe_layers=layers, experts=experts, top_k=top_k,
        expert_weights=nbytes // 2, **parts,
    )  # fmt: skip


def speeds_of(ram: float, disk: float) -> Speeds:
    profile = made_profile(memory_bandwidth=ram, disk_bandwidth=disk, kernel_share=1.0, layer=0.0)
    return replace(Speeds.of(profile, profile.disks[0]), framework=NOTHING)


def plan_of(gpu: GpuSpeeds, ram: float, nbytes: int, *, always: bool = False) -> GpuPlan:
    return GpuPlan(gpu, DeviceBudget(16, 14, nbytes, "a test"), ram, always)


def link(bandwidth: float) -> tuple[tuple[int, float], ...]:
    return (((1 << 20), (1 << 20) / bandwidth),)


def decode(
    shape: ModelShape, hits: tuple[float, float], *, ram: float = RAM, disk: float = DISK, always: bool = False,
    position: int = 0, **changes: object,
) -> Parts:  # fmt: skip
    settings = {"bandwidth": VRAM, "launch": 0.0, "read_back": 0.0, "copies": link(LINK)} | changes
    gpu = board(**settings)
    nbytes = shape.expert_nbytes(BF16)
    return decode_on_gpu(
        shape, BF16, speeds_of(ram, disk), plan_of(gpu, ram, nbytes, always=always), hits, position, "value"
    )


def test_all_in_vram_a_token_is_its_bytes_over_the_bandwidth_of_vram() -> None:
    layers, top_k, nbytes, dense = 4, 6, 8 << 20, 30 << 20
    shape = small_shape(layers, 32, top_k, nbytes, active_weights=dense)
    position = 1000
    moved = layers * top_k * nbytes + 2 * dense + position * shape.kv_nbytes_per_token
    found = decode(shape, (1.0, 1.0), position=position)
    assert found.total == found.gpu == pytest.approx(moved / VRAM, rel=1e-9)
    # Twice the bandwidth, half the time.
    twice = decode(shape, (1.0, 1.0), position=position, bandwidth=2 * VRAM)
    assert twice.total == pytest.approx(found.total / 2)


def test_each_layer_reads_back_once_and_launches_four_kernels() -> None:
    shape = small_shape(5, 32, 6, 8 << 20)
    without = decode(shape, (1.0, 1.0)).total
    assert decode(shape, (1.0, 1.0), read_back=3e-4).total == pytest.approx(without + 5 * 3e-4)
    assert decode(shape, (1.0, 1.0), launch=1e-5).total == pytest.approx(without + 5 * 4e-5)


@pytest.mark.parametrize("resident", [1.0, 0.0])
def test_nothing_in_vram_and_all_is_copied_a_token_is_its_bytes_over_the_slower_link(resident: float) -> None:
    layers, top_k, nbytes = 3, 4, 16 << 20
    shape = small_shape(layers, 32, top_k, nbytes)
    found = decode(shape, (0.0, resident), always=True)
    # All over the link; from disk, which is slower, it is read first and the last copied behind that. The GPU computes
    # what comes as it comes, but for the last.
    moving = top_k * nbytes / LINK if resident else top_k * nbytes / DISK + nbytes / LINK
    assert found.total == pytest.approx(layers * (moving + nbytes / VRAM), rel=1e-9)


def test_what_ram_computes_takes_its_bytes_over_rams_bandwidth_and_hides_the_gpu() -> None:
    layers, top_k, nbytes = 3, 4, 16 << 20
    shape = small_shape(layers, 32, top_k, nbytes)
    found = decode(shape, (0.0, 1.0))
    assert found.experts == pytest.approx(layers * top_k * nbytes / RAM, rel=1e-9)
    assert found.total == found.experts
    # With some in VRAM, the layer is the longer lane on average, between the longer average lane and the sum of both.
    half = decode(shape, (0.5, 1.0), bandwidth=RAM)
    lane = layers * top_k / 2 * nbytes / RAM
    assert lane < half.total < 2 * lane
    expected = sum(math.comb(4, here) / 16 * max(here, 4 - here) * nbytes / RAM for here in range(5))
    assert half.total == pytest.approx(layers * expected, rel=1e-9)


def test_a_prompt_is_bound_by_link_or_by_arithmetic() -> None:
    layers, experts, nbytes = 2, 32, 16 << 20
    shape = small_shape(layers, experts, 4, nbytes)
    gpu = board(bandwidth=VRAM, launch=0.0, read_back=0.0, copies=link(LINK))
    plan, speeds = plan_of(gpu, RAM, nbytes, always=True), speeds_of(RAM, DISK)
    for rows, limit in (
        (64, experts * nbytes / LINK),
        # 100 operations a byte of VRAM's bandwidth: 2 for each weight and token.
        (1 << 16, (1 << 16) * 4 * nbytes / (100 * VRAM)),
    ):
        found = prefill_on_gpu(shape, BF16, speeds, plan, experts, (1.0, 0.0), rows, 0, "value")
        keys = rows * shape.kv_nbytes_per_token / VRAM
        assert found.total == pytest.approx(layers * limit + keys, rel=1e-9)
    # Half of it from disk: that is the longest.
    found = prefill_on_gpu(shape, BF16, speeds, plan, experts, (1.0, 0.5), 64, 0, "value")
    assert found.disk + found.gpu == pytest.approx(
        layers * experts / 2 * nbytes / DISK + 64 * shape.kv_nbytes_per_token / VRAM, rel=1e-9
    )


def machines() -> list[tuple[int, ...]]:
    chance = random.Random(7)
    found = []
    for number in range(24):
        experts = chance.choice([16, 32, 64])
        top_k = chance.choice([2, 4, 8])
        on_gpu = chance.choice([0.125, 0.25, 0.5])
        in_ram = chance.choice([0.125, 0.25, 0.5])
        rates = [round(chance.uniform(*span)) for span in ((100, 2000), (4, 60), (8, 100), (0.5, 8))]
        found.append(
            (number, experts, top_k, round(8 * on_gpu), round(8 * in_ram), *map(int, (r for r in rates)))
        )
    return found


@pytest.mark.parametrize(
    ("number", "experts", "top_k", "on_gpu", "in_ram", "vram", "bus", "ram", "disk"), machines()
)
def test_a_token_takes_as_long_as_in_the_simulator_on_any_machine(
    number: int, experts: int, top_k: int, on_gpu: int, in_ram: int, vram: int, bus: int, ram: int, disk: int
) -> None:
    """on_gpu, in_ram: eighths of all experts. The rates in GB/s."""
    layers, nbytes = 2, 3 << 20
    disk_rate = max(1, disk) * 1e9
    machine = Hardware("a test", vram * 1e9, 1e-9, disk_rate, 0.0, bus * 1e9, 0.0)
    trace = uniform_trace(300, layers, experts, top_k)
    slots = on_gpu * layers * experts // 8, in_ram * layers * experts // 8
    simulated, hits = replayed(machine, ram * 1e9, trace, slots, nbytes)
    parts = decode(
        small_shape(layers, experts, top_k, nbytes), hits, ram=ram * 1e9, disk=disk_rate,
        bandwidth=vram * 1e9, copies=link(bus * 1e9),
    )  # fmt: skip
    assert parts.total == pytest.approx(simulated, rel=0.05)
