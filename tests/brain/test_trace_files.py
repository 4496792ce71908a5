"""Trace files: what is written is read; what is damaged is refused with a sentence, never a traceback."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moei_core.config import PREFILL_CHUNK
from moei_core.errors import DamagedFileError, ModelNotFoundError, MoeiError, UsageError
from moei_core.sim.replay import passes
from moei_core.trace import Trace, TraceEvent, TraceWriter, read_trace, write_trace
from moei_core.trace.format import find_problem
from moei_core.trace.summary import layer_summaries, overlap_by_lag, request_matrix
from moei_core.types import ExpertKey, Phase, ScoredExpert

from .synthetic import make_trace

TRACE = make_trace(sequences=3, length=8)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "t.safetensors"
    write_trace(TRACE, path)
    return path


def test_what_is_written_is_read(written: Path) -> None:
    trace = read_trace(written)
    np.testing.assert_array_equal(trace.experts, TRACE.experts)
    assert isinstance(trace.experts.base, np.memmap) or isinstance(trace.experts, np.memmap)
    assert trace.moe_layers == TRACE.moe_layers
    assert trace.sequence_tasks == TRACE.sequence_tasks
    assert [p.name for p in written.parent.iterdir()] == [written.name], "no temporary file is left"


def test_others_may_read_what_the_umask_lets_them(written: Path) -> None:
    plain = written.with_name("plain")
    plain.touch()
    assert written.stat().st_mode == plain.stat().st_mode
    assert [path.name for path in written.parent.iterdir() if "part" in path.name] == []


def test_subsets_are_traces_of_their_own() -> None:
    first, second = TRACE.subset(0, 1), TRACE.subset(1, TRACE.sequences)
    assert (first.sequences, second.sequences) == (1, 2)
    np.testing.assert_array_equal(second.experts, TRACE.experts[8:])
    assert second.sequence_offsets.tolist() == [0, 8, 16]
    with pytest.raises(UsageError):
        TRACE.subset(2, 2)


def test_other_requests_from_the_same_tokens() -> None:
    """A prompt that is two passes of the engine's, a reply, and a reply alone; the tokens start over at the end."""
    made = TRACE.as_requests([(PREFILL_CHUNK + 3, 2), (0, 3)], start=5)
    assert made.tokens == PREFILL_CHUNK + 8
    np.testing.assert_array_equal(
        made.experts, TRACE.experts[(5 + np.arange(PREFILL_CHUNK + 8)) % TRACE.tokens]
    )
    assert made.sequence_offsets.tolist() == [0, PREFILL_CHUNK + 5, PREFILL_CHUNK + 8]
    assert np.diff(made.passes).tolist() == [PREFILL_CHUNK, 3, 1, 1, 1, 1, 1]
    assert made.phase is not None
    assert made.phase.tolist() == [int(Phase.PREFILL)] * (PREFILL_CHUNK + 3) + [int(Phase.DECODE)] * 5
    assert find_problem(made) is None
    np.testing.assert_array_equal(TRACE.as_requests([(2, 4)], start=3).experts, TRACE.experts[3:9])


def _rewrite(path: Path, metadata: dict[str, str] | None = None, **tensors: np.ndarray | None) -> None:
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    values = {**load_file(path), **tensors}
    save_file(
        {name: value for name, value in values.items() if value is not None},
        path,
        {**header["__metadata__"], **(metadata or {})},
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"metadata": {"format": "x"}}, "not a moei trace"),
        ({"metadata": {"version": "2"}}, "version '2'"),
        ({"metadata": {"num_experts": "many"}}, "metadata"),
        ({"metadata": {"num_experts": "3"}}, "names an expert above 2"),
        ({"metadata": {"num_experts": "1" + 30 * "0"}}, "too many"),
        ({"metadata": {"num_experts": "1000000"}}, "too many"),
        ({"metadata": {"num_experts_per_tok": "200"}}, "too many"),
        ({"metadata": {"moe_layers": "[Infinity]"}}, "cannot be understood"),
        ({"metadata": {"moe_layers": 100_000 * "["}}, "cannot be understood"),
        ({"metadata": {"moe_layers": "[1, 2]"}}, "shape"),
        ({"metadata": {"moe_layers": "[4, 3, 2, 1]"}}, "ascending"),
        ({"metadata": {"sequence_tasks": '["a"]'}}, "sequence_tasks"),
        ({"experts": np.zeros((24, 4, 2), np.uint8)}, "twice"),
        ({"experts": np.zeros((24, 4, 3), np.int64)}, "type int64"),
        ({"experts": None}, "missing"),
        ({"sequence_offsets": np.array([0, 9, 8, 24])}, "ascend"),
        ({"sequence_offsets": np.array([0, 25])}, "ascend"),
        ({"phase": np.full(24, 7, np.uint8)}, "phase"),
        ({"pass_offsets": np.array([0, 5, 24])}, "middle of a forward pass"),
        ({"request_offsets": np.array([0, 9, 24])}, "middle of a request"),
        ({"weights": np.zeros((24, 4, 2), np.float16)}, "weights"),
        ({"hints_experts": np.zeros((24, 4, 2), np.uint8)}, "together"),
        ({"events": np.array([[5, 1, 0, 0], [4, 1, 0, 0]])}, "out of order"),
        ({"events": np.array([[5, 99, 0, 0]])}, "unknown kind"),
    ],
)
def test_every_flaw_has_its_sentence(written: Path, change: dict[str, object], sentence: str) -> None:
    _rewrite(written, **change)  # type: ignore[arg-type]
    with pytest.raises(DamagedFileError, match=sentence):
        read_trace(written)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_trace(tmp_path / "none")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_escape_as_anything_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    write_trace(TRACE, path)
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        trace = read_trace(path)
    except MoeiError as error:
        assert len(error.lines()) <= 3
    else:
        assert sum(len(one.accesses) for one in passes(trace)) > 0


