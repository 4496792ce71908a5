"""The forecast against closed forms and its own laws; the routing table; what would help."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moei_core.config import ExpertBudget
from moei_core.errors import DoesNotFitError
from moei_core.forecast import limits as named
from moei_core.forecast.changes import Resources, what_would_help
from moei_core.forecast.forecast import Forecast, forecast, plan_budget
from moei_core.forecast.formats import FORMATS, stored_format
from moei_core.forecast.routing import Recording, Routing, recordings, routing_of
from moei_core.forecast.shape import ModelShape, bundled_configs, bundled_shape
from moei_core.forecast.speed import Speeds
from moei_core.hardware.profile import ExpertSpeed, FrameworkCost, LayerCost, ReadSpeed
from moei_core.quant import native
from tests.hardware.fakes import GIB, exactly, made_profile

PROFILE = made_profile()
SPEEDS = Speeds.of(PROFILE, PROFILE.disks[0])
BF16, Q8, Q4 = FORMATS["bf16"], FORMATS["q8_0"], FORMATS["q4_0"]


def shape_of(name: str, *, uniform: bool = True) -> ModelShape:
    shape = bundled_shape(name)
    assert shape is not None
    return replace(shape, uniform_routing=uniform)


def made(name: str, share: float, speeds: Speeds = SPEEDS, form: str = "bf16", prompt: int = 64) -> Forecast:
    """A forecast with so large a share of the experts in slots, random weights."""
    shape = shape_of(name)
    budget = plan_budget(shape, FORMATS[form], speeds, 1 << 50, 4096, experts=ExpertBudget(fraction=share))
    return forecast(shape, FORMATS[form], speeds, budget, prompt)


def test_a_resident_mixtral_is_bound_by_reading_its_active_weights() -> None:
    """Products at 60% of 20 GB/s: the time of a token is the sum of bytes over bandwidth, and of the overheads."""
    one, shape = made("mixtral-8x7b", 1.0), shape_of("mixtral-8x7b")
    bandwidth = 0.6 * 20e9
    assert one.hit.value == 1.0
    assert one.decode.disk == 0.0
    experts = 32 * 2 * (shape.expert_weights * 2 / bandwidth + 5e-5)
    assert one.decode.experts == pytest.approx(experts, rel=1e-6)
    assert one.decode.framework == pytest.approx(32 * 1e-3 + 1e-3 + 2e-8 * 32000)
    attention = 64 * shape.kv_nbytes_per_token / 20e9
    assert one.decode.dense == pytest.approx(shape.active_weights * 2 / bandwidth + attention, rel=1e-6)
    assert one.limits == ("experts",)
    assert one.tokens_per_s.value == pytest.approx(1 / one.decode.total)


def test_misses_cost_what_computing_does_not_hide() -> None:
    """One layer of two experts: both hit, one is missing, or both are; the last to arrive is computed last."""
    one, shape = made("mixtral-8x7b", 0.5), shape_of("mixtral-8x7b")
    hit = one.budget.resident / 256
    assert one.hit.value == pytest.approx(hit)
    compute = shape.expert_weights * 2 / (0.6 * 20e9) + 5e-5
    read = shape.expert_nbytes(BF16) / 1e9
    waits = 2 * hit * (1 - hit) * (read - compute) + (1 - hit) ** 2 * (2 * read - compute)
    assert one.decode.disk == pytest.approx(32 * waits)
    assert one.limits == ("disk",)
    fast = Speeds.of(made_profile(disk_bandwidth=1e12), made_profile(disk_bandwidth=1e12).disks[0])
    assert made("qwen3-30b-a3b", 0.9, fast).decode.disk < 1e-3 * one.decode.disk


def expert_cells(resident: float, arriving: float, per_token: float = 0.0) -> tuple[ExpertSpeed, ...]:
    """Seconds a GB of one token's expert; each further token adds ``per_token`` of that."""
    return tuple(
        ExpertSpeed(
            form, nbytes, tokens, *(one * nbytes / 1e9 * (1 + per_token * (tokens - 1)) for one in cost)
        )
        for cost in [(resident, arriving)]
        for form in ("bf16", "q4_0")
        for nbytes in (1 << 20, 1 << 30)
        for tokens in (1, 64)
    )


