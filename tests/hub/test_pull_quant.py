"""``moei pull --quant``: downloaded, packed, and the source kept or dropped."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, hf_hub_download

from moei_core.errors import DoesNotFitError
from moei_core.hub.layout import RepoCache
from moei_core.hub.packed import packed_root
from moei_core.hub.pull import plan_pull, pull
from moei_core.hub.resolve import resolve_model
from moei_core.hub.transfer import SilentProgress, blob_lock
from moei_core.store.packed_manifest import read_manifest
from moei_core.types import ExpertKey
from tests.core.test_packed_exactness import stored_matrices
from tests.fp8_checkpoint import save_fp8
from tests.hub.conftest import REPO, Place
from tests.mxfp4_checkpoint import save_mxfp4


@pytest.fixture
def real(place: Place, chat_folder: Callable[..., Path]) -> dict[str, bytes]:
    """A model with weights that are numbers on the hub; its files."""
    folder = chat_folder("mixtral", "bfloat16")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    place.hub.add(REPO, files)
    return files


def test_pull_and_pack(place: Place, real: dict[str, bytes]) -> None:
    done = place.run("pull", REPO, "--quant", "q4_0")
    assert done.returncode == 0, done.stderr
    files = resolve_model(REPO)
    assert (files.name, files.folder) == (f"{REPO}:q4_0", Path(done.stdout.strip()))
    manifest = read_manifest(files.folder)
    source = manifest.source
    assert (source.kind, source.name, source.revision, source.commit) == ("hub", REPO, "main", files.revision)
    shards = {name: place.hub.sha256(real[name]) for name in real if name.endswith(".safetensors")}
    assert source.files == shards
    told = place.run("chat", REPO, "hello there", "--max-tokens", "3", "--temperature", "0", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["new_tokens"] <= 3 and json.loads(told.stdout)["model"] == f"{REPO}:q4_0"
    assert resolve_model(f"{REPO}:none").folder.parent.name == "snapshots"
    assert place.run("pull", REPO, "--quant", "none").returncode == 0
    assert resolve_model(REPO).format == ""
    again = place.run("pull", f"{REPO}:q4_0")
    assert again.returncode == 0 and resolve_model(REPO).format == "q4_0"


def test_what_is_published_in_mxfp4_is_packed_without_loss(place: Place, tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "gpt-oss")
    place.hub.add(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    for dry in ((), ("--dry-run",)):
        refused = place.run("pull", REPO, "--quant", "q4_0", *dry)
        assert refused.returncode == 1 and "lose accuracy" in refused.stderr
        assert not place.repo_folder().exists(), "it was downloaded in vain"
    done = place.run("pull", REPO, "--quant", "mxfp4", "--drop-source")
    assert done.returncode == 0, done.stderr
    files = resolve_model(REPO)
    assert (files.name, files.format) == (f"{REPO}:mxfp4", "mxfp4")
    key = ExpertKey(3, 15)
    ours, theirs = stored_matrices(files.folder, key), stored_matrices(folder, key)
    assert all(np.array_equal(ours[name], values) for name, values in theirs.items())
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(read_manifest(files.folder).nbytes / weights - 1) < 0.5


def test_what_is_published_in_fp8_runs_once_it_is_packed(place: Place, tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "fp8")
    place.hub.add(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    done = place.run("pull", REPO)
    assert done.returncode == 0, done.stderr
    assert f"moei pull {REPO} --quant q8_0" in done.stderr
    plan = plan_pull(REPO, cache_dir=place.cache, remote=place.remote(), packed_as="q8_0")
    assert plan.packed_nbytes == int(plan.total_nbytes * 8.5 / 8)
    done = place.run("pull", REPO, "--quant", "q8_0")
    assert done.returncode == 0, done.stderr
    assert "runs once it is packed" not in done.stderr
    told = place.run("chat", REPO, "hello there", "--max-tokens", "3", "--temperature", "0")
    assert told.returncode == 0, told.stderr


def test_what_is_not_mxfp4_is_not_downloaded_to_become_it(place: Place, real: dict[str, bytes]) -> None:
    refused = place.run("pull", REPO, "--quant", "mxfp4")
    assert refused.returncode == 1 and "Choose q8_0 or q4_0" in refused.stderr
    assert not place.repo_folder().exists()
    for option in ("--quant", "--revision"):
        assert place.run("pull", REPO, option, "").returncode == 2


def test_a_refused_rm_leaves_the_packed_store(place: Place, real: dict[str, bytes]) -> None:
    assert place.run("pull", REPO, "--quant", "q8_0").returncode == 0
    shard = next(name for name in real if name.endswith(".safetensors"))
    cache = RepoCache(place.cache, REPO)
    with blob_lock(cache, place.hub.sha256(real[shard]), threading.Event(), SilentProgress()):
        refused = place.run("rm", REPO)
    assert refused.returncode == 1 and "being downloaded" in refused.stderr
    assert resolve_model(REPO).format == "q8_0", "it was deleted all the same"
    assert place.run("rm", REPO).returncode == 0
    assert not packed_root().exists() and not place.repo_folder().exists()


def test_a_dropped_source_is_not_needed_again(place: Place, real: dict[str, bytes]) -> None:
    done = place.run("pull", REPO, "--quant", "q8_0", "--drop-source")
    assert done.returncode == 0, done.stderr
    assert not place.repo_folder().exists()
    files = resolve_model(REPO)
    assert files.format == "q8_0" and files.revision
    served = place.hub.served.total()
    again = place.run("pull", REPO, "--quant", "q8_0", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["folder"] == str(files.folder)
    assert place.hub.served.total() == served, "a packed model was downloaded again"
    shown = json.loads(place.run("show", REPO, "--json").stdout)["here"]
    assert [one["name"] for one in shown] == [f"{REPO}:q8_0"]
    assert place.run("rm", REPO).returncode == 0
    assert not packed_root().exists()
    assert place.run("rm", REPO).returncode == 3


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_death_while_the_source_is_dropped(
    place: Place, real: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The store is complete by then: it is used, and the same command drops the rest."""
    unlink, left = Path.unlink, [after]

    def dies(self: Path, missing_ok: bool = False) -> None:
        if self.is_relative_to(place.repo_folder()):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        # Downloading needs to remove files too, so it comes first.
        left[0] = 1 << 30
        assert place.run("pull", REPO).returncode == 0
        left[0] = after
        assert place.run("pull", REPO, "--quant", "q4_0", "--drop-source").returncode == 130
    assert place.repo_folder().exists()
    assert resolve_model(f"{REPO}:q4_0").format == "q4_0"
    again = place.run("pull", REPO, "--quant", "q4_0", "--drop-source")
    assert again.returncode == 0, again.stderr
    assert not list(place.repo_folder().rglob("*.safetensors"))
    assert resolve_model(REPO).format == "q4_0"


