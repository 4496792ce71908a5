"""Names, list, show and rm."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from moei_core.errors import (
    DamagedFileError,
    ModelNotFoundError,
    MoeiError,
    UnsupportedModelError,
)
from moei_core.hub.aliases import aliases, find_alias, near_matches
from moei_core.hub.layout import RepoCache, is_repo_id, is_safe_name, read_weight_map
from moei_core.hub.library import describe, list_models
from moei_core.hub.resolve import parse_name, resolve_model
from moei_core.hub.summary import summarize
from tests.hub.checkpoints import mixtral, safetensors_bytes, write_files
from tests.hub.conftest import REPO, Place

SHARD = "model-00001-of-00002.safetensors"
SHARD2 = "model-00002-of-00002.safetensors"


# Names ----------------------------------------------------------------------------------------------------


def test_aliases_are_sound() -> None:
    assert len(aliases()) >= 15
    for alias in aliases().values():
        assert is_repo_id(alias.repo) and alias.licence
        assert alias.top_k < alias.experts and alias.layers > 0 and alias.gb > 1 and alias.context >= 4096
        assert alias.format in ("bf16", "fp8", "mxfp4")
    assert find_alias("Mixtral-8x7B") is aliases()["mixtral-8x7b"]
    assert find_alias("openai/gpt-oss-20b") is aliases()["gpt-oss-20b"]
    assert len({alias.repo for alias in aliases().values()}) == len(aliases())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("mixtral", "mixtral-8x7b"),
        ("mixtrel-8x7b", "mixtral-8x7b"),
        ("olmo-1b-7b", "olmoe-1b-7b"),
        ("gpt-os-20b", "gpt-oss-20b"),
        ("moei-dmo", "moei-demo"),
    ],
)
def test_near_matches(typed: str, meant: str) -> None:
    assert near_matches(typed, ["moei-demo"])[0] == meant
    with pytest.raises(ModelNotFoundError, match=f"Did you mean {meant}"):
        parse_name(typed)


def test_a_name_like_nothing_lists_what_is_known() -> None:
    with pytest.raises(ModelNotFoundError, match="Known names: mixtral-8x7b"):
        parse_name("xyzzy")


@pytest.mark.parametrize(
    "text", ["", " ", "a/b/c", "../x/y", "a/..", "a b/c", "x@y", "a/b@../../c", "é/b", "-/-", "a--b/c"]
)
def test_bad_names_are_sentences(text: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        parse_name(text)
    assert caught.value.exit_code == 3


def test_gguf_of_the_hub_is_refused_for_now() -> None:
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        parse_name("owner/repo:Q4_K_M")


def test_a_folder(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", mixtral())
    found = resolve_model(str(folder))
    assert (found.folder, found.source) == (folder, "folder")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve_model(str(folder))
    with pytest.raises(ModelNotFoundError, match="not a folder"):
        resolve_model("./no/such/folder")


def test_a_model_that_is_not_here(place: Place, tiny: dict[str, bytes]) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("mixtral-8x7b")
    assert caught.value.hint == "Download it with: moei pull mistralai/Mixtral-8x7B-Instruct-v0.1"
    folder = place.pull()
    (folder / SHARD).unlink()
    with pytest.raises(ModelNotFoundError, match="only partly") as caught:
        resolve_model(REPO)
    assert f"moei pull {REPO}" in caught.value.hint


def test_the_bundled_model_by_name() -> None:
    assert parse_name("moei-demo").kind == "bundled"


@pytest.mark.parametrize("name", ["", "/x", "a/../b", "..", "./a", "a//b", "a\\b", "a\0b"])
def test_unsafe_file_names(name: str) -> None:
    assert not is_safe_name(name)
    assert is_safe_name("sub/model.safetensors")


def test_an_index_that_leads_outside(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", mixtral())
    write_files(tmp_path, {"secret.safetensors": b""})
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFileError, match="secret"):
        read_weight_map(folder / "model.safetensors.index.json")


# What a checkpoint is -------------------------------------------------------------------------------------


def test_the_summary_of_a_mixtral(tmp_path: Path) -> None:
    layers, experts, hidden, ffn, vocab = 3, 4, 32, 64, 100
    summary = summarize(write_files(tmp_path, mixtral(layers, experts, hidden, ffn, vocab, shards=2)))
    expert = 3 * hidden * ffn * 2
    dense = (
        layers * (4 * hidden * hidden + experts * hidden + 2 * hidden) * 2
        + 2 * vocab * hidden * 2
        + hidden * 2
    )
    assert (summary.moe_layers, summary.num_experts, summary.top_k) == (3, 4, 2)
    assert summary.shape == "3 x 4 x top-2"
    assert summary.expert_nbytes == expert
    assert summary.experts_nbytes == layers * experts * expert
    assert summary.dense_nbytes == dense
    assert summary.unused_nbytes == 0
    # One row of the input embedding, all of the rest of the dense part, two experts of each layer.
    assert summary.active_nbytes == dense - (vocab - 1) * hidden * 2 + layers * 2 * expert
    assert summary.format == "bf16"
    # The second copies of the weights in the folder are not part of the model.
    assert summary.total_nbytes == dense + layers * experts * expert


def test_the_summary_of_fused_experts(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    tensors = {"model.embed_tokens.weight": ("BF16", (8, 4)), "model.norm.weight": ("BF16", (4,))}
    for layer in range(2):
        at = f"model.layers.{layer}.mlp."
        tensors |= {
            f"{at}experts.gate_up_proj_blocks": ("U8", (4, 8, 1, 16)),
            f"{at}experts.gate_up_proj_scales": ("U8", (4, 8, 1)),
            f"{at}experts.down_proj_bias": ("BF16", (4, 4)),
            f"{at}router.weight": ("BF16", (4, 4)),
        }
    config["quantization_config"] = {"quant_method": "mxfp4"}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors_bytes(tensors)}
    summary = summarize(write_files(tmp_path, files))
    expert = 8 * 16 + 8 + 4 * 2
    assert (summary.moe_layers, summary.num_experts, summary.top_k) == (2, 4, 2)
    assert (summary.expert_nbytes, summary.experts_nbytes) == (expert, 8 * expert)
    assert summary.format == "mxfp4"
    # Embeddings without a head are tied: the head reads all of them.
    assert summary.active_nbytes == summary.dense_nbytes + 2 * 2 * expert


def test_dense_layers_shared_experts_and_prediction_layers(tmp_path: Path) -> None:
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
    }
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("BF16", (4, 4)),
        "model.layers.1.mlp.shared_experts.up_proj.weight": ("BF16", (4, 4)),
        "model.layers.1.mlp.experts.0.up_proj.weight": ("F8_E4M3", (4, 4)),
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": ("F32", (1, 1)),
        "model.layers.1.mlp.experts.1.up_proj.weight": ("F8_E4M3", (4, 4)),
        "model.layers.1.mlp.experts.1.up_proj.weight_scale_inv": ("F32", (1, 1)),
        "model.layers.2.mlp.experts.0.up_proj.weight": ("F8_E4M3", (4, 4)),
        "model.layers.2.eh_proj.weight": ("BF16", (4, 4)),
    }
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors_bytes(tensors)}
    summary = summarize(write_files(tmp_path, files))
    assert (summary.moe_layers, summary.num_experts) == (1, 2)
    assert (summary.dense_nbytes, summary.expert_nbytes, summary.unused_nbytes) == (64, 20, 48)


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    files = mixtral(shards=1)
    files["model.safetensors"] = files["model.safetensors"][:-1]
    with pytest.raises(DamagedFileError, match="damaged"):
        summarize(write_files(tmp_path, files))


# List and show --------------------------------------------------------------------------------------------


def test_list_names_what_is_here(place: Place, tiny: dict[str, bytes]) -> None:
    assert [model for model in list_models() if model.source != "bundled"] == []
    place.pull()
    dense = dict(mixtral()) | {"config.json": b'{"model_type": "llama"}'}
    place.hub.add("some/dense", dense)
    for name in ("config.json", "model.safetensors.index.json", SHARD, SHARD2):
        hf_hub_download("some/dense", name, cache_dir=place.cache, endpoint=place.hub.url)
    place.hub.add("other/moe", mixtral(shards=1))
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("other/moe", name, cache_dir=place.cache, endpoint=place.hub.url)
    models = {model.name: model for model in list_models() if model.source != "bundled"}
    assert set(models) == {REPO, "other/moe"}
    assert (models[REPO].source, models[REPO].state) == ("moei", "complete")
    assert models[REPO].nbytes == models[REPO].expected_nbytes > 100_000
    assert models[REPO].licence == "apache-2.0"
    assert (models["other/moe"].source, models["other/moe"].state) == ("other", "complete")


def test_a_partial_download_is_listed(place: Place, tiny: dict[str, bytes]) -> None:
    place.hub.fail(SHARD2, "truncate", times=1, at=20_000)
    place.hub.fail(SHARD2, "status", status=403, times=1)
    with pytest.raises(MoeiError):
        place.pull()
    (model,) = [model for model in list_models() if model.source != "bundled"]
    assert (model.name, model.source, model.state) == (REPO, "moei", "partial")
    assert 0 < model.nbytes < model.expected_nbytes
    place.pull()
    assert describe(REPO)[0].state == "complete"


def test_a_folder_that_cannot_be_read_hides_no_other(
    place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.pull()
    place.hub.add("tiny/other", mixtral(seed=3))
    place.pull("tiny/other")
    commits = RepoCache.commits

    def refuse(cache: RepoCache) -> list[str]:
        if cache.repo == REPO:
            raise PermissionError(13, "Permission denied", str(cache.folder))
        return commits(cache)

    monkeypatch.setattr(RepoCache, "commits", refuse)
    states = {model.name: model.state for model in list_models() if model.source != "bundled"}
    assert states == {REPO: "damaged", "tiny/other": "complete"}


def test_a_damaged_model_is_listed_as_such(place: Place, tiny: dict[str, bytes]) -> None:
    folder = place.pull()
    blob = (folder / SHARD).resolve()
    blob.write_bytes(blob.read_bytes()[:-5])
    (model,) = describe(REPO)
    assert model.state == "damaged" and SHARD in model.problem
    # And the next pull heals it.
    place.pull()
    assert describe(REPO)[0].state == "complete"


def test_the_command_line(place: Place, tiny: dict[str, bytes]) -> None:
    dry = place.run("pull", REPO, "--dry-run", "--json")
    report = json.loads(dry.stdout)
    assert report["fits"] and report["needed_bytes"] == report["total_bytes"] and not place.cache.exists()
    text = place.run("pull", REPO, "--dry-run").stdout
    assert "2 files" in text and "fits" in text and "apache-2.0" in text
    pulled = place.command("pull", REPO)
    assert pulled.returncode == 0, pulled.stderr
    assert Path(pulled.stdout.strip()).is_dir() and "\x1b" not in pulled.stdout + pulled.stderr
    listed = place.run("list")
    assert REPO in listed.stdout and "2 x 4 x top-2" in listed.stdout and "complete" in listed.stdout
    assert json.loads(place.run("list", "--json").stdout)["models"][-1]["moe_layers"] == 2
    began = time.monotonic()
    shown = place.run("show", REPO)
    assert time.monotonic() - began < 1
    assert "2 x 4 x top-2" in shown.stdout and "downloaded by moei" in shown.stdout
    details = json.loads(place.run("show", REPO, "--json").stdout)["here"][0]
    assert details["active_bytes_per_token"] < details["bytes_on_disk"]
    removed = json.loads(place.run("rm", REPO, "--json").stdout)
    assert removed["freed_bytes"] == report["total_bytes"]
    assert not place.repo_folder().exists()
    gone = place.run("show", REPO)
    assert gone.returncode == 3 and f"moei pull {REPO}" in gone.stderr


def test_exit_codes(place: Place, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.run("pull", "no/body").returncode == 3
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        offline = place.run("pull", REPO)
    assert offline.returncode == 5 and "HF_HUB_OFFLINE" in offline.stderr
    assert place.run("pull", "mixtral").returncode == 3
    assert place.run("pull", str(place.root)).returncode == 2
    assert place.run("pull", REPO, "--quant", "q9_9").returncode == 2
    place.hub.fail(SHARD, "corrupt", times=2)
    damaged = place.run("pull", REPO)
    assert damaged.returncode == 6 and "damaged twice" in damaged.stderr
    assert place.run("rm", "moei-demo").returncode == 2
    assert place.run("rm", "a/b").returncode == 3
    alias = place.run("show", "mixtral-8x7b")
    assert alias.returncode == 0 and "not on this machine" in alias.stdout
    known = place.run("list", "--known")
    assert all(name in known.stdout for name in aliases())


def test_show_needs_no_torch(place: Place, tiny: dict[str, bytes]) -> None:
    import subprocess
    import sys

    place.pull()
    script = (
        "import sys; from moei_cli.main import main\n"
        f"try: main(['show', '{REPO}'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=place.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
