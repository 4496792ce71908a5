"""What a token costs beside reading weights: that it is measured in every setting, and reading left out of it."""

from __future__ import annotations

import numpy as np
import pytest

from moei_core.adapters.native_decode import NativeAttention
from moei_core.engine import calibrate
from moei_core.engine.calibrate import measure_framework
from moei_core.engine.loaded_model import LoadedModel
from moei_core.hub.resolve import bundled_folder
from moei_core.quant import native
from tests.core.stepped import SteppedClock

_SLOW_S = 0.02


class _SlowBuffer:
    """Memory that takes long to read, by a clock of its own. asked: words read, by reading."""

    itemsize = 8

    def __init__(self, nbytes: int, clock: SteppedClock) -> None:
        self._clock = clock
        self._words = nbytes // self.itemsize
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self._words

    def __getitem__(self, part: slice) -> np.ndarray:
        assert 0 <= part.start < part.stop <= self._words
        self.asked.append(part.stop - part.start)
        self._clock.nap(_SLOW_S)
        return np.zeros(1)


def test_reading_is_left_out_of_what_a_layer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[_SlowBuffer] = []
    natively: list[int] = []
    models: list[LoadedModel] = []
    measure = calibrate._measure

    # What it measures is a few looks at the clock long, so that a busy machine measures nothing else.
    clock = SteppedClock(monkeypatch, tick=1e-6)

    def made(nbytes: int) -> _SlowBuffer:
        buffers.append(_SlowBuffer(nbytes, clock))
        return buffers[-1]

    def watched(model: LoadedModel, *rest: object) -> object:
        models.append(model)
        natively.append(
            sum(isinstance(one.forward, NativeAttention) for one in model.adapter.model.modules())
        )
        return measure(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "make_buffer", made)
    monkeypatch.setattr(calibrate, "_measure", watched)
    monkeypatch.setattr(calibrate, "_LAYER_NBYTES", (0, 1 << 20, 4 << 20))
    monkeypatch.setattr(calibrate, "_WARM_UP", 1)
    cost = measure_framework(bundled_folder(), tokens=3)
    assert [one.nbytes for one in cost.layers] == [0, 1 << 20, 4 << 20]
    for one in cost.layers:
        assert 0 < one.native < _SLOW_S
        assert 0 < one.torch < _SLOW_S
    assert cost.token < _SLOW_S
    # Twice a layer, half each; in decoding with both kinds of attention, four tokens each, and in one prompt.
    (buffer,), layers = buffers, 4
    assert {size: buffer.asked.count(size) for size in (1 << 16, 1 << 18)} == {
        1 << 16: 2 * layers * 2 * 4,
        1 << 18: 2 * layers * (2 * 4 + 1),
    }
    # The model was measured as the engine runs it first, and is left without hooks.
    (model,) = models
    assert natively == [layers if native.available() else 0]
    assert model.runtime.before_access is None
    assert not any(isinstance(one.forward, NativeAttention) for one in model.adapter.model.modules())
