"""The clock and baselines against closed forms; live events against simulated ones; the reference table."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import DEFAULT_POLICY, POLICIES
from moei_core.config import ExpertBudget
from moei_core.errors import ModelNotFoundError, UsageError
from moei_core.predict import PREDICTORS
from moei_core.prefetch import PrefetchMode
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.baselines import BASELINES, UnifiedMemory
from moei_core.sim.clock import Clock, Costs, Links, RamTier
from moei_core.sim.hardware import PRESETS, Hardware, load_hardware
from moei_core.sim.replay import Observer, PassAccesses, replay
from moei_core.sim.sweep import NAMES, Run, interleaved, resident_slots, simulate, sweep
from moei_core.trace import Trace, TraceEvent, TraceWriter, next_uses, read_trace, write_trace
from moei_core.types import ExpertKey, FetchPlan, LayerAccess

from .synthetic import make_trace

# Beside the repository, or one level further up when this is a second working tree of it.
SHARED = next(
    (up / "shared" / "traces" for up in Path(__file__).parents[2:5] if (up / "shared" / "traces").is_dir()),
    Path("shared") / "traces",
)
MACHINE = Hardware(
    memory_bandwidth=1e12,
    dense_seconds=1e-3,
    disk_bandwidth=1e9,
    disk_latency=0.0,
    chunk_nbytes=1 << 20,
    batch_tokens=1 << 30,
)
MB = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("traces") / "t.safetensors"
    write_trace(make_trace(), file)
    return str(file)


def test_on_demand_takes_bytes_over_bandwidth(path: str) -> None:
    result = simulate(Run(path, "on-demand", 0, MACHINE, MB))
    trace = read_trace(path)
    moved = trace.experts.size * MB
    assert result.costs.demand_nbytes == moved
    # Each load waits for its layer's gate, so nothing but the experts' own compute overlaps.
    dense = trace.tokens * len(trace.moe_layers) * MACHINE.dense_seconds
    assert result.costs.seconds == pytest.approx(moved / MACHINE.disk_bandwidth + dense, rel=0.01)
    assert result.costs.stall_seconds == pytest.approx(moved / MACHINE.disk_bandwidth, rel=0.01)


def test_everything_resident_takes_compute_alone(path: str) -> None:
    trace = read_trace(path)
    result = simulate(Run(path, "layer-lru", trace.num_experts * len(trace.moe_layers), MACHINE, MB))
    assert result.misses == len(np.unique(trace.experts + 100 * np.arange(4)[:, None]))
    assert result.costs.seconds == pytest.approx(result.costs.compute_seconds + result.costs.stall_seconds)
    assert result.costs.stall_seconds <= result.misses * MB / MACHINE.disk_bandwidth


def test_two_links_work_as_a_pipeline() -> None:
    """One expert from disk to VRAM: the slower link, and one chunk on the faster."""
    experts = np.zeros((1, 1, 1), np.uint8)
    trace = Trace("one", 2, 1, (0,), experts, np.array([0, 1], np.int64))
    machine = replace(MACHINE, link_bandwidth=4e9, link_latency=0.0, dense_seconds=0.0)
    scheduler = ExpertScheduler(ExpertCache(1, POLICIES["layer-lru"](1, {0: 2})), 1)
    clock = Clock(machine, {0: 8 * MB}, scheduler)
    replay(trace, scheduler, clock)
    assert clock.costs.stall_seconds == pytest.approx(8 * MB / 1e9 + MB / 4e9)


def test_of_loads_asked_for_together_only_the_first_latency_shows() -> None:
    links = Links(replace(MACHINE, disk_latency=0.5), RamTier(0), Costs())
    second = 1_000_000_000  # bytes
    assert links.load(second, 10.0, from_disk=True, asked=10.0) == pytest.approx(11.5)
    assert links.load(second, 10.0, from_disk=True, asked=10.0) == pytest.approx(12.5)
    assert links.load(second, 12.5, from_disk=True, asked=10.0) == pytest.approx(13.5), (
        "a prefetch behind them"
    )
    assert links.load(second, 13.4, from_disk=True, asked=13.4) == pytest.approx(14.9), "the link had to wait"
    assert links.load(second, 20.0, from_disk=True, asked=None) == pytest.approx(21.0), "the rest of one"


def test_ram_serves_what_vram_gave_up(path: str) -> None:
    gpu = replace(MACHINE, link_bandwidth=10e9, ram_nbytes=64 * MB)
    with_ram = simulate(Run(path, "layer-lru", 16, gpu, MB))
    without = simulate(Run(path, "layer-lru", 16, replace(gpu, ram_nbytes=0), MB))
    touched = len(np.unique(read_trace(path).experts + 100 * np.arange(4)[:, None]))
    assert with_ram.costs.disk_nbytes == touched * MB, "RAM holds all experts: each is read once"
    assert without.costs.disk_nbytes == without.misses * MB
    assert with_ram.costs.seconds < without.costs.seconds


def test_the_bound_of_perfect_overlap_holds(path: str) -> None:
    for name in NAMES:
        for machine in PRESETS.values():
            result = simulate(Run(path, name, 24, machine, MB))
            assert result.tokens_per_second <= result.bound_tokens_per_second * (1 + 1e-9), name


@pytest.mark.parametrize("name", BASELINES)
def test_other_systems_read_from_disk_what_ram_does_not_keep(name: str, path: str) -> None:
    gpu = replace(MACHINE, link_bandwidth=10e9, ram_nbytes=1 << 30)
    roomy = simulate(Run(path, name, 8, gpu, 2 * MB))
    tight = simulate(Run(path, name, 8, replace(gpu, ram_nbytes=16 * MB), 2 * MB))
    trace = read_trace(path)
    assert 0 < roomy.costs.disk_nbytes <= trace.num_experts * len(trace.moe_layers) * 2 * MB, "each once"
    assert tight.costs.disk_nbytes > 3 * roomy.costs.disk_nbytes
    assert tight.costs.link_nbytes == roomy.costs.link_nbytes
    assert tight.costs.seconds > 2 * roomy.costs.seconds
    assert tight.costs.seconds >= tight.costs.disk_nbytes / gpu.disk_bandwidth
    report = roomy.report()
    assert report["ram_hit_rate"] == pytest.approx(
        1 - roomy.costs.disk_nbytes / roomy.costs.link_nbytes, abs=1e-5
    )
    assert simulate(Run(path, name, 8, MACHINE, 2 * MB)).report()["ram_hit_rate"] is None, "there is no GPU"


def test_streaming_takes_all_bytes_over_bandwidth(path: str) -> None:
    """ZeRO-Infinity style: the link never rests, so time = bytes of all layers of all passes / bandwidth."""
    trace = read_trace(path)
    result = simulate(Run(path, "zero-infinity", 0, MACHINE, MB))
    moved = trace.tokens * len(trace.moe_layers) * trace.num_experts * MB
    assert result.costs.seconds == pytest.approx(moved / MACHINE.disk_bandwidth, rel=0.01)


def test_unified_memory_faults_as_the_tree_prefetcher_says() -> None:
    # 64 KiB, then the subtree doubles with each fault: 64, 128, 256, 512 KiB, 1, 2 MiB.
    assert UnifiedMemory.faults_of_block() == 6
    lane = UnifiedMemory(replace(MACHINE, memory_bandwidth=1e15, dense_seconds=0.0), {0: 4}, 2 * MB, 4)
    lane.access(LayerAccess(0, (1,), (1,), read_phase()))
    assert lane.now == pytest.approx(2 * MB / 1e9 + 6 * UnifiedMemory.FAULT_SECONDS)
    lane.access(LayerAccess(0, (1,), (1,), read_phase()))
    assert (lane.hits, lane.misses) == (1, 1)


def read_phase() -> object:
    from moei_core.types import Phase

    return Phase.DECODE


def test_brainstorm_holds_the_most_frequent_of_the_next_layer() -> None:
    lane = BASELINES["brainstorm"](MACHINE, {0: 4, 1: 4}, MB, 4)
    for _ in range(3):
        lane.access(LayerAccess(0, (2, 3), (1, 1), read_phase()))  # type: ignore[arg-type]
        lane.access(LayerAccess(1, (2, 3), (1, 1), read_phase()))  # type: ignore[arg-type]
    assert lane.hits == 8, "only each layer's first access misses"


def test_a_sweep_over_processes_equals_one_in_this_process(path: str) -> None:
    runs = [Run(path, name, 24, MACHINE, MB) for name in ("layer-lru", "learned", "layer-belady")]
    alone = [simulate(run).report() for run in runs]
    together = [result.report() for result in sweep(runs, 2)]
    assert together == alone


class Live(Clock):
    """Stands for the engine: carries plans out in its own time and records what only it can know."""

    def __init__(self, hardware: Hardware, trace: Trace, scheduler: ExpertScheduler, file: Path) -> None:
        super().__init__(hardware, dict.fromkeys(trace.moe_layers, MB), scheduler)
        self.trace, self.plans, self.token = trace, list[FetchPlan](), 0
        self.writer = TraceWriter(file, "live", trace.experts_by_layer, trace.num_experts_per_tok)
        wrapped = scheduler.start_load, scheduler.finish_load

        def start(key: ExpertKey) -> None:
            self.writer.event(TraceEvent.START_LOAD, *key)
            wrapped[0](key)

        def finish(key: ExpertKey) -> tuple[bool, tuple[ExpertKey, ...]]:
            self.writer.event(TraceEvent.FINISH_LOAD, *key)
            return wrapped[1](key)

        scheduler.start_load, scheduler.finish_load = start, finish  # type: ignore[method-assign]

    def begin_pass(self, one: PassAccesses) -> None:
        if one.starts_request:
            self.writer.begin_sequence()
        self.writer.begin_pass(one.phase, one.tokens)
        super().begin_pass(one)

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)
        self.writer.record(access.layer, self.trace.experts[self.token : self.token + 1, access.layer - 1])
        super().carry_out(access, plan)

    def end_pass(self) -> tuple[float, float]:
        self.token += 1
        stall, seconds = super().end_pass()
        self.writer.event(TraceEvent.STALL, round(stall * 1e9), round(seconds * 1e9))
        return stall, seconds


class Plans(Observer):
    def __init__(self) -> None:
        self.plans: list[FetchPlan] = []

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        self.plans.append(plan)


LIVE = [(DEFAULT_POLICY, name) for name in PREDICTORS] + [
    (name, "markov") for name in POLICIES if not POLICIES[name](1, {0: 1}).needs_future
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("policy", "predictor"), LIVE)
def test_a_recorded_run_replays_to_the_same_plans(policy: str, predictor: str, tmp_path: Path) -> None:
    trace = make_trace(sequences=3, length=20)
    for slots in (8, 24, 40):

        def scheduler(slots: int = slots) -> ExpertScheduler:
            cache = ExpertCache(slots, POLICIES[policy](slots, trace.experts_by_layer))
            made = PREDICTORS[predictor](trace.experts_by_layer)
            return ExpertScheduler(cache, trace.num_experts_per_tok, made, PrefetchMode.ON)

        live, file = scheduler(), tmp_path / "live"
        engine = Live(replace(MACHINE, disk_bandwidth=20e9), trace, live, file)
        replay(trace, live, engine)
        engine.writer.close()
        again, seen = scheduler(), Plans()
        replay(read_trace(file), again, seen, recorded_events=True)
        assert seen.plans == engine.plans
        assert again.statistics == live.statistics
        assert again.prefetch_statistics == live.prefetch_statistics
        if policy == DEFAULT_POLICY and predictor not in ("router", "stride") and slots == 24:
            assert live.prefetch_statistics.started > 0


def test_interleaving_mixes_users_and_loses_no_token() -> None:
    trace = make_trace(sequences=5, length=4)
    mixed = interleaved(trace, 2)
    assert mixed.tokens == trace.tokens
    assert mixed.sequence_offsets.tolist() == [0, 8, 16, 20]
    np.testing.assert_array_equal(mixed.experts[0], trace.experts[0])
    np.testing.assert_array_equal(mixed.experts[1], trace.experts[4])
    np.testing.assert_array_equal(mixed.experts[2], trace.experts[1])


def test_budgets() -> None:
    trace = make_trace()
    assert resident_slots(ExpertBudget.parse("25%"), trace, MB) == 4 * 4
    assert resident_slots(ExpertBudget.parse("20MiB"), trace, MB) == 17
    with pytest.raises(UsageError, match="less than the experts of one token"):
        resident_slots(ExpertBudget.parse("1MiB"), trace, MB)


def test_hardware_files(tmp_path: Path) -> None:
    file = tmp_path / "h.json"
    file.write_text('{"disk_bandwidth": "7GB/s", "ram_nbytes": "64GiB", "link_bandwidth": 24e9}')
    machine = load_hardware(str(file))
    assert (machine.disk_bandwidth, machine.ram_nbytes) == (7e9, 64 << 30)
    for text, sentence in (
        ('{"disk": 1}', "unknown setting 'disk'"),
        ("[1]", "unknown setting"),
        ("nonsense", "neither JSON nor TOML"),
        ('{"disk_bandwidth": 0}', "above 0"),
        ('{"disk_bandwidth": true}', "must be a number"),
        ('{"link_latency": -1}', "negative"),
        ('{"disk_bandwidth": NaN}', "must be a number"),
        ('{"ram_nbytes": 1e400}', "must be a number"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            load_hardware(str(file))
    with pytest.raises(ModelNotFoundError):
        load_hardware("none.json")


def test_nothing_below_the_simulator_imports_torch() -> None:
    code = (
        "import sys, moei_core.sim.sweep, moei_core.trace, moei_core.predict, moei_cli.bench_trace;"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'the brain must not need torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


REFERENCE = [
    ("qwen3-30b-a3b-phone", 32, 0.816, 0.805, 0.881),
    ("gemma-4-26b-a4b-phone", 32, 0.779, 0.777, 0.865),
    ("kimi-linear-48b-code", 64, 0.730, 0.729, 0.843),
    ("olmoe-1b-7b-code", 16, 0.568, 0.597, 0.723),
    ("olmoe-1b-7b-code", 32, 0.785, 0.794, 0.899),
]
SLOW = [pytest.mark.slow, pytest.mark.untimed]
SLOW_REFERENCE = [
    # With eight slots for six experts the order of use within an access decides: see LayerLRU.
    ("deepseek-v2-lite-esft", 8, 0.281, 0.327, 0.439),
    ("deepseek-v2-lite-esft", 16, 0.505, 0.527, 0.702),
    ("deepseek-v2-lite-esft", 32, 0.756, 0.763, 0.891),
]


@pytest.mark.parametrize(
    ("name", "slots", "global_lru", "layer_lru", "layer_belady"),
    [*REFERENCE, *(pytest.param(*row, marks=SLOW) for row in SLOW_REFERENCE)],
)
def test_the_reference_table(
    name: str, slots: int, global_lru: float, layer_lru: float, layer_belady: float
) -> None:
    file = SHARED / f"{name}.safetensors"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    trace = read_trace(file)
    if trace.phase is not None:
        # The table counts decode tokens only.
        decode = trace.experts[trace.phase == 1]
        bounds = np.array([0, len(decode)], np.int64)
        trace = replace(trace, experts=decode, phase=None, sequence_offsets=bounds)
    future = next_uses(trace)
    for policy_name, rate in (
        ("global-lru", global_lru),
        ("layer-lru", layer_lru),
        ("layer-belady", layer_belady),
    ):
        total = slots * len(trace.moe_layers)
        policy = POLICIES[policy_name](total, trace.experts_by_layer)
        scheduler = ExpertScheduler(ExpertCache(total, policy), trace.num_experts_per_tok)
        replay(trace, scheduler, next_uses=future if policy.needs_future else None)
        assert scheduler.statistics.hit_rate == pytest.approx(rate, abs=0.002), policy_name
