"""The forecast with a GPU beside the simulator's clock of the same machine, and against its own laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.config import ExpertBudget
from moei_core.errors import DoesNotFitError
from moei_core.forecast.changes import Resources, what_would_help
from moei_core.forecast.forecast import Forecast, forecast, plan_budget
from moei_core.forecast.formats import FORMATS
from moei_core.forecast.gpu import GpuPlan, GpuSpeeds, can_compute, decode_on_gpu, plan_gpu
from moei_core.forecast.shape import ModelShape, bundled_shape
from moei_core.forecast.speed import Speeds
from moei_core.hardware.budget import DeviceBudget
from moei_core.hardware.gpus import GpuFacts
from moei_core.hardware.probe.gpu import probe_gpu
from moei_core.hardware.profile import FrameworkCost, GpuProfile, LayerCost
from moei_core.sim.hardware import Hardware
from moei_core.sim.replay import replay
from moei_core.sim.tiered_clock import TieredClock, link_costs
from moei_core.tiers import DeviceTier, TieredScheduler
from moei_core.trace import Trace
from tests.hardware.fakes import GIB, FakeGpu, made_profile

BF16, Q4 = FORMATS["bf16"], FORMATS["q4_0"]
FACTS = GpuFacts(0, "A Board", "GPU-1", 24 * GIB, 20 * GIB, 0, (8, 6), 4, 16, False)
NOTHING = FrameworkCost((LayerCost(0, 0, 0),), 0, 0, 0, 0, 0, 0, 0, "a test")


def shape_of(name: str) -> ModelShape:
    shape = bundled_shape(name)
    assert shape is not None
    return replace(shape, uniform_routing=True)


def board(**changes: object) -> GpuSpeeds:
    found = GpuSpeeds.of([probe_gpu(FACTS, lambda facts: FakeGpu())])
    assert found is not None
    return replace(found, **changes)  # type: ignore[arg-type]


def uniform_trace(tokens: int, layers: int, experts: int, top_k: int) -> Trace:
    chosen = np.argsort(np.random.default_rng(0).random((tokens, layers, experts)), axis=2)[..., :top_k]
    return Trace(
        "uniform", experts, top_k, tuple(range(layers)), chosen.astype(np.uint8), np.array([0, tokens])
    )


def replayed(
    machine: Hardware, ram_bandwidth: float, trace: Trace, slots: tuple[int, int], nbytes: int
) -> tuple[float, tuple[float, float]]:
    """Seconds a token on a simulated machine, and the shares of lookups found on the GPU, and there or in RAM.

    slots: on the GPU and in RAM.
    """
    costs, counts, top_k = (
        link_costs(machine, ram_bandwidth),
        trace.experts_by_layer,
        trace.num_experts_per_tok,
    )
    front, ram = (ExpertCache(count, POLICIES["layer-lru"](count, counts)) for count in slots)
    tier = DeviceTier(
        front,
        counts,
        dict.fromkeys(counts, costs.copy_from(nbytes)),
        # Without promotions the GPU's tier would stay empty where RAM computes.
        dict.fromkeys(counts, costs.promote_share(nbytes)),
    )
    scheduler = TieredScheduler(ram, top_k, tier)
    clock = TieredClock(machine, ram_bandwidth, dict.fromkeys(counts, nbytes))
    replay(trace, scheduler, clock)
    seen = trace.tokens * len(counts) * top_k
    here = scheduler.device_statistics.hits / seen
    return clock.costs.seconds / clock.costs.tokens, (here, here + scheduler.statistics.hits / seen)


@pytest.mark.parametrize(
    ("on_gpu", "in_ram", "ram_bandwidth", "disk_bandwidth"),
    [
        # RAM computes what the GPU lacks; the disk is asked for nothing, for little, for much.
        (0.5, 0.5, 40e9, 3e9),
        (0.25, 0.5, 40e9, 3e9),
        (0.125, 0.125, 40e9, 1e9),
        # RAM is slower than the link: everything is copied.
        (0.5, 0.5, 8e9, 3e9),
        (0.25, 0.5, 8e9, 3e9),
        (0.125, 0.25, 8e9, 2e9),
    ],
)
def test_a_token_takes_as_long_as_in_the_simulator(
    on_gpu: float, in_ram: float, ram_bandwidth: float, disk_bandwidth: float
) -> None:
    """Uniform routing, a warm cache, nothing but experts: the closed form is within 3% of the replay."""
    layers, experts, top_k, nbytes = 2, 32, 4, 3 << 20
    machine = Hardware("a test", 300e9, 1e-9, disk_bandwidth, 0.0, 12e9, 0.0)
    trace = uniform_trace(600, layers, experts, top_k)
    total = layers * experts
    slots = int(on_gpu * total)
    # What the replay found in each tier is taken from it, so that only the times are compared.
    simulated, hits = replayed(machine, ram_bandwidth, trace, (slots, int(in_ram * total)), nbytes)
    copies = link_costs(machine, ram_bandwidth).copy_from(nbytes)

    weights = nbytes // 2
    shape = replace(
        shape_of("mixtral-8x7b"), layers=layers, moe_layers=layers, experts=experts, top_k=top_k,
        expert_weights=weights, active_weights=0, head_weights=0,
    )  # fmt: skip
    profile = made_profile(
        memory_bandwidth=ram_bandwidth, disk_bandwidth=disk_bandwidth, kernel_share=1.0, layer=0.0
    )
    speeds = replace(Speeds.of(profile, profile.disks[0]), framework=NOTHING)
    gpu = board(bandwidth=300e9, launch=0.0, read_back=0.0, copies=((1 << 20, (1 << 20) / 12e9),))
    plan = GpuPlan(gpu, DeviceBudget(slots + 2, slots, nbytes, "a test"), ram_bandwidth)
    assert plan.copies(nbytes, 1) == (copies <= 1)
    parts = decode_on_gpu(shape, BF16, speeds, plan, hits, 0, "value")
    assert parts.total == pytest.approx(simulated, rel=0.03)


def made(vram_gib: float, name: str = "qwen3-30b-a3b", prompt: int = 300, usable: int = 24 * GIB) -> Forecast:
    resources = Resources(
        Speeds.of(made_profile(), made_profile().disks[0]), usable, 4096, gpu=board(free=int(vram_gib * GIB))
    )
    return resources.expect(shape_of(name), Q4, prompt)


def test_more_memory_on_the_gpu_is_never_slower_and_all_of_it_is_bound_by_the_gpu() -> None:
    found = [made(gib) for gib in (5, 8, 12, 16, 24)]
    held = [one.gpu.budget.resident for one in found if one.gpu is not None]
    assert len(held) == 5 and held == sorted(held) and held[0] > 0
    speeds = [one.tokens_per_s.value for one in found]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    for one in found:
        for span in (one.tokens_per_s, one.ttft_s, one.warm_ttft_s):
            assert 0 < span.low < span.value < span.high
        assert 0 <= one.gpu_hit <= one.hit.value <= 1
        assert one.decode.total == pytest.approx(1 / one.tokens_per_s.value)
    last, shape = found[-1], shape_of("qwen3-30b-a3b")
    assert held[-1] == shape.total_experts
    assert last.decode.experts == last.decode.disk == 0.0
    read = 2 * shape.active_weights + shape.moe_layers * 8 * shape.expert_nbytes(Q4)
    read += 300 * shape.kv_nbytes_per_token
    overheads = 48 * (4 * 8e-6 + 20e-6)
    assert last.decode.gpu == pytest.approx(read / 300e9 + overheads, rel=1e-6)


def test_a_gpu_without_room_for_the_dense_part_is_left_out() -> None:
    shape, speeds = shape_of("mixtral-8x7b"), Speeds.of(made_profile(), made_profile().disks[0])
    small = board(free=1 * GIB)
    resources = Resources(speeds, 24 * GIB, 4096, gpu=small)
    budget = plan_budget(shape, Q4, speeds, 24 * GIB, 4096)
    assert resources.expect(shape, Q4, 64) == forecast(shape, Q4, speeds, budget, 64)
    with pytest.raises(DoesNotFitError, match="too small"):
        replace(resources, vram=GIB).expect(shape, Q4, 64)
    with pytest.raises(DoesNotFitError):
        plan_gpu(shape, Q4, speeds, small, 4096)


def test_what_the_gpu_has_is_not_in_ram() -> None:
    shape, speeds = shape_of("qwen3-30b-a3b"), Speeds.of(made_profile(), made_profile().disks[0])
    with_gpu, without = (
        plan_budget(shape, Q4, speeds, 12 * GIB, 4096, on_gpu=there) for there in (True, False)
    )
    assert with_gpu.resident > without.resident
    names = {line.name: line.nbytes for line in with_gpu.lines}
    assert names["dense weights"] == names["context"] == 0
    half = plan_budget(shape, Q4, speeds, 12 * GIB, 4096, experts=ExpertBudget(fraction=0.25), on_gpu=True)
    plan = plan_gpu(shape, Q4, speeds, board(free=8 * GIB), 4096)
    one = forecast(shape, Q4, speeds, half, 64, gpu=plan)
    assert one.residency == pytest.approx((half.resident + plan.budget.resident) / shape.total_experts)


def test_more_vram_is_among_what_would_help() -> None:
    shape, speeds = shape_of("qwen3-30b-a3b"), Speeds.of(made_profile(), made_profile().disks[0])
    resources = Resources(speeds, 12 * GIB, 4096, gpu=board(free=5 * GIB))
    now = resources.expect(shape, Q4, 64)
    changes = {one.what: one for one in what_would_help(shape, now, resources, ())}
    more = replace(resources, gpu=board(free=13 * GIB)).expect(shape, Q4, 64).tokens_per_s.value
    assert changes["+8 GB VRAM"].tokens_per_s == pytest.approx(more)


def test_what_was_not_measured_is_no_gpu() -> None:
    assert GpuSpeeds.of([]) is None
    assert GpuSpeeds.of([GpuProfile(FACTS, note="no driver")]) is None
    assert not can_compute(FORMATS["fp8"])
    speeds = board(copies=((1 << 20, 2e-4), (4 << 20, 5e-4)))
    assert speeds.copy(1 << 19) == pytest.approx(1e-4)
    assert speeds.copy(1 << 20) == pytest.approx(2e-4)
    assert speeds.copy((5 << 20) // 2) == pytest.approx(3.5e-4)
    assert speeds.copy(7 << 20) == pytest.approx(8e-4)
