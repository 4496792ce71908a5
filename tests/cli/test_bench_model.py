"""``moei bench MODEL`` and ``moei trace record``: the engine measured and recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moei_cli.bench_ablation import Comparison, Pair, Row, half_of, ladder
from moei_core.config import ExpertBudget
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.trace import Trace, read_trace, write_trace
from tests.cli.conftest import Outcome

Moei = Callable[..., Outcome]
SMALL = ("--prompt-tokens", "8", "--new-tokens", "6", "--repeats", "2")


def test_a_report_has_three_conditions_and_its_provenance(
    moei: Moei, chat_folder: Callable[..., Path]
) -> None:
    done = moei("bench", str(chat_folder("qwen3_moe")), "--experts", "50%", *SMALL, "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert [report["conditions"][name]["requests"] for name in ("cold", "warm", "changing")] == [1, 2, 2]
    cold, warm = report["conditions"]["cold"], report["conditions"]["warm"]
    assert cold["bytes_read"]["median"] >= warm["bytes_read"]["median"] > 0
    assert cold["misses"]["median"] * report["expert_bytes"] == cold["bytes_read"]["median"]
    assert report["slots"]["slots"] == 24
    assert report["provenance"]["torch"]
    shown = moei("bench", str(chat_folder("qwen3_moe")), "--experts", "50%", *SMALL)
    assert shown.code == 0
    assert "decode tok/s" in shown.out


def test_a_trace_that_does_not_fit_is_refused_before_gigabytes_are_made(
    moei: Moei, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object, **__: object) -> None:
        pytest.fail("made the model")

    monkeypatch.setattr("moei_core.hub.synthetic.make_synthetic", made)
    trace = str(make_trace(tmp_path / "t"))
    done = moei("bench", "--synthetic", "mixtral-8x7b", "--layers", "1", "--trace", trace)
    assert done.code == 2
    assert "does not fit this model" in done.err


def make_trace(path: Path, layers: int = 3, experts: int = 16, top_k: int = 4, tokens: int = 40) -> Path:
    generator = np.random.default_rng(0)
    rows = np.argsort(generator.random((tokens, layers, experts)), axis=2)[..., :top_k].astype(np.uint8)
    offsets = np.asarray([0, tokens], np.int64)
    write_trace(Trace("a-model", experts, top_k, tuple(range(layers)), rows, offsets), path)
    return path


def test_routing_can_follow_a_trace(moei: Moei, chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Every layer's lookups are those of the trace's rows: counted here by hand for an LRU of everything."""
    trace = make_trace(tmp_path / "t")
    folder = str(chat_folder("qwen3_moe"))
    done = moei("bench", folder, "--trace", str(trace), *SMALL, "--json")
    assert done.code == 0
    cold = json.loads(done.out)["conditions"]["cold"]
    # 8 prompt tokens are one access of a layer; 5 more are decoded (the last one is only sampled).
    rows = read_trace(trace).experts[:13]
    lookups = sum(len(np.unique(rows[:8, layer])) for layer in range(3)) + 5 * 3 * 4
    assert cold["hits"]["median"] + cold["misses"]["median"] == lookups
    assert cold["misses"]["median"] == sum(len(np.unique(rows[:, layer])) for layer in range(3))