def test_experts_take_what_the_engine_took_for_them() -> None:
    """An expert of 1 GB takes 50 ms among resident ones and 80 ms by itself; the disk reads 1 GB/s."""
    profile = made_profile(experts=expert_cells(0.05, 0.08))
    speeds = Speeds.of(profile, profile.disks[0])
    for form in ("bf16", "q4_0"):
        one, shape = made("mixtral-8x7b", 0.5, speeds, form), shape_of("mixtral-8x7b")
        gb = shape.expert_nbytes(FORMATS[form]) / 1e9
        hit = one.budget.resident / 256
        both, one_missing, all_missing = hit**2, 2 * hit * (1 - hit), (1 - hit) ** 2
        computing = both * 0.1 * gb + one_missing * 0.13 * gb + all_missing * 0.16 * gb
        assert one.decode.experts == pytest.approx(32 * computing)
        # What has arrived last is computed after all waiting: only the other one hides reading.
        waiting = one_missing * (gb - 0.05 * gb) + all_missing * (2 * gb - 0.08 * gb)
        assert one.decode.disk == pytest.approx(32 * waiting)
    assert speeds.is_measured(Q4)
    assert not speeds.is_measured(FORMATS["mxfp4"])
    # Formats that the engine did not compute: three products and a call.
    f16 = speeds.expert(FORMATS["f16"], 3e6, 1, arriving=True)
    assert f16 == pytest.approx(3 * speeds.product(FORMATS["f16"], 1e6, 1) + 5e-5)
    # However small, an expert takes a call.
    assert speeds.expert(BF16, 10, 1, arriving=False) == 5e-5
    assert speeds.expert(BF16, 10, 16, arriving=False) == 1e-4


def with_framework(**changes: object) -> Speeds:
    assert PROFILE.framework is not None
    return Speeds.of(replace(PROFILE, framework=replace(PROFILE.framework, **changes)), PROFILE.disks[0])  # type: ignore[arg-type]


def test_weights_that_pass_the_caches_make_the_framework_slower() -> None:
    """A layer's bytes between those measured, level beyond; attention that is not native costs more."""
    layers = (LayerCost(0, 1e-3, 2e-3), LayerCost(100 << 20, 2e-3, 4e-3), LayerCost(200 << 20, 4e-3, 8e-3))
    cost = FrameworkCost(layers, 0, 0, 0, 0, 0, 0, 0, "")
    for mib, expected in ((0, 1e-3), (50, 1.5e-3), (100, 2e-3), (150, 3e-3), (200, 4e-3), (900, 4e-3)):
        assert cost.layer(mib << 20) == pytest.approx(expected)
        assert cost.layer(mib << 20, native=False) == pytest.approx(2 * expected)
    speeds = with_framework(layers=layers, token=0.0, sampling=0.0)
    shape = shape_of("qwen3-30b-a3b")
    for form in ("bf16", "q4_0"):
        nbytes = 8 * shape.expert_nbytes(FORMATS[form]) + shape.dense_in(FORMATS[form]).nbytes(
            (shape.active_weights - shape.head_weights) // 48
        )
        one = made("qwen3-30b-a3b", 1.0, speeds, form)
        assert one.decode.framework == pytest.approx(48 * cost.layer(nbytes), rel=1e-3)
    torch = replace(shape, model_type="qwen3_next")
    budget = plan_budget(torch, BF16, speeds, 1 << 50, 4096, experts=ExpertBudget(fraction=1.0))
    assert forecast(torch, BF16, speeds, budget, 64).decode.framework == pytest.approx(
        2 * made("qwen3-30b-a3b", 1.0, speeds).decode.framework
    )


def test_an_expert_that_arrives_is_handled() -> None:
    cells = expert_cells(0.05, 0.08)
    quick = made_profile(experts=cells)
    slow = made_profile(experts=tuple(replace(one, handling=0.01 * one.nbytes / 1e9) for one in cells))
    for share in (0.5, 1.0):
        one, other = (made("mixtral-8x7b", share, Speeds.of(p, p.disks[0])) for p in (quick, slow))
        missing = 2 * (1 - one.hit.value)
        gb = shape_of("mixtral-8x7b").expert_nbytes(BF16) / 1e9
        assert other.decode.framework - one.decode.framework == pytest.approx(32 * missing * 0.01 * gb)


