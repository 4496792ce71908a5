"""What rm removes, and above all what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir

from moei_core.errors import (
    ModelNotFoundError,
    MoeiError,
    UsageError,
)
from moei_core.hub import registry
from moei_core.hub.layout import RepoCache
from moei_core.hub.library import describe
from moei_core.hub.removal import plan_removal, remove
from moei_core.hub.resolve import resolve_model
from moei_core.hub.transfer import SilentProgress, blob_lock
from tests.hub.checkpoints import mixtral, write_files
from tests.hub.conftest import REPO, Place

SHARD = "model-00001-of-00002.safetensors"
SHARD2 = "model-00002-of-00002.safetensors"


def rm(text: str, foreign: bool = False) -> int:
    return remove(plan_removal(text), foreign=foreign)


def test_rm_removes_everything_that_moei_brought(place: Place, tiny: dict[str, bytes]) -> None:
    place.pull()
    total = describe(REPO)[0].nbytes
    assert rm(REPO) == total
    assert not place.repo_folder().exists()
    assert not list(place.cache.rglob("*.lock"))
    assert not any(path.is_file() for path in place.home.rglob("*"))
    with pytest.raises(ModelNotFoundError):
        plan_removal(REPO)
    place.pull()


def test_rm_leaves_what_others_brought(place: Place, tiny: dict[str, bytes]) -> None:
    for name in ("README.md", SHARD):
        hf_hub_download(REPO, name, cache_dir=place.cache, endpoint=place.hub.url)
    folder = place.pull()
    removal = plan_removal(REPO)
    assert len(removal.foreign) == 2
    remove(removal)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", SHARD]
    assert (folder / SHARD).read_bytes() == tiny[SHARD]
    rm(REPO, foreign=True)
    assert not place.repo_folder().exists()


def test_rm_of_what_only_others_brought_asks(place: Place, tiny: dict[str, bytes]) -> None:
    for name in ("config.json", "model.safetensors.index.json", SHARD, SHARD2):
        hf_hub_download(REPO, name, cache_dir=place.cache, endpoint=place.hub.url)
    refused = place.run("rm", REPO)
    assert refused.returncode == 2 and "another program" in refused.stderr and "--yes" in refused.stderr
    assert resolve_model(REPO).folder.is_dir()
    done = place.run("rm", REPO, "--yes")
    assert done.returncode == 0, done.stderr
    assert not place.repo_folder().exists()


def test_rm_of_one_revision_keeps_shared_blobs(place: Place, tiny: dict[str, bytes]) -> None:
    first = place.pull()
    place.hub.repos[REPO].commit(dict(tiny) | {"config.json": tiny["config.json"] + b"\n"}, "v2")
    second = place.pull(revision="v2")
    rm(f"{REPO}@v2")
    assert not second.exists()
    assert (first / SHARD).read_bytes() == tiny[SHARD]
    assert resolve_model(REPO).folder == first
    assert RepoCache(place.cache, REPO).refs() == {"main": first.name}
    assert len(registry.owned(RepoCache(place.cache, REPO))) == 8
    rm(REPO)
    assert not place.repo_folder().exists()


def test_rm_of_a_partial_download(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(SHARD2, "truncate", times=1, at=20_000)
    place.hub.fail(SHARD2, "status", status=403, times=1)
    with pytest.raises(MoeiError):
        place.pull()
    assert list(place.repo_folder().glob("blobs/*.incomplete"))
    assert scan_cache_dir(place.cache).incomplete_files
    assert rm(REPO) > 20_000
    assert not place.repo_folder().exists()


@pytest.mark.parametrize("foreign", [False, True])
def test_a_link_that_leads_outside_is_not_followed(
    place: Place, tiny: dict[str, bytes], foreign: bool
) -> None:
    outside = place.root / "precious"
    outside.mkdir()
    (outside / "photo.jpg").write_bytes(b"memories")
    folder = place.pull()
    (folder / "photo.jpg").symlink_to(outside / "photo.jpg")
    (folder / "album").symlink_to(outside)
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(outside / "photo.jpg")
    removal = plan_removal(REPO)
    assert any("outside" in why for _, why in removal.kept)
    remove(removal, foreign=foreign)
    assert (outside / "photo.jpg").read_bytes() == b"memories"
    assert folder.exists() != foreign


def test_a_blobs_folder_that_leads_outside(place: Place, tiny: dict[str, bytes]) -> None:
    place.pull()
    outside = place.root / "outside"
    blobs = place.repo_folder() / "blobs"
    blobs.rename(outside)
    blobs.symlink_to(outside)
    before = sorted(path.name for path in outside.iterdir())
    remove(plan_removal(REPO), foreign=True)
    assert sorted(path.name for path in outside.iterdir()) == before


def test_a_tampered_record_deletes_nothing_outside(place: Place, tiny: dict[str, bytes]) -> None:
    place.pull()
    victim = place.root / "victim"
    victim.write_text("precious")
    (record,) = (place.home / "data" / "library").glob("*/main.json")
    content = json.loads(record.read_text())
    content["files"]["config.json"]["etag"] = "../../../../victim"
    record.write_text(json.dumps(content))
    (record.parent / "downloaded").write_text(f"../../../../victim {place.cache}\n")
    assert registry.records(REPO) == []
    remove(plan_removal(REPO), foreign=True)
    assert victim.read_text() == "precious"


def test_rm_during_a_pull_is_refused(place: Place, tiny: dict[str, bytes]) -> None:
    import threading

    place.pull()
    cache = RepoCache(place.cache, REPO)
    with (
        blob_lock(cache, place.hub.sha256(tiny[SHARD]), threading.Event(), SilentProgress()),
        pytest.raises(MoeiError, match="right now"),
    ):
        rm(REPO)
    assert resolve_model(REPO)


def test_folders_and_the_demo_are_not_removed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", mixtral())
    with pytest.raises(UsageError, match="did not make"):
        plan_removal(str(folder))
    with pytest.raises(UsageError, match="part of moei"):
        plan_removal("moei-demo")
    assert (folder / "config.json").is_file()