@pytest.mark.parametrize(("hints", "waste"), [("1", 0.0), ("0.3", 0.1)])
def test_made_hints_are_followed(
    moei: Moei, chat_folder: Callable[..., Path], tmp_path: Path, hints: str, waste: float
) -> None:
    trace = make_trace(tmp_path / "t")
    given = ("--trace", str(trace), "--hints", hints, "--predictor", "router", "--prefetch", "on")
    done = moei("bench", str(chat_folder("qwen3_moe")), "--experts", "40%", *given, *SMALL, "--json")
    assert done.code == 0, done.err
    changing = json.loads(done.out)["conditions"]["changing"]
    assert changing["prefetch_coverage"]["median"] > 0
    assert (changing["prefetch_waste"]["median"] > waste) == (waste > 0)
    simulated = moei("bench", *given, "--experts", "40%", "--policy", "learned", "--json")
    assert simulated.code == 0, simulated.err
    prefetch = json.loads(simulated.out)["results"][0]["prefetch"]
    assert prefetch["started"] > 0 and (prefetch["waste"] > waste) == (waste > 0)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"experts": 8}, "Use a model of 8 experts a layer"),
        ({"layers": 2}, "at most 2 MoE layers"),
        ({"top_k": 6}, "chooses 6 experts a token, the model only 4"),
    ],
)
def test_a_trace_of_the_wrong_shape(
    moei: Moei, chat_folder: Callable[..., Path], tmp_path: Path, shape: dict[str, int], sentence: str
) -> None:
    trace = make_trace(tmp_path / "t", **shape)
    done = moei("bench", str(chat_folder("qwen3_moe")), "--trace", str(trace), *SMALL)
    assert done.code == 2
    assert sentence in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["moei-demo", "--hardware", "disk-1g"], "--hardware only simulates"),
        (["--trace", "t", "--repeats", "2"], "--repeats measures a model"),
        (["moei-demo", "--layers", "2"], "--layers cuts a --synthetic model"),
        (["moei-demo", "--synthetic", "mixtral-8x7b"], "not both"),
        (["moei-demo", "--new-tokens", "1"], "two new tokens"),
        (
            ["moei-demo", "--prompt-tokens", "100000"],
            "--prompt-tokens 100000 and --new-tokens 32 are out of range",
        ),
        (["moei-demo", "--ablation", "--new-tokens", "99999"], "--new-tokens 99999 are out of range"),
        (["moei-demo", "--context", "0"], "do not fit --context 0"),
        (["moei-demo", "--context", "15"], "do not fit --context 15"),
        (
            ["moei-demo", "--context", "15", "--prompt-tokens", "4", "--new-tokens", "4"],
            "--context 15 is out of range",
        ),
        (["moei-demo", "--ram", ""], "--ram has no value"),
        (["moei-demo", "--experts", ""], "--experts has no value"),
        (["--synthetic", "olmoe-1b-7b", "--layers", "1", "--quant", "mxfp4"], "does not round to MXFP4"),
        (["moei-demo", "--policy", "all"], "no cache policy 'all'"),
        (["moei-demo", "--hints", "0.8"], "--hints are made for a --trace"),
        (["moei-demo", "--trace", "t", "--hints", "0.8"], "--predictor router or default"),
        (["--trace", "t", "--hints", "80", "--predictor", "router"], "between 0 and 1"),
    ],
)
def test_mistakes(moei: Moei, arguments: list[str], sentence: str) -> None:
    done = moei("bench", *arguments)
    assert done.code == 2
    assert sentence in done.err


def test_recording_a_file_of_questions(moei: Moei, tmp_path: Path) -> None:
    (tmp_path / "q").write_text("What does moei do?\nAnd what is an expert?\n\nHello!\n")
    done = moei("trace", "record", "moei-demo", "--prompts", str(tmp_path / "q"), "-o", str(tmp_path / "t"))
    assert done.code == 0
    trace = read_trace(tmp_path / "t")
    assert (trace.sequences, len(trace.requests) - 1) == (2, 3)
    assert trace.phase is not None
    assert 0 < int((trace.phase == 0).sum()) < trace.tokens
    assert moei("trace", "show", str(tmp_path / "t")).code == 0
    empty = moei("trace", "record", "moei-demo", "--prompts", "/dev/null", "-o", str(tmp_path / "t"))
    assert empty.code == 2


@pytest.mark.parametrize("command", ["record", "train"])
def test_what_is_read_is_never_written_over(moei: Moei, tmp_path: Path, command: str) -> None:
    names = {"record": ["q"], "train": ["t", "t.hidden.safetensors"]}[command]
    for name in names:
        (tmp_path / name).write_text("Hello!")
    (tmp_path / "link").symlink_to(tmp_path / names[0])
    for name in (*names, "link"):
        read = (
            ["moei-demo", "--prompts", str(tmp_path / "q")] if command == "record" else [str(tmp_path / "t")]
        )
        done = moei("trace", command, *read, "-o", str(tmp_path / name))
        assert (done.code, done.out) == (2, "")
        assert "it would be replaced" in done.err
    assert [(tmp_path / name).read_text() for name in names] == ["Hello!"] * len(names)


