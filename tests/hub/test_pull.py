"""Pulling through the real huggingface_hub from a hub on loopback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from moei_core.errors import (
    DamagedFileError,
    DoesNotFitError,
    ModelNotFoundError,
    MoeiError,
    OfflineError,
    UnsupportedModelError,
)
from moei_core.hub import pull as pull_module
from moei_core.hub import registry
from moei_core.hub.layout import RepoCache
from moei_core.hub.pull import plan_pull, pull
from moei_core.hub.resolve import resolve_model
from tests.hub.checkpoints import mixtral
from tests.hub.conftest import REPO, Place

SHARD = "model-00001-of-00002.safetensors"
SHARD2 = "model-00002-of-00002.safetensors"
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    SHARD,
    SHARD2,
}


def assert_complete(folder: Path, files: dict[str, bytes]) -> None:
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert there == {name: files[name] for name in NEEDED}


def partials(place: Place) -> list[str]:
    return [path.name for path in place.repo_folder().glob("blobs/*") if "incomplete" in path.name]


def test_a_pull_brings_what_is_needed_and_other_tools_find_it(place: Place, tiny: dict[str, bytes]) -> None:
    folder = place.pull()
    assert_complete(folder, tiny)
    assert Path(snapshot_download(REPO, cache_dir=place.cache, local_files_only=True)) == folder
    found = resolve_model(REPO)
    assert (found.name, found.folder, found.source) == (REPO, folder, "hub")
    assert all(path.is_symlink() for path in folder.iterdir())
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(folder).num_local_experts == 4
    # Second copies of the weights and the README were never asked for.
    assert {name for name, count in place.hub.served.items() if count} == NEEDED


def test_pulling_again_downloads_nothing(place: Place, tiny: dict[str, bytes]) -> None:
    place.pull()
    before = place.hub.served.copy()
    place.pull()
    again = place.hub.served - before
    assert set(again) <= {"config.json", "model.safetensors.index.json"}


def test_a_single_file_model(place: Place) -> None:
    files = mixtral(shards=1)
    place.hub.add(REPO, files)
    folder = place.pull()
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not (folder / "consolidated.safetensors").exists()


def test_the_branch_is_named_last(
    place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(plan: pull_module.PullPlan) -> None:
        assert not plan.cache.refs()
        seen.append(sorted(path.name for path in plan.folder.iterdir()))

    monkeypatch.setattr(pull_module, "_write_ref", spy)
    place.pull()
    assert seen == [sorted(NEEDED)]


def test_a_revision(place: Place, tiny: dict[str, bytes]) -> None:
    other = mixtral(seed=5)
    commit = place.hub.repos[REPO].commit(other, "v2/beta")
    folder = place.pull(revision="v2/beta")
    assert folder.name == commit
    assert_complete(folder, other)
    assert resolve_model(f"{REPO}@v2/beta").folder == folder
    with pytest.raises(ModelNotFoundError, match="no revision 'v3'"):
        place.pull(revision="v3")


def test_dry_run_writes_nothing(place: Place, tiny: dict[str, bytes]) -> None:
    plan = plan_pull(REPO, cache_dir=place.cache, remote=place.remote())
    assert {file.name for file in plan.files} == NEEDED
    assert plan.needed_nbytes == plan.total_nbytes == sum(len(tiny[name]) for name in NEEDED)
    assert plan.licence == "apache-2.0"
    assert not place.cache.exists() and not place.home.exists()


def test_a_truncated_stream_is_resumed(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(SHARD, "truncate", times=3)
    assert_complete(place.pull(), tiny)
    ranges = [headers.get("Range") for headers in place.hub.gets(SHARD)]
    assert len(ranges) == 4 and ranges[0] is None and all(ranges[1:])
    assert place.hub.served[SHARD] == len(tiny[SHARD])


def test_a_partial_file_is_resumed_by_range(place: Place, tiny: dict[str, bytes]) -> None:
    plan = plan_pull(REPO, cache_dir=place.cache, remote=place.remote())
    etag = next(file.etag for file in plan.files if file.name == SHARD)
    partial = plan.cache.partial(etag)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(tiny[SHARD][:10_000])
    assert_complete(place.pull(), tiny)
    assert place.hub.gets(SHARD)[0]["Range"] == "bytes=10000-"
    assert place.hub.served[SHARD] == len(tiny[SHARD]) - 10_000
    assert not partials(place)


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range"])
def test_a_server_that_mistreats_ranges(place: Place, tiny: dict[str, bytes], kind: str) -> None:
    place.hub.fail(SHARD, "truncate")
    place.hub.fail(SHARD, kind)
    assert_complete(place.pull(), tiny)
    assert not place.progress.notes, "found out by the range and not by the checksum"


def test_a_partial_file_that_is_whole_or_too_long(place: Place, tiny: dict[str, bytes]) -> None:
    plan = plan_pull(REPO, cache_dir=place.cache, remote=place.remote())
    etags = {file.name: file.etag for file in plan.files}
    plan.cache.blob("x").parent.mkdir(parents=True)
    plan.cache.partial(etags[SHARD]).write_bytes(tiny[SHARD])
    plan.cache.partial(etags[SHARD2]).write_bytes(tiny[SHARD2] + b"more")
    assert_complete(place.pull(), tiny)
    assert place.hub.served[SHARD] == 0
    assert place.hub.served[SHARD2] == len(tiny[SHARD2])


@pytest.mark.parametrize("name", [SHARD, "generation_config.json"])
def test_a_corrupted_file_is_fetched_once_more(place: Place, tiny: dict[str, bytes], name: str) -> None:
    place.hub.fail(name, "corrupt")
    assert_complete(place.pull(), tiny)
    assert len(place.hub.gets(name)) == 2
    assert place.progress.notes == [f"{name} arrived damaged; downloading it again."]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_corrupted_file_that_planning_reads(place: Place, tiny: dict[str, bytes], name: str) -> None:
    place.hub.fail(name, "corrupt")
    assert_complete(place.pull(), tiny)
    place.hub.fail(name, "corrupt", times=2)
    with pytest.raises(DamagedFileError, match="twice"):
        place.pull()


def test_a_file_corrupted_twice_is_damaged_and_deleted(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(SHARD, "corrupt", times=2)
    with pytest.raises(DamagedFileError) as caught:
        place.pull()
    assert caught.value.exit_code == 6 and SHARD in caught.value.what
    etag = place.hub.sha256(tiny[SHARD])
    assert not list(place.repo_folder().glob(f"blobs/{etag}*"))
    assert RepoCache(place.cache, REPO).commit_of(None) is None or not RepoCache(place.cache, REPO).refs()
    assert_complete(place.pull(), tiny)


def test_a_corrupted_partial_file_is_found_out(place: Place, tiny: dict[str, bytes]) -> None:
    plan = plan_pull(REPO, cache_dir=place.cache, remote=place.remote())
    etag = next(file.etag for file in plan.files if file.name == SHARD)
    plan.cache.blob("x").parent.mkdir(parents=True)
    plan.cache.partial(etag).write_bytes(bytes(1000))
    assert_complete(place.pull(), tiny)


def test_a_file_that_changed_between_attempts_starts_again(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(SHARD, "status", status=403)
    with pytest.raises(MoeiError):
        place.pull(connections=1)
    plan = plan_pull(REPO, cache_dir=place.cache, remote=place.remote())
    old = next(file.etag for file in plan.files if file.name == SHARD)
    plan.cache.partial(old).write_bytes(tiny[SHARD][:5000])
    new_files = mixtral(seed=77)
    place.hub.add(REPO, new_files)
    assert_complete(place.pull(), new_files)
    # The leftover of the superseded pull is gone.
    assert not partials(place)
    assert place.hub.gets(SHARD)[-1].get("Range") is None


def test_an_etag_that_changes_after_planning(place: Place, tiny: dict[str, bytes]) -> None:
    """A mirror that serves other bytes for the same commit: what the file's own etag says counts."""
    remote = place.remote()
    plan = plan_pull(REPO, cache_dir=place.cache, remote=remote)
    commit = plan.commit
    changed = dict(tiny) | {SHARD: mixtral(seed=9)[SHARD]}
    place.hub.repos[REPO].files[commit] = changed
    folder = pull(plan, remote=remote)
    assert (folder / SHARD).read_bytes() == changed[SHARD]


