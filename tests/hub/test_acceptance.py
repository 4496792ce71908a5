"""A gigabyte of Mixtral from a local hub, as a person would: pull, kill, pull, list, show, chat, rm."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.hub.conftest import Place

REPO = "acme/Mixtral-1GB-Instruct"

pytestmark = pytest.mark.slow


@pytest.fixture
def gigabyte(place: Place, tmp_path: Path) -> dict[str, bytes]:
    from tests.large_model import save_large

    folder = save_large(tmp_path / "published")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(map(len, files.values())) > 1e9
    assert len([name for name in files if name.startswith("model-0")]) > 2
    place.hub.add(REPO, files)
    return files


def test_the_whole_way(place: Place, gigabyte: dict[str, bytes]) -> None:
    place.hub.rate = 40_000_000
    first = place.start("pull", REPO)
    while place.hub.served.total() < 3e8:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before, place.hub.rate = place.hub.served.total(), 0

    again = place.command("pull", REPO)
    assert again.returncode == 0, again.stderr
    assert place.hub.served.total() - before < sum(map(len, gigabyte.values())) - 2e8, "nothing was resumed"
    for path in Path(again.stdout.strip()).iterdir():
        assert path.read_bytes() == gigabyte[path.name], path.name

    listed = place.command("list", "--json")
    assert REPO in listed.stdout
    shown = place.command("show", REPO)
    assert shown.returncode == 0
    assert "6 layers" in shown.stdout or "6 x 8" in shown.stdout
    answered = place.command(
        "chat", REPO, "Hello!", "--experts", "25%", "--max-tokens", "1", "--json", HF_HUB_OFFLINE="1"
    )
    assert answered.returncode == 0, answered.stderr
    report = json.loads(answered.stdout)
    assert report["new_tokens"] == 1
    assert report["misses"] > 0

    removed = place.command("rm", REPO, "--yes")
    assert removed.returncode == 0, removed.stderr
    assert not place.repo_folder(REPO).exists() or not list(place.repo_folder(REPO).glob("blobs/*"))
    assert REPO not in place.command("list", "--json").stdout