def test_a_trace_does_not_take_the_place_of_a_device(moei: Moei, tmp_path: Path) -> None:
    (tmp_path / "q").write_text("Hello!")
    os.mkfifo(tmp_path / "pipe")
    done = moei(
        "trace", "record", "moei-demo", "--prompts", str(tmp_path / "q"), "-o", str(tmp_path / "pipe")
    )
    assert done.code == 2
    assert "is a device, not a file" in done.err
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("tokens", [10**12, 10**21, 10**40])
def test_more_layer_inputs_than_memory_are_refused(moei: Moei, tmp_path: Path, tokens: int) -> None:
    (tmp_path / "q").write_text("Hello!")
    asked = ["--prompts", str(tmp_path / "q"), "-o", str(tmp_path / "t"), "--hidden", str(tokens)]
    done = moei("trace", "record", "moei-demo", *asked)
    assert done.code == 4
    assert "do not fit into memory" in done.err


@pytest.mark.parametrize("option", ["--ram", "--experts"])
def test_recording_never_takes_an_empty_bound_for_none(moei: Moei, tmp_path: Path, option: str) -> None:
    (tmp_path / "q").write_text("Hello!")
    asked = ["--prompts", str(tmp_path / "q"), "-o", str(tmp_path / "t")]
    done = moei("trace", "record", "moei-demo", *asked, option, "")
    assert done.code == 2
    assert f"{option}: '' is not a size" in done.err


def test_what_was_recorded_is_kept_when_a_conversation_outgrows_its_context(
    moei: Moei, tmp_path: Path
) -> None:
    (tmp_path / "q").write_text("What does moei do?\n" + "long " * 6000)
    arguments = ("trace", "record", "moei-demo", "--prompts", str(tmp_path / "q"), "-o")
    done = moei(*arguments, str(tmp_path / "t"))
    assert done.code == 2
    assert "longer than its context" in done.err
    assert len(read_trace(tmp_path / "t").requests) - 1 == 1
    early = moei(*arguments, str(tmp_path / "nowhere" / "t"))
    assert (early.code, "cannot be written" in early.err) == (2, True)