@pytest.mark.parametrize("on", ["api", "head", "get"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(place: Place, tiny: dict[str, bytes], on: str, status: int) -> None:
    place.hub.fail(REPO if on == "api" else SHARD, "status", on=on, status=status, times=2)
    assert_complete(place.pull(), tiny)


def test_retry_after_is_honoured(
    place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    remote = place.remote()
    monkeypatch.setattr(remote.stop, "wait", lambda seconds: waits.append(seconds))
    place.hub.fail(REPO, "status", on="api", status=429, headers={"Retry-After": "7"})
    place.hub.fail(REPO, "status", on="api", status=429, headers={"RateLimit": '"api";r=0;t=41'})
    place.hub.fail(REPO, "status", on="api", status=503)
    plan_pull(REPO, cache_dir=place.cache, remote=remote)
    # A connection that the machine dropped in between is one more short wait, and no fault of ours.
    assert [seconds for seconds in waits if seconds >= 1] == [7.0, 42.0] and waits[-1] < 1
    assert any("7 s" in note for note in place.notes)


def test_a_wait_beyond_patience_ends_the_pull(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(REPO, "status", on="api", status=429, headers={"Retry-After": "4000"})
    with pytest.raises(MoeiError, match="429"):
        place.pull()


def test_a_hub_that_stays_broken(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(SHARD, "status", status=502, times=100)
    with pytest.raises(MoeiError, match="502") as caught:
        place.pull()
    assert caught.value.exit_code == 1
    place.hub.faults.clear()
    assert_complete(place.pull(), tiny)


def test_a_connection_that_is_dropped(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(SHARD, "drop", times=2)
    assert_complete(place.pull(), tiny)
    place.hub.fail(REPO, "drop", on="api", times=100)
    with pytest.raises(MoeiError):
        place.pull(revision="other")


def test_a_missing_model(place: Place) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        place.pull("no/body")
    assert caught.value.exit_code == 3
    assert "HF_TOKEN" in caught.value.hint and "No token" in caught.value.why


def test_a_gated_model(place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    place.hub.repos[REPO].gated = True
    with pytest.raises(ModelNotFoundError, match="gated") as caught:
        place.pull()
    assert "No token" in caught.value.why and f"{place.hub.url}/{REPO}" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(ModelNotFoundError, match="not been granted"):
        place.pull()
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    place.hub.granted.add("hf_friend")
    assert_complete(place.pull(), tiny)
    # The token went to the hub and never to the other host.
    assert not place.hub.tokens_at_cdn


def test_a_refused_token(place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(ModelNotFoundError, match="Invalid credentials"):
        place.pull()


def test_no_room(place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "free_space", lambda folder: 1000)
    with pytest.raises(DoesNotFitError, match="1000 B are free") as caught:
        place.pull()
    assert caught.value.exit_code == 4
    assert not place.cache.exists() and not place.hub.served[SHARD]


def test_offline_without_the_files(
    place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE") as caught:
        place.pull()
    assert caught.value.exit_code == 5
    assert not place.hub.requests


def test_offline_with_the_files(
    place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.pull()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert place.pull() == folder
    (folder / SHARD).unlink()
    with pytest.raises(OfflineError, match=SHARD):
        place.pull()


def test_no_network(place: Place, tiny: dict[str, bytes]) -> None:
    folder = place.pull()
    url = place.hub.url
    place.hub.url = "http://127.0.0.1:9"
    assert place.pull() == folder
    with pytest.raises(OfflineError, match="cannot be reached"):
        place.pull("tiny/other")
    place.hub.url = url


def test_a_dense_model_is_pulled_with_a_warning(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.add("some/dense", dict(tiny) | {"config.json": b'{"model_type": "llama"}'})
    done = place.run("pull", "some/dense")
    assert done.returncode == 0 and "does not look like a Mixture-of-Experts model" in done.stderr
    assert "does not look" not in place.run("pull", REPO).stderr


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "mixtral", "quantization_config": {"quant_method": "awq"}}, "quantised with awq"),
        ({"model_type": "of_tomorrow"}, "architecture 'of_tomorrow' is not part of transformers"),
    ],
)
def test_what_cannot_run_is_not_downloaded(
    config: dict[str, object], why: str, place: Place, tiny: dict[str, bytes]
) -> None:
    place.hub.add("some/other", dict(tiny) | {"config.json": json.dumps(config).encode()})
    done = place.run("pull", "some/other")
    assert done.returncode == 1
    assert why in done.stderr
    assert not list(place.cache.rglob("*.safetensors"))


def test_unsuitable_repositories(place: Place) -> None:
    place.hub.add("a/gguf", {"x.gguf": b"GGUF"})
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        place.pull("a/gguf")
    place.hub.add("a/bin", {"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(UnsupportedModelError, match="no safetensors"):
        place.pull("a/bin")


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/x.safetensors", "a\\b.safetensors"])
def test_an_index_that_leads_outside(place: Place, tiny: dict[str, bytes], name: str) -> None:
    files = dict(tiny) | {"model.safetensors.index.json": json.dumps({"weight_map": {"x": name}}).encode()}
    files[name] = b"evil"
    place.hub.add(REPO, files)
    with pytest.raises(DamagedFileError):
        place.pull()


def test_an_index_that_names_an_absent_file(place: Place, tiny: dict[str, bytes]) -> None:
    files = {name: content for name, content in tiny.items() if name != SHARD}
    place.hub.add(REPO, files)
    with pytest.raises(DamagedFileError, match=SHARD):
        place.pull()


def test_a_planted_link_is_not_written_through(place: Place, tiny: dict[str, bytes]) -> None:
    victim = place.root / "victim"
    victim.write_text("precious")
    plan = plan_pull(REPO, cache_dir=place.cache, remote=place.remote())
    etag = next(file.etag for file in plan.files if file.name == SHARD)
    plan.cache.blob("x").parent.mkdir(parents=True)
    plan.cache.partial(etag).symlink_to(victim)
    with pytest.raises(MoeiError):
        place.pull()
    assert victim.read_text() == "precious"


def test_what_moei_downloaded_is_known(place: Place, tiny: dict[str, bytes]) -> None:
    for name in ("config.json", SHARD):
        hf_hub_download(REPO, name, cache_dir=place.cache, endpoint=place.hub.url)
    place.pull()
    cache = RepoCache(place.cache, REPO)
    ours = registry.owned(cache)
    assert place.hub.sha256(tiny[SHARD2]) in ours
    assert place.hub.sha256(tiny[SHARD]) not in ours
    assert place.hub.served[SHARD] == len(tiny[SHARD])


def test_leftovers_of_dead_pulls_go_after_a_day(place: Place, tiny: dict[str, bytes]) -> None:
    cache = RepoCache(place.cache, REPO)
    old, young = cache.partial("a" * 64), cache.partial("b" * 64)
    old.parent.mkdir(parents=True)
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    place.pull()
    assert not old.exists() and young.exists()
