"""Fixtures for all tests: an own home for moei, few threads, tiny model folders made once."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    # GPU kernels are interpreted, which must be said before they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test asserts a time, and other programs may share the processors.
settings.register_profile("moei", deadline=None)
settings.load_profile("moei")

# A runner in the background may have been started deaf to Ctrl-C, which its children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's cases marked ``sampled(n)``, about one in n stays with the quick tests; the others are slow ones."""
    known: set[str] = set()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None:
            continue
        name = item.nodeid.partition("[")[0]
        # By chance, or all would have the same value of some parameter; the first one always, so that none has no case.
        if name in known and zlib.crc32(item.nodeid.encode()) % marker.args[0]:
            item.add_marker(pytest.mark.slow)
        known.add(name)


@pytest.fixture(autouse=True)
def moei_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an empty ``$MOEI_HOME`` of its own."""
    home = tmp_path_factory.mktemp("moei-home")
    monkeypatch.setenv("MOEI_HOME", str(home))
    # Where a profile goes that no home takes.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    return home


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Tests share two cores: torch, where it has been imported, computes with one thread."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def a_gpu_only_where_it_is_asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not marked ``gpu`` tests the processor, also on a machine with a GPU."""
    import sys

    if "torch" in sys.modules and request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """chat_folder(family, dtype="float32"): a tiny model with a tokenizer, saved once per session. Read only."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, dtype: str = "float32") -> Path:
        if (family, dtype) not in made:
            import torch

            from tests.tiny_models import save_chat

            folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
            made[family, dtype] = save_chat(family, folder, getattr(torch, dtype), shard="200KB")
        return made[family, dtype]

    return get
