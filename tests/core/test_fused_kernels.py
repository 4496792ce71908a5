"""The GPU's kernels in the engine: interpreted, on the stand-in for a GPU."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget
from moei_core.engine.devices import CpuDevice
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.token_experts import TokenExperts
from tests.core import test_exactness
from tests.core.test_tiers import COSTS, cpu_device, ours
from tests.packed import pack_folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["BF16", "Q4_0"])
def test_fused_kernels_in_the_engine(
    form: str, tmp_path: Path, chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted, which is slow, so for a few steps and single tokens. They give what torch gives, and E1 holds:
    the kernel is chosen by the access alone."""
    kernels = pytest.importorskip("moei_core.quant.triton_kernels", reason="triton is not installed")
    if not kernels.usable(torch.zeros(1)):
        pytest.skip("triton compiles here, and interprets only where there is no GPU")
    folder = chat_folder("mixtral", "bfloat16")
    if form != "BF16":
        pack_folder(folder, tmp_path / "packed", form, "rows16")
        folder = tmp_path / "packed"
    monkeypatch.setattr(test_exactness, "STEPS", 2)
    half = ExpertBudget(fraction=0.5)
    plain, tokens, _ = ours(cpu_device, folder, "float32", 1, "copy", half)
    calls: list[int] = []

    class Counted:
        FEW_TOKENS, PAIR_STARTS, ALIGNED = 1, kernels.PAIR_STARTS, kernels.ALIGNED
        takes, decode = staticmethod(kernels.takes), staticmethod(kernels.decode)
        sum_rows = staticmethod(kernels.sum_rows)

        @staticmethod
        def few_rows(*arguments: object) -> object:
            calls.append(1)
            return kernels.few_rows(*arguments)

    recorded, place = [], TokenExperts.place
    monkeypatch.setattr(TokenExperts, "place", lambda *given: place(*given) or recorded.append(1))
    runs = [
        ours(lambda: CpuDevice(kernels=Counted), folder, "float32", share, "copy", half, tokens)[0]
        for share in (1, 0.3)
    ]
    assert len(calls) > 12, "more than warming up takes"
    assert len(recorded) >= 2 * 3, "each layer of each token, where all experts are on the device"
    assert torch.equal(*runs)
    monkeypatch.setattr(TokenExperts, "takes", lambda *_: False)
    launched, *_ = ours(lambda: CpuDevice(kernels=Counted), folder, "float32", 1, "copy", half, tokens)
    assert torch.equal(launched, runs[0])
    assert (runs[0] - plain).abs().max() < 1e-4 * plain.std()


@pytest.mark.slow
def test_experts_that_begin_at_other_places_in_their_slots(
    tmp_path: Path, chat_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored alike but in files with headers of other lengths, some at odd multiples of eight bytes."""
    kernels = pytest.importorskip("moei_core.quant.triton_kernels", reason="triton is not installed")
    if not kernels.usable(torch.zeros(1)):
        pytest.skip("triton compiles here, and interprets only where there is no GPU")
    source, folder = chat_folder("mixtral", "bfloat16"), tmp_path / "three-files"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(3)]
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            expert = re.search(r"experts\.(\d+)\.", name)
            files[int(expert[1]) % 3 if expert else 0][name] = tensor
    names = {name: f"{number}.safetensors" for number, tensors in enumerate(files) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"{number}.safetensors", {"pad": "x" * 8 * number})
    store = TransformersAdapter(folder).open_store()
    places = {store.layout(key).parts[0].slot_offset for key in store.experts()}
    store.close()
    assert len(places) > len({place % 16 for place in places}) == 2, "the case that is meant"
    monkeypatch.setattr(test_exactness, "STEPS", 2)
    half = ExpertBudget(fraction=0.5)
    plain, tokens, _ = ours(cpu_device, source, "float32", 1, "copy", half)
    fused = [
        ours(lambda: CpuDevice(kernels=kernels), folder, "float32", share, "copy", half, tokens)[0]
        for share in (1, 0.3)
    ]
    assert torch.equal(*fused)
    assert (fused[0] - plain).abs().max() < 1e-4 * plain.std()

    class Spy:
        seen: ClassVar[set[object]] = set()

        def __getattr__(self, name: str) -> object:
            return getattr(kernels, name)

        def few_rows(self, *arguments: object) -> object:
            self.seen.add(arguments[-1])
            return kernels.few_rows(*arguments)

        def sum_rows(self, rows: torch.Tensor, per_token: int, totals: torch.Tensor) -> object:
            self.seen.add(per_token)
            return kernels.sum_rows(rows, per_token, totals)

    with LoadedModel(folder, LoadOptions(dtype="float32"), CpuDevice(kernels=Spy()), COSTS) as loaded:
        wide = loaded.spec.num_experts_per_tok
        assert Spy.seen == {True, False, wide}, "what an answer needs is compiled before it"