def test_offline_a_packed_model_is_enough(
    place: Place, real: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.run("pull", REPO, "--quant", "q8_0", "--drop-source").returncode == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = place.run("pull", REPO, "--quant", "q8_0")
    assert offline.returncode == 0 and "Offline" in offline.stderr
    assert place.run("pull", REPO, "--quant", "q4_0").returncode == 5
    assert place.run("pull", REPO).returncode == 5


def test_dropping_leaves_what_others_brought(place: Place, real: dict[str, bytes]) -> None:
    shard = next(name for name in real if name.endswith(".safetensors"))
    theirs = Path(hf_hub_download(REPO, shard, cache_dir=place.cache, endpoint=place.hub.url))
    done = place.run("pull", REPO, "--quant", "q8_0", "--drop-source")
    assert done.returncode == 0 and "another program" in done.stderr
    assert theirs.read_bytes() == real[shard]
    assert not (theirs.parent / "config.json").exists()
    assert resolve_model(REPO).format == "q8_0"


def test_the_room_for_packing_is_asked_for_before_any_byte(
    place: Place, real: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(len(content) for name, content in real.items() if name.endswith(".safetensors"))
    for module in ("moei_core.hub.pull", "moei_core.hub.pull_plan"):
        monkeypatch.setattr(f"{module}.free_space", lambda folder: int(total * 1.2))
    hub = place.remote()
    assert plan_pull(REPO, cache_dir=place.cache, remote=hub).fits
    plan = plan_pull(REPO, cache_dir=place.cache, remote=hub, packed_as="q8_0")
    with pytest.raises(DoesNotFitError, match="does not fit"):
        pull(plan, remote=hub)
    assert not place.repo_folder().exists()
    dry = place.run("pull", REPO, "--quant", "q8_0", "--dry-run")
    assert "does not fit" in dry.stdout and "packing" in dry.stdout


def test_an_interrupted_packing_goes_on_without_the_network(
    place: Place, real: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moei_core.store import packing

    original, calls = packing.transcode, []

    def interrupt(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(packing, "transcode", interrupt)
        stopped = place.run("pull", REPO, "--quant", "q4_0")
    assert stopped.returncode == 130 and "same command" in stopped.stderr
    assert resolve_model(REPO).format == ""
    assert place.run("quantize", REPO, "q4_0").returncode == 0
    assert resolve_model(REPO).format == "q4_0"