def test_a_predictor_is_recorded_for_trained_and_used(moei: Moei, tmp_path: Path) -> None:
    questions = "\n\n".join(f"What is {word}?" for word in ("moei", "an expert", "a router", "a cache"))
    (tmp_path / "q").write_text(questions)
    trace, predictor = str(tmp_path / "t.safetensors"), str(tmp_path / "p.safetensors")
    recorded = moei(
        "trace", "record", "moei-demo", "--prompts", str(tmp_path / "q"), "-o", trace,
        "--hidden", "400", "--max-tokens", "40", "--predictor", "router",
    )  # fmt: skip
    assert recorded.code == 0, recorded.err
    assert "the layer inputs of" in recorded.err
    trained = moei("trace", "train", trace, "-o", predictor, "--json")
    assert trained.code == 0, trained.err
    report = json.loads(trained.out)
    assert report["recall"] > 2 * report["chance"]
    answer = moei(
        "chat", "moei-demo", "What is moei?", "--predictor", predictor, "--prefetch", "on", "--json",
        "--max-tokens", "4",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["new_tokens"] == 4
    refused = moei("chat", "moei-demo", "Hi", "--predictor", "oracle")
    assert refused.code == 2 and "Choose from" in refused.err
    without = moei("trace", "train", str(tmp_path / "q"), "-o", predictor)
    assert without.code == 6


def test_each_row_of_the_ablation_is_compared_with_one_before_it() -> None:
    """And prefetches only where the controller says so, but for the two rows that show what that is worth."""
    rows = ladder("markov")
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for at, row in enumerate(rows):
        assert row.base in names[:at] if at else row.base == ""
    assert [row.name for row in rows if row.always] == ["prefetch always", "noise always"]
    by_name = {row.name: row for row in rows}
    for row in rows[1:]:
        base = by_name[row.base]
        parts = [
            getattr(row, part) != getattr(base, part) for part in ("policy", "predictor", "overlap", "always")
        ]
        assert sum(parts) == (2 if row.always else 1), row.name


@pytest.mark.slow
def test_rows_and_their_bases_answer_the_same_with_as_many_slots(
    moei: Moei, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = []
    in_turns = Comparison.in_turns

    def watched(self: Comparison, own: LoadedModel, base: LoadedModel) -> Any:
        slots.append((own.budget.slots, base.budget.slots))
        return in_turns(self, own, base)

    monkeypatch.setattr(Comparison, "in_turns", watched)
    arguments = ("--prompt-tokens", "8", "--new-tokens", "18", "--repeats", "2", "--experts", "25%", "--json")
    done = moei("bench", "moei-demo", "--ablation", *arguments)
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(done.out)["rows"]}
    assert list(rows) == [row.name for row in ladder("mixed")]
    assert slots == [(32, 32)] * 22
    on_demand, lru, learned = (rows[name] for name in ("on demand, no cache", "+ LRU", "+ policy learned"))
    assert on_demand["ratio"] is None and on_demand["hit_rate"] == 0
    assert learned["hit_rate"] > 0.5 and lru["hit_rate"] > 0.5
    assert on_demand["bytes_per_token"] > 2 * lru["bytes_per_token"] > 0
    for name in list(rows)[1:]:
        assert rows[name]["ratio"] > 0 and len(rows[name]["ratio_quartiles"]) == 2
    # Hits depend on no clock while nothing is prefetched: both times that this engine was measured.
    assert rows["without prefetch"]["hit_rate"] == learned["hit_rate"]


@pytest.mark.parametrize(
    ("asked", "ram"),
    [
        (LoadOptions(ram=8 << 30), 4 << 30),
        (LoadOptions(ram=8 << 30, experts=ExpertBudget(fraction=0.5)), 4 << 30),
        (LoadOptions(experts=ExpertBudget(fraction=0.5)), None),
        (LoadOptions(), (1 << 30) + (9 << 30)),
    ],
)
def test_two_engines_share_what_one_would_have(
    asked: LoadOptions, ram: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moei_core.hardware.memory.available_memory", lambda: 20 << 30)
    monkeypatch.setattr("moei_core.hardware.memory.resident_memory", lambda: 1 << 30)
    half = half_of(asked)
    assert (half.ram, half.experts) == (ram, asked.experts)


def test_two_engines_that_do_not_fit_say_that_they_are_two(moei: Moei) -> None:
    done = moei("bench", "moei-demo", "--ablation", "--ram", "600MiB")
    assert done.code == 4
    assert "two engines in memory at a time, and each gets half" in done.err
    done = moei("bench", "moei-demo", "--ablation", "--experts", "1%")
    assert done.code == 4
    assert "two engines in memory at a time. One token uses" in done.err


def test_the_order_of_loading_does_not_count() -> None:
    """The first one loaded is a tenth slower here, in both orders."""
    pair = Pair(ladder("mixed")[1], ratios=[[1.2 / 1.1] * 9, [1.2 * 1.1] * 5])
    assert pair.ratio == pytest.approx(1.2)
    assert Pair(pair.row, ratios=[[1.0, 3.0, 2.0]]).ratio == 2.0


@pytest.mark.parametrize(("calls", "pairs"), [(9, 4), (2, 1), (1, 0)])
def test_an_interrupted_ablation_shows_what_it_has_compared(
    calls: int, pairs: int, moei: Moei, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    request = SimpleNamespace(
        decode_tokens_per_s=2.0, decode_stall_share=0.5, decode_hit_rate=0.5, decode_bytes_read=100,
        token_s=[1.0] * 10, ttft_s=1.0,
    )  # fmt: skip

    def in_turns(*_: object) -> object:
        measured.append(None)
        if len(measured) > calls:
            raise KeyboardInterrupt
        return request, request, [1.0, 1.5, 1.25]

    @contextmanager
    def loaded(_: Comparison, order: tuple[Row, Row]) -> Iterator[dict[str, None]]:
        yield dict.fromkeys(row.name for row in order)

    monkeypatch.setattr(Comparison, "in_turns", in_turns)
    monkeypatch.setattr(Comparison, "loaded", loaded)
    done = moei("bench", "moei-demo", "--ablation", "--json")
    assert done.code == 130
    if not pairs:
        assert done.out == ""
        return
    assert f"Interrupted: {pairs} of 11 comparisons." in done.err
    rows = json.loads(done.out)["rows"]
    assert [row["name"] for row in rows] == [row.name for row in ladder("mixed")][: pairs + 1]
    assert rows[1]["ratio"] == 1.25 and rows[1]["bytes_per_token"] == 10
    assert moei("bench", "moei-demo", "--ablation", "--repeats", "0").code == 2
