"""Sizes as people write them, and the arithmetic of slots."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moei_core.config import ExpertBudget, GenerationSettings, format_size, parse_size
from moei_core.errors import DoesNotFitError, UsageError
from moei_core.hardware.budget import (
    LEAST_RING,
    MemoryUse,
    plan_device_slots,
    plan_slots,
    prefill_chunk,
    workspace_nbytes,
)
from moei_core.types import ModelSpec

MIB = 1 << 20
SPEC = ModelSpec("test", dict.fromkeys(range(4), 32), 4, 128, dict.fromkeys(range(4), 3 * MIB))
SLOT = 3 * MIB + 8192
CONFIG = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "vocab_size": 151936,
}  # fmt: skip
USE = MemoryUse(process=400 * MIB, kv=20 * MIB, workspace=30 * MIB)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("8G", 8 * 10**9), ("600MiB", 600 * MIB), ("1.5 gib", 3 << 29), ("12345", 12345),
     ("2TB", 2 * 10**12), (" 7kb ", 7000), (".5GiB", 1 << 29)],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "8GG", "-1GiB", "eight", "8 GiB extra", "1e9", "0x10", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--ram"):
        parse_size(text, "--ram")


@given(st.integers(0, 2**45))
def test_formatted_sizes_are_near_the_truth(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.06)


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UsageError):
        ExpertBudget.parse(text)


def test_shares_count_whole_experts() -> None:
    assert ExpertBudget.parse("25%").slots(128, SLOT) == 32
    assert ExpertBudget.parse("100%").slots(128, SLOT) == 128
    assert ExpertBudget.parse("33.3%").slots(128, SLOT) == 42
    assert ExpertBudget.parse("1GiB").slots(128, SLOT) == 128
    assert ExpertBudget.parse("30MiB").slots(128, SLOT) == 9


def test_with_neither_flag_free_memory_decides() -> None:
    assert plan_slots(SPEC, SLOT, USE, available=100 << 30).slots == 128
    tight = plan_slots(SPEC, SLOT, USE, available=200 * MIB)
    assert tight.slots == (180 - 50) * MIB // SLOT
    assert "free memory" in tight.reason
    with pytest.raises(DoesNotFitError):
        plan_slots(SPEC, SLOT, USE, available=60 * MIB)


def test_the_smaller_of_two_bounds_counts_and_says_so() -> None:
    share = ExpertBudget.parse("25%")
    assert plan_slots(SPEC, SLOT, USE, 0, ram=8 << 30, experts=share).slots == 32
    both = plan_slots(SPEC, SLOT, USE, 0, ram=USE.total + 10 * SLOT, experts=share)
    assert both.slots == 10
    assert "--ram" in both.reason


def test_all_experts_need_no_working_set() -> None:
    everything = plan_slots(SPEC, SLOT, USE, 0, experts=ExpertBudget.parse("100%"))
    assert (everything.slots, everything.resident) == (128, 128)
    part = plan_slots(SPEC, SLOT, USE, 0, experts=ExpertBudget.parse("25%"))
    assert (part.slots, part.working, part.resident) == (32, 4, 28)


@given(st.integers(1, 2000))
def test_a_refusal_names_a_size_that_works_and_is_nearly_the_smallest(ram_mib: int) -> None:
    try:
        budget = plan_slots(SPEC, SLOT, USE, 0, ram=ram_mib * MIB)
    except DoesNotFitError as error:
        smallest = parse_size(re.search(r"--ram (\S+?)\.$", error.hint)[1])  # type: ignore[index]
        assert smallest > ram_mib * MIB
        assert plan_slots(SPEC, SLOT, USE, 0, ram=smallest).slots >= 4
        with pytest.raises(DoesNotFitError):
            plan_slots(SPEC, SLOT, USE, 0, ram=int(smallest * 0.95))
    else:
        assert budget.slots >= 4
        assert budget.nbytes + USE.total <= ram_mib * MIB or budget.slots == 128


@given(st.floats(0.01, 3.2))
def test_too_small_a_share_names_one_that_works(percent: float) -> None:
    budget = ExpertBudget.parse(f"{percent}%")
    if budget.slots(128, SLOT) >= 4:
        return
    with pytest.raises(DoesNotFitError) as caught:
        plan_slots(SPEC, SLOT, USE, 0, experts=budget)
    share = re.search(r"--experts (\S+)", caught.value.hint)[1]  # type: ignore[index]
    assert plan_slots(SPEC, SLOT, USE, 0, experts=ExpertBudget.parse(share)).slots >= 4


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
        ({"top_k": -1}, "top-k"),
        ({"top_k": 1.5}, "top-k"),
        ({"min_p": 1}, "min-p"),
        ({"max_new_tokens": 0}, "at least 1 token"),
        ({"repetition_penalty": 0}, "repetition penalty"),
        ({"stop": ("",)}, "stop string"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        GenerationSettings(**wrong)  # type: ignore[arg-type]


@given(
    st.integers(0, 1 << 34),
    st.integers(0, 1 << 32),
    st.integers(0, 1 << 30),
    st.integers(0, 1 << 36),
    st.one_of(st.none(), st.integers(1, 1 << 36)),
    st.one_of(st.none(), st.floats(0.01, 100)),
)
def test_the_account_adds_up(
    process: int, kv: int, workspace: int, available: int, ram: int | None, percent: float | None
) -> None:
    """Whatever was asked: the lines are whole, never negative, and stay within what may be held."""
    use = MemoryUse(process, kv, workspace, dense=process // 2, context=4096)
    experts = None if percent is None else ExpertBudget.parse(f"{percent:.4f}%")
    try:
        budget = plan_slots(SPEC, SLOT, use, available, ram, experts)
    except DoesNotFitError as error:
        assert error.smallest_slots == SPEC.num_experts_per_tok
        return
    lines = {line.name: line for line in budget.lines}
    assert list(lines) == ["runtime", "dense weights", "context", "workspace", "margin", "expert slots"]
    assert all(line.nbytes >= 0 and line.reason for line in budget.lines)
    assert lines["runtime"].nbytes + lines["dense weights"].nbytes == process
    assert lines["expert slots"].nbytes == budget.nbytes
    assert budget.working <= budget.slots <= SPEC.total_experts
    assert 0 <= budget.resident <= budget.slots
    if budget.limit is not None:
        assert sum(line.nbytes for line in budget.lines) <= budget.limit
        assert budget.limit == (ram if ram is not None else process + available)
    if experts is not None:
        assert budget.slots <= experts.slots(SPEC.total_experts, SLOT)


@given(st.integers(0, 1 << 36), st.integers(0, 1 << 36))
def test_more_memory_never_means_fewer_slots(one: int, other: int) -> None:
    def slots(available: int) -> int:
        try:
            return plan_slots(SPEC, SLOT, USE, available).slots
        except DoesNotFitError:
            return 0

    assert slots(min(one, other)) <= slots(max(one, other))


def test_a_device_budget_accounts_for_every_byte_of_the_limit() -> None:
    budget = plan_device_slots(128, SLOT, 500 * MIB, 100 * MIB, 50 * MIB, free=8000 * MIB, vram=1000 * MIB)
    used = sum(line.nbytes for line in budget.lines)
    assert used <= 1000 * MIB < used + SLOT
    assert budget.slots == budget.resident + LEAST_RING and budget.nbytes == budget.slots * SLOT
    assert "--vram 1000 MiB" in budget.reason
    free = plan_device_slots(128, SLOT, 500 * MIB, 100 * MIB, 50 * MIB, free=1000 * MIB)
    assert free.slots == budget.slots and "free GPU memory" in free.reason
    everything = plan_device_slots(128, SLOT, 500 * MIB, 100 * MIB, 50 * MIB, free=8000 * MIB)
    assert everything.resident == 128 and everything.reason == "all 128 routed experts fit"


@pytest.mark.parametrize(
    ("slots", "ring"), [(2, 2), (9, 2), (40, 5), (64, 8), (129, 8), (130, 2), (134, 6), (200, 8)]
)
def test_a_token_s_experts_pass_through_a_ring_that_leaves_most_slots_to_residents(
    slots: int, ring: int
) -> None:
    margin = (256 << 20) + 500 * MIB // 50
    budget = plan_device_slots(128, SLOT, 500 * MIB, 0, 0, free=500 * MIB + margin + slots * SLOT, top_k=8)
    assert budget.slots == min(slots, 136) and budget.slots - budget.resident == ring
    assert f"{ring} for those in passing" in budget.lines[-1].reason


def test_a_device_that_is_too_small_names_the_smallest_that_works() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan_device_slots(128, SLOT, 500 * MIB, 100 * MIB, 50 * MIB, free=8000 * MIB, vram=600 * MIB)
    named = re.search(r"--vram (\S+?);", caught.value.hint)
    assert named is not None
    smallest = parse_size(named.group(1))
    assert (
        plan_device_slots(128, SLOT, 500 * MIB, 100 * MIB, 50 * MIB, 8000 * MIB, smallest).slots >= LEAST_RING
    )
    with pytest.raises(DoesNotFitError, match="Free GPU memory"):
        plan_device_slots(128, SLOT, 500 * MIB, 100 * MIB, 50 * MIB, free=600 * MIB)


def test_a_prompt_goes_in_as_few_passes_as_half_a_gib_serves() -> None:
    """Of the shape and the context alone. Scores that are held, or wide layers, make it shorter, down to 256."""
    assert prefill_chunk(CONFIG, 8, 4096, 2, False) == 1024
    assert prefill_chunk({**CONFIG, "hidden_size": 512}, 8, 4096, 2, False) == 2048
    assert prefill_chunk(CONFIG, 8, 4096, 2, True) == 256
    assert prefill_chunk({**CONFIG, "hidden_size": 1 << 17}, 8, 4096, 2, False) == 256
    # Nobody needs room for more tokens than a conversation can have.
    assert prefill_chunk(CONFIG, 8, 200, 2, False) == 256
    assert prefill_chunk(CONFIG, 8, 300, 2, False) == 512
    for context in (300, 4096, 32768):
        chunk = prefill_chunk(CONFIG, 8, context, 2, False)
        beside = 3 * CONFIG["vocab_size"] * 4 + 7
        assert workspace_nbytes(CONFIG, 8, context, 2, 7, False) - beside <= 512 << 20
        assert chunk == 256 or chunk < 2 * context