def test_latent_attention_that_torch_computes_expands_its_cache_at_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One product with as many rows as there are tokens, in steps of 64; of float weights on one of two threads."""
    assert shape_of("deepseek-v2-lite").expansion_weights == 0
    monkeypatch.setattr("moei_core.forecast.shape.NATIVE_ATTENTION", frozenset())
    shape = shape_of("deepseek-v2-lite")
    assert shape.expansion_weights == 512 * 16 * (128 + 128)
    assert shape_of("qwen3-30b-a3b").expansion_weights == 0
    for form, threads in (("bf16", 2), ("q4_0", 1)):
        short, long = (made("deepseek-v2-lite", 1.0, form=form, prompt=prompt) for prompt in (100, 1000))
        stored = shape.dense_in(FORMATS[form])
        rows = [SPEEDS.product(stored, shape.expansion_weights, count) for count in (128, 1024)]
        attention = 900 * shape.kv_nbytes_per_token / SPEEDS.memory_bandwidth
        more = shape.layers * (threads if stored == BF16 else 1) * (rows[1] - rows[0]) + attention
        assert long.decode.dense - short.decode.dense == pytest.approx(more)


def test_latents_meet_every_head_twice() -> None:
    """Native: two products with as many rows as heads, and a token's width is that of its latent."""
    shape = shape_of("deepseek-v2-lite")
    assert shape.native_attention and shape.kv_nbytes_per_token == 27 * (512 + 64) * 2
    assert shape.heads_width == 16 * (128 + 64 + 128) / 2
    assert shape_of("qwen3-30b-a3b").heads_width == 32 * 128
    short, long = (made("deepseek-v2-lite", 1.0, prompt=prompt) for prompt in (100, 1000))
    first, last = (27 * SPEEDS.product(BF16, count * (2 * 512 + 64), 16) for count in (100, 1000))
    assert long.decode.dense - short.decode.dense == pytest.approx(last - first)
    assert last - first > 900 * shape.kv_nbytes_per_token / SPEEDS.memory_bandwidth


def test_two_limits_are_named_where_neither_is_clear() -> None:
    def limits(disk: float, experts: float, rest: float, *others: dict[str, float]) -> tuple[str, ...]:
        return named.limits({"disk": disk, "experts": experts, "rest": rest}, others)

    assert limits(10, 3, 5) == ("disk",)
    assert limits(10, 3, 7.8) == ("disk",)
    assert limits(10, 3, 7.9) == ("disk", "rest")
    # Never three, and a part that is nothing is no limit.
    assert limits(9, 9.5, 10) == ("rest", "experts")
    assert limits(0, 0, 0) == ("disk",)
    # At one end of the disk's range the second is ahead.
    assert limits(10, 3, 7, {"disk": 6, "experts": 3, "rest": 7}) == ("disk", "rest")
    assert limits(10, 3, 7, {"disk": 8, "experts": 3, "rest": 7}) == ("disk",)
    assert named.agree(("disk",), ("disk", "rest"))
    assert named.agree(("rest", "disk"), ("disk",))
    assert not named.agree(("rest",), ("disk",))
    # That the run was nearly a tie does not make right whoever names anything.
    assert not named.agree(("experts", "rest"), ("disk", "rest"))
    assert made("mixtral-8x7b", 0.5).limits == ("disk",)


def test_between_measured_tokens_the_time_is_between() -> None:
    profile = made_profile(experts=expert_cells(0.05, 0.08, per_token=1.0))
    speeds = Speeds.of(profile, profile.disks[0])
    gb = 1e9 / 2
    # 1 and 64 tokens were measured; on logarithmic axes 8 lie in the middle. More than 64 grow with their number.
    assert speeds.expert(BF16, gb, 1, arriving=False) == pytest.approx(0.05)
    assert speeds.expert(BF16, gb, 8, arriving=False) == pytest.approx(0.05 * 8)
    assert speeds.expert(BF16, gb, 64, arriving=True) == pytest.approx(0.08 * 64)
    assert speeds.expert(BF16, gb, 256, arriving=True) == pytest.approx(0.08 * 256)