def test_a_recording_is_read_as_it_happened(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    writer = TraceWriter(path, "demo", {1: 6, 3: 6}, 2, hints=2)
    hint = ScoredExpert(ExpertKey(3, 4), 0.5)
    for _ in range(2):
        writer.begin_sequence()
        writer.begin_request()
        writer.begin_pass(Phase.PREFILL, 3)
        for layer in (1, 3):
            writer.record(layer, np.array([[0, 1], [1, 2], [5, 6]]))
        writer.begin_pass(Phase.DECODE, 1)
        writer.record(1, np.array([[3, 2]]))
        writer.record_hints(1, (hint,))
        writer.event(TraceEvent.START_LOAD, 3, 4)
        writer.record(3, np.array([[4, 0]]))
    assert writer.close()
    trace = read_trace(path)
    assert trace.sequence_offsets.tolist() == [0, 4, 8]
    assert trace.passes.tolist() == [0, 3, 4, 7, 8]
    assert trace.phase is not None and trace.phase.tolist() == [0, 0, 0, 1] * 2
    prefill, decode, *_ = passes(trace)
    assert prefill.accesses[0].experts == (0, 1, 2, 5)
    assert prefill.accesses[0].token_counts == (1, 2, 1, 1)
    assert decode.accesses[0].experts == (2, 3)
    assert [(h.key, h.score) for h in decode.accesses[0].hints] == [(hint.key, 0.5)]
    assert trace.events is not None and trace.events[0].tolist() == [5, TraceEvent.START_LOAD, 3, 4]


def test_a_narrower_layer_keeps_its_sign_for_no_expert(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "r", "demo", {0: 8, 1: 4}, 2)
    writer.begin_pass(Phase.DECODE, 1)
    writer.record(0, np.array([[7, 4]]))
    writer.record(1, np.array([[3, 4]]))
    assert writer.trace().experts.tolist() == [[[7, 4], [3, 8]]]


def test_hints_are_read_where_they_arose(tmp_path: Path) -> None:
    """From one and from two layers before; a hint beyond the columns of its distance is dropped."""
    path = tmp_path / "r.safetensors"
    writer = TraceWriter(path, "demo", {0: 6, 1: 6, 4: 6}, 1, hints=2, hint_distances=(1, 2))
    hints = {
        0: ((1, 5, 0.5), (4, 3, 0.25), (4, 2, 0.125), (4, 1, 0.0625)),
        1: ((4, 0, 1.0),),
    }
    writer.begin_pass(Phase.DECODE, 1)
    for layer in (0, 1, 4):
        given = tuple(ScoredExpert(ExpertKey(to, e), score) for to, e, score in hints.get(layer, ()))
        writer.record(layer, np.array([[0]]))
        writer.record_hints(layer, given)
    assert writer.close()
    (one,) = passes(read_trace(path))
    kept = [[(h.key.layer, h.key.expert, h.score) for h in access.hints] for access in one.accesses]
    assert kept == [[*hints[0][:3]], [*hints[1]], []]
    _rewrite(path, {"hint_distances": "[1]"})
    with pytest.raises(DamagedFileError, match="hint_distances"):
        read_trace(path)


def test_an_empty_recording_leaves_no_file(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "r", "demo", {0: 4}, 2)
    writer.begin_request()
    assert not writer.close()
    assert not (tmp_path / "r").exists()


def test_an_invalid_trace_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_trace(replace(TRACE, num_experts=2), tmp_path / "t")


def test_summaries_of_a_trace_worked_out_by_hand() -> None:
    experts = np.array([[[0, 1]], [[0, 1]], [[0, 2]], [[0, 2]]], np.uint8)
    trace = Trace("hand", 4, 2, (0,), experts, np.array([0, 4], np.int64))
    assert overlap_by_lag(trace)[1] == pytest.approx((2 + 1 + 2) / 6)
    (layer,) = layer_summaries(trace)
    assert layer.top_quarter == 0.5
    assert layer.touched == 3
    assert layer.reuse == pytest.approx(5 / 8)
    assert request_matrix(trace, 0).tolist() == [[4, 2, 2, 0]]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", "a-model", {0: 8}, 2)
    writer.begin_pass(Phase.DECODE, 1)
    writer.record(0, np.array([[1, 2]]))
    # The library writes past the end of what this process may write.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(MoeiError, match="cannot be written"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
