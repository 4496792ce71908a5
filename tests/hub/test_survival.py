"""Kills, full disks, read-only caches and two pulls at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moei_core.errors import DoesNotFitError
from moei_core.hub import pull as pull_module
from moei_core.hub import registry
from moei_core.hub.layout import RepoCache
from tests.hub.checkpoints import mixtral
from tests.hub.conftest import REPO, Place

# What a kill may cost a file: what the server had sent and the client had not yet written.
_CHUNK = 2**20


def big_files(ffn: int = 1984) -> dict[str, bytes]:
    """Four shards of 6 MiB."""
    return mixtral(layers=2, experts=4, hidden=256, ffn=ffn, vocab=512, shards=4)


def assert_same(place: Place, folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        assert path.read_bytes() == files[path.name], path.name
    left = [path.name for path in place.repo_folder().glob("blobs/*") if "." in path.name]
    assert not left


def kill_and_resume(place: Place, kills: int, longest: float) -> tuple[int, int, int]:
    """Kill pulls at random moments. Returns kills, pulls that ended first, most bytes sent twice."""
    files = big_files()
    place.hub.add(REPO, files)
    random_moments = random.Random(20)
    place.hub.rate = 500_000
    killed = ended = 0
    while killed < kills and ended < 5:
        served = place.hub.served.total()
        process = place.start("pull", REPO)
        # Most kills come after the first byte, however long Python takes to start on a busy machine.
        anywhere = random_moments.random() < 0.2
        while not anywhere and place.hub.served.total() == served and process.poll() is None:
            time.sleep(0.01)
        try:
            process.communicate(timeout=random_moments.uniform(0.0, longest))
            ended += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
    place.hub.rate = 0
    done = place.command("pull", REPO)
    assert done.returncode == 0, done.stderr
    assert_same(place, Path(done.stdout.strip()), files)
    shards = [name for name in files if name.startswith("model-")]
    twice = {name: place.hub.served[name] - len(files[name]) for name in shards}
    assert min(twice.values()) >= 0
    assert max(twice.values()) <= killed * _CHUNK
    resumed = [headers["Range"] for name in shards for headers in place.hub.gets(name) if "Range" in headers]
    assert resumed, "no pull was killed inside a file: the test is void"
    print(f"killed {killed}, ended {ended}, resumed {len(resumed)} streams, bytes served twice: {twice}")
    return killed, ended, max(twice.values())


def test_five_kills(place: Place) -> None:
    killed, _, _ = kill_and_resume(place, 5, 0.8)
    assert killed == 5


@pytest.mark.slow
def test_fifty_kills(place: Place) -> None:
    killed, _, _ = kill_and_resume(place, 50, 0.8)
    assert killed == 50


@pytest.mark.parametrize(
    "moment",
    [
        "moei_core.hub.registry.own",
        "moei_core.hub.transfer.link",
        "moei_core.hub.transfer.blob_lock",
        "moei_core.hub.pull._write_ref",
        "moei_core.hub.pull._remove_leftovers",
    ],
)
def test_death_between_two_steps(place: Place, tiny: dict[str, bytes], moment: str) -> None:
    module, _, function = moment.rpartition(".")
    child = os.fork()
    if child == 0:
        setattr(sys.modules[module], function, lambda *args, **options: os._exit(9))
        try:
            place.pull()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not RepoCache(place.cache, REPO).refs()
    folder = place.pull()
    assert_same(place, folder, tiny)
    # Whatever was moved before the death is known as moei's, or it could not be removed.
    blobs = {path.name for path in place.repo_folder().glob("blobs/*")}
    assert registry.owned(RepoCache(place.cache, REPO)) == blobs


def test_ctrl_c_keeps_what_arrived(place: Place) -> None:
    files = big_files()
    place.hub.add(REPO, files)
    place.hub.rate = 400_000
    process = place.start("pull", REPO)
    shards = [name for name in files if name.startswith("model-")]
    while not all(place.hub.served[name] > 200_000 for name in shards):
        time.sleep(0.05)
        assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Interrupted" in err and "Traceback" not in err
    assert time.monotonic() - began < 5
    place.hub.rate = 0
    assert_same(place, place.pull(), files)
    assert sum(place.hub.served[name] - len(files[name]) for name in shards) <= 4 * _CHUNK


def test_two_pulls_at_once(place: Place) -> None:
    files = big_files(ffn=500)
    place.hub.add(REPO, files)
    place.hub.rate = 1_000_000
    pulls = [place.start("pull", REPO) for _ in range(2)]
    for process in pulls:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    assert_same(place, place.pull(), files)
    # The second waited for the first instead of downloading everything again.
    for name in files:
        if name.startswith("model-"):
            assert place.hub.served[name] == len(files[name])


def test_one_of_two_pulls_dies(place: Place) -> None:
    files = big_files(ffn=500)
    place.hub.add(REPO, files)
    place.hub.rate = 500_000
    first = place.start("pull", REPO)
    while not place.hub.served["model-00001-of-00004.safetensors"]:
        time.sleep(0.02)
    second = place.start("pull", REPO)
    time.sleep(1.0)
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=100)
    assert second.returncode == 0, err
    assert_same(place, place.pull(), files)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    where = tmp_path / "small-disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=False)


def test_a_disk_too_small_is_refused_before_any_byte(place: Place, small_disk: Path) -> None:
    place.hub.add(REPO, big_files())
    done = place.command("pull", REPO, HF_HOME=str(small_disk))
    assert done.returncode == 4, done.stderr
    assert len(done.stderr.strip().splitlines()) == 3
    assert "24.8 MiB are needed" in done.stderr and "MiB are free" in done.stderr
    assert not any(small_disk.iterdir())
    assert not [name for name in place.hub.served if name.startswith("model-")]


def test_a_disk_that_fills_up(place: Place, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = big_files()
    place.hub.add(REPO, files)
    place.cache = small_disk / "hub"
    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "check_space", lambda plan: None)
        with pytest.raises(DoesNotFitError, match="disk is full") as caught:
            place.pull()
    assert caught.value.exit_code == 4
    assert any(path.stat().st_size for path in place.repo_folder().glob("blobs/*.incomplete"))
    # Somebody makes room, and it goes on from there.
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    served = place.hub.served.copy()
    assert_same(place, place.pull(), files)
    again = sum((place.hub.served - served).values())
    assert again < sum(len(content) for content in files.values()) - 2 * 2**20


def test_a_read_only_cache(place: Place, tiny: dict[str, bytes]) -> None:
    """Reading needs no write: a complete model in a read-only cache is fine, a missing one is a sentence."""
    folder = place.pull()
    place.hub.add("tiny/other", mixtral(seed=3))
    before = subprocess.run(["mount", "--bind", str(place.cache), str(place.cache)], capture_output=True)
    if before.returncode != 0:
        pytest.skip("a bind mount is not possible here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place.cache)], check=True)
        with pytest.raises(OSError):
            (place.cache / "x").write_text("x")
        assert place.pull() == folder
        done = place.command("pull", "tiny/other")
        assert done.returncode == 1
        assert "cannot be written" in done.stderr and "HF_HOME" in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 4
    finally:
        subprocess.run(["umount", "-l", str(place.cache)], check=False)


def test_a_home_that_cannot_be_written(place: Place, tiny: dict[str, bytes]) -> None:
    place.home.parent.mkdir(exist_ok=True)
    place.home.write_text("a file where a folder should be")
    done = place.command("pull", REPO)
    assert done.returncode == 1
    assert "MOEI_HOME" in done.stderr and "Traceback" not in done.stderr
    assert not (place.repo_folder() / "refs").exists()