def test_only_slots_that_were_never_used_are_filled_slowly() -> None:
    """Reading 1 GB/s, half as fast into fresh memory; a cold prompt of 256 tokens touches all 8 x 32 experts."""
    slow = replace(PROFILE.disks[0], fresh=ReadSpeed(16 << 20, 4, exactly(0.5e9), exactly(1.0)))
    for share, fresh in ((1.0, 256), (0.5, 128), (0.25, 64)):
        quick, one = (
            made("mixtral-8x7b", share, prompt=256),
            made("mixtral-8x7b", share, Speeds.of(PROFILE, slow), prompt=256),
        )
        more = fresh * shape_of("mixtral-8x7b").expert_nbytes(BF16) / 1e9
        assert one.budget.slots == fresh
        assert one.prefill.disk - quick.prefill.disk == pytest.approx(more, rel=1e-6)
        # Neither a second prompt nor decoding pays for it.
        assert one.warm_ttft_s == quick.warm_ttft_s
        assert one.decode == quick.decode


def test_the_first_pass_is_paid_for_once() -> None:
    assert PROFILE.framework is not None
    slow = replace(PROFILE, framework=replace(PROFILE.framework, first_pass=0.25))
    one, quick = made("qwen3-30b-a3b", 0.5, Speeds.of(slow, slow.disks[0])), made("qwen3-30b-a3b", 0.5)
    assert one.ttft_s.value - quick.ttft_s.value == pytest.approx(0.25)
    assert one.warm_ttft_s == quick.warm_ttft_s


def test_a_cold_prompt_reads_every_expert_it_touches_once() -> None:
    """A few tokens: too little is certain to read ahead, each layer is waited for by itself."""
    one, shape = made("qwen3-30b-a3b", 0.25, prompt=16), shape_of("qwen3-30b-a3b")
    touched = 128 * (1 - (1 - 8 / 128) ** 16)
    assert touched < 0.75 * 128
    a_expert = one.prefill.experts / 48 / touched
    read = touched * shape.expert_nbytes(BF16) / 1e9
    assert read > touched * a_expert
    assert one.prefill.disk == pytest.approx(48 * (read + a_expert - touched * a_expert))
    assert one.warm_ttft_s.value < one.ttft_s.value


@pytest.mark.parametrize("share", [0.05, 0.25, 1.0])
def test_a_long_prompt_reads_ahead_as_far_as_slots_are_free(share: float) -> None:
    chunk = made("qwen3-30b-a3b", share).budget.prefill_chunk
    one, shape = made("qwen3-30b-a3b", share, prompt=chunk), shape_of("qwen3-30b-a3b")
    assert chunk == 1024
    touched = 128 * (1 - (1 - 8 / 128) ** chunk)
    computing = one.prefill.experts / 48
    a_expert = computing / touched
    read = touched * shape.expert_nbytes(BF16) / 1e9
    alone = 48 * (read + a_expert - computing)
    # All layers' reading beside all computing, but the last expert's and the first layer's dense part.
    layers = one.prefill.dense + 48 * 1e-3 * chunk / 256
    together = 48 * read + a_expert - 48 * computing - layers * 47 / 48
    assert 0 < together < alone
    lent = min((6144 - one.budget.slots) // 48 // 2, one.budget.slots // 8)
    ahead = max((8 + lent) / touched, 1 - touched / one.budget.slots)
    assert one.prefill.disk == pytest.approx(ahead * together + (1 - ahead) * alone)
    # A warm cache has fewer free slots to read ahead into, but saves reading, if only of few residents.
    assert one.warm_ttft_s.value <= one.ttft_s.value
    # A second chunk reads what is not resident, and has only the working set and what is lent to read ahead into.
    longer = made("qwen3-30b-a3b", share, prompt=2 * chunk)
    missing = touched * (1 - longer.budget.resident / 6144)
    second = 48 * max(0.0, missing * shape.expert_nbytes(BF16) / 1e9 + a_expert - computing)
    more = longer.prefill.disk - one.prefill.disk
    assert more <= second + 1e-9
    assert more >= (1 - (8 + lent) / missing) * second - 1e-9 if missing > 8 + lent else more == 0


def test_a_prompt_bound_by_computing_waits_only_for_its_first_layer() -> None:
    profile = made_profile(disk_bandwidth=1e12)
    assert made("mixtral-8x7b", 1.0, Speeds.of(profile, profile.disks[0]), prompt=256).prefill.disk == 0.0


def test_packed_models_keep_their_dense_part_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of("mixtral-8x7b")
    monkeypatch.setattr(native, "available", lambda: True)
    assert shape.dense_in(Q4) == shape.dense_in(Q8) == Q8
    assert shape.dense_in(BF16) == BF16
    assert shape.dense_nbytes(Q4) == Q8.nbytes(shape.dense_weights)
    quick = made("mixtral-8x7b", 1.0, form="q4_0")
    # Without the kernels they are decoded when they are loaded.
    monkeypatch.setattr(native, "available", lambda: False)
    assert shape.dense_in(Q4) == BF16
    slow = made("mixtral-8x7b", 1.0, form="q4_0")
    assert quick.decode.dense < slow.decode.dense
    assert quick.budget.lines[1].nbytes < slow.budget.lines[1].nbytes


def test_many_rows_are_bound_by_arithmetic() -> None:
    """The machine of the test serves 16 rows in the time of one."""
    matrix = 4096 * 4096
    assert SPEEDS.product(BF16, matrix, 16) == pytest.approx(SPEEDS.product(BF16, matrix, 1))
    assert SPEEDS.product(BF16, matrix, 256) == pytest.approx(16 * SPEEDS.product(BF16, matrix, 1))
    assert SPEEDS.product(BF16, matrix, 1024) == pytest.approx(64 * SPEEDS.product(BF16, matrix, 1))
    assert SPEEDS.arithmetic_rate() == pytest.approx(2 * 256 / 2 * 12e9 / 16)
    assert not SPEEDS.is_measured(Q4)
    # A format without a measured kernel: its bytes at its share of the bandwidth, and never faster than arithmetic.
    assert SPEEDS.product(Q8, matrix, 1) == pytest.approx(matrix * 8.5 / 8 / (0.9 * 20e9), rel=0.6)
    assert SPEEDS.product(Q8, matrix, 256) == pytest.approx(SPEEDS.product(BF16, matrix, 256))


def test_fewer_bits_are_faster_and_smaller() -> None:
    speeds = [made("mixtral-8x7b", 0.25, form=form).tokens_per_s.value for form in ("bf16", "q8_0", "q4_0")]
    assert speeds == sorted(speeds)
    assert speeds[2] > 2 * speeds[0]


@given(st.floats(0.02, 1), st.floats(0.02, 1), st.sampled_from(["mixtral-8x7b", "qwen3-30b-a3b"]))
def test_more_slots_never_make_it_slower(one: float, other: float, name: str) -> None:
    slow, fast = made(name, min(one, other)), made(name, max(one, other))
    assert slow.tokens_per_s.value <= fast.tokens_per_s.value * (1 + 1e-9)
    assert slow.warm_ttft_s.value >= fast.warm_ttft_s.value * (1 - 1e-9)


@given(st.floats(0.1, 10), st.floats(0.02, 1))
def test_ranges_hold_what_is_expected(gbps: float, share: float) -> None:
    profile = made_profile(disk_bandwidth=gbps * 1e9)
    shape = shape_of("deepseek-v2-lite", uniform=False)
    speeds = Speeds.of(profile, profile.disks[0])
    budget = plan_budget(shape, BF16, speeds, 1 << 50, 4096, experts=ExpertBudget(fraction=share))
    one = forecast(shape, BF16, speeds, budget, 300)
    for span in (one.tokens_per_s, one.ttft_s, one.warm_ttft_s):
        assert 0 < span.low < span.value < span.high
    assert 0 <= one.hit.low <= one.hit.value <= one.hit.high <= 1


def test_a_disk_that_cannot_keep_it_up_is_judged_by_what_it_keeps_up() -> None:
    disk = replace(PROFILE.disks[0], sustained=exactly(0.25e9))
    slow = made("mixtral-8x7b", 0.5, Speeds.of(PROFILE, disk))
    # Four times the reading, of which the same is hidden.
    assert 4 < slow.decode.disk / made("mixtral-8x7b", 0.5).decode.disk < 4.5


def test_a_disk_that_was_not_measured_is_assumed_in_a_wide_range() -> None:
    speeds = Speeds.of(PROFILE, None)
    span = speeds.read(1 << 20, 3)
    assert span.value == pytest.approx((3 << 20) / 0.5e9)
    assert span.high == pytest.approx(16 * span.low)
    one = made("mixtral-8x7b", 0.5, speeds)
    assert one.tokens_per_s.high > 4 * one.tokens_per_s.low
    assert made("mixtral-8x7b", 1.0, speeds).decode == made("mixtral-8x7b", 1.0).decode


def test_a_plan_uses_what_is_free_and_refuses_what_does_not_fit() -> None:
    shape = shape_of("mixtral-8x7b")
    budget = plan_budget(shape, BF16, SPEEDS, 20 * GIB, 4096)
    used = sum(line.nbytes for line in budget.lines)
    assert 0.97 * 20 * GIB < used <= 20 * GIB
    assert [line.name for line in budget.lines][1] == "dense weights"
    assert budget.lines[1].nbytes == shape.dense_nbytes(BF16)
    with pytest.raises(DoesNotFitError, match="dense part alone"):
        plan_budget(shape, BF16, SPEEDS, 2 * GIB, 4096)
    with pytest.raises(DoesNotFitError, match="smallest that works"):
        plan_budget(shape, BF16, SPEEDS, 20 * GIB, 4096, ram=4 * GIB)


def test_what_would_help_is_what_the_forecast_says_of_the_changed_machine() -> None:
    shape, usable = shape_of("mixtral-8x7b"), 20 * GIB
    now = forecast(shape, BF16, SPEEDS, plan_budget(shape, BF16, SPEEDS, usable, 4096), 1024)
    changes = what_would_help(shape, now, Resources(SPEEDS, usable, 4096), (Q8, Q4))
    assert [change.factor for change in changes] == sorted((c.factor for c in changes), reverse=True)
    by_name = {change.what: change for change in changes}
    budget = plan_budget(shape, BF16, SPEEDS, usable + 16 * GIB, 4096)
    more = forecast(shape, BF16, SPEEDS, budget, 1024).tokens_per_s.value
    assert by_name["+16 GB RAM"].tokens_per_s == pytest.approx(more)
    assert by_name["+16 GB RAM"].factor == pytest.approx(more / now.tokens_per_s.value)
    assert by_name["q4_0 instead of bf16"].factor > by_name["q8_0 instead of bf16"].factor > 1.5
    assert "a disk that reads 3.5 GB/s" in by_name
    resident = forecast(shape, BF16, SPEEDS, plan_budget(shape, BF16, SPEEDS, 200 * GIB, 4096), 1024)
    names = [c.what for c in what_would_help(shape, resident, Resources(SPEEDS, 200 * GIB, 4096), (Q8, Q4))]
    assert not any("RAM" in name or "disk" in name for name in names)


# Routing


def test_uniform_routing_hits_as_often_as_an_expert_is_resident() -> None:
    routing = Routing(64, 8)
    assert routing.hit(0.3).value == 0.3
    assert routing.touched(1).value == pytest.approx(8 / 64)
    assert routing.touched(100).value == pytest.approx(1 - (56 / 64) ** 100)


def test_the_table_is_sane_and_names_its_sources() -> None:
    table = recordings()
    assert len(table) >= 5
    for recording in table:
        rates = [rate for _, rate in recording.hit]
        assert rates == sorted(rates)
        assert all(0 < rate <= 1 for rate in rates)
        # Real routing is better to a cache than chance.
        assert all(rate > at for at, rate in recording.hit if at < 0.85)
        shares = [share for _, share in recording.touched]
        assert shares == sorted(shares)
        assert shares[0] == pytest.approx(recording.top_k / recording.experts, rel=0.02)


@pytest.mark.parametrize("name", bundled_configs())
def test_hit_rates_of_every_model_grow_with_residency(name: str) -> None:
    shape = shape_of(name, uniform=False)
    routing = routing_of(shape.experts, shape.top_k)
    rates = [routing.hit(share / 20).value for share in range(21)]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    assert 0.35 < routing.hit(0.25).value < 0.9
    touched = [routing.touched(tokens).value for tokens in (1, 4, 16, 64, 256, 1024)]
    assert touched == sorted(touched)


def test_a_recorded_shape_weighs_most() -> None:
    alike = Recording("a", 64, 6, ((0.25, 0.5), (0.5, 0.8)), ((1, 6 / 64), (64, 0.9)))
    other = Recording("b", 256, 8, ((0.25, 0.9), (0.5, 0.95)), ((1, 8 / 256), (64, 0.4)))
    from moei_core.forecast import routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "recordings", lambda: (alike, other))
        found = routing_of(64, 6)
    assert found.hit(0.25).value == pytest.approx(0.5, abs=0.01)
    assert found.hit(0.25).low < 0.5 < found.hit(0.25).high


def test_names_of_stored_types() -> None:
    assert stored_format("BF16") == "bf16"
    assert stored_format("F32") == "f32"
    assert stored_format("F64") == "bf16"
