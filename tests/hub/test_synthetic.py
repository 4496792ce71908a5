"""Synthetic models: shapes as published, loadable by transformers, under a limit."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from moei_core.errors import DoesNotFitError, ModelNotFoundError, UsageError
from moei_core.hub import synthetic
from moei_core.hub.aliases import aliases
from moei_core.hub.library import list_models
from moei_core.hub.removal import plan_removal, remove
from moei_core.hub.resolve import resolve_model, synthetic_root
from moei_core.hub.summary import summarize
from moei_core.hub.synthetic import made_models, make_synthetic, write_checkpoint
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS, Config

# Small enough for a test, with all proportions that the code could confuse kept apart.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "experts_per_token": 3,
}


def shrink(name: str, layers: int = 2) -> Config:
    model = SYNTHETIC_MODELS[name]
    small = {key: value for key, value in _SMALL.items() if key in model.config}
    if name == "deepseek-v2-lite":
        small["num_key_value_heads"] = 4
    return model.cut(layers) | small


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """``make_synthetic`` makes shrunken models."""
    for name, model in SYNTHETIC_MODELS.items():
        small = synthetic.SyntheticModel(
            name, model.config | shrink(name), model.layer_tensors, model.dense_layers
        )
        monkeypatch.setitem(SYNTHETIC_MODELS, name, small)


# Published: total bytes of the weights (bf16), layers with experts, experts, top-k.
@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("mixtral-8x7b", 93.4),
        ("qwen3-30b-a3b", 61.1),
        ("deepseek-v2-lite", 31.4),
        ("gpt-oss-20b", 41.8),
        ("olmoe-1b-7b", 13.8),
    ],
)
def test_the_shapes_add_up_to_the_published_size(name: str, gigabytes: float) -> None:
    model, alias = SYNTHETIC_MODELS[name], aliases()[name]
    total = sum(synthetic._nbytes(tensor) for tensor in model.tensors(model.config))
    assert round(total / 1e9, 1) == gigabytes
    assert model.moe_layers == alias.layers


@pytest.mark.parametrize("name", list(SYNTHETIC_MODELS))
def test_transformers_loads_it_without_a_word(name: str, tmp_path: Path) -> None:
    """Every tensor that the model has is in the files, with its shape, and no other."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    model = SYNTHETIC_MODELS[name]
    config = shrink(name)
    write_checkpoint(model, config, folder)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2 + model.dense_layers
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Wörter, 1 2 3\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == config["vocab_size"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    ids = torch.tensor([prompt["input_ids"] if not isinstance(prompt, list) else prompt])
    with torch.no_grad():
        logits = loaded(ids).logits
    assert torch.isfinite(logits).all()
    summary = summarize(folder)
    assert (summary.moe_layers, summary.num_experts, summary.top_k) == (2, 8, 3)


def test_shards_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr(synthetic, "_SHARD_NBYTES", 100_000)
    monkeypatch.setattr(synthetic, "_BLOCK_ITEMS", 9973)
    write_checkpoint(SYNTHETIC_MODELS["olmoe-1b-7b"], shrink("olmoe-1b-7b"), tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        assert (tmp_path / "model" / file).stat().st_size < 110_000
        # Data at an odd byte would be copied by whoever uses it, and take twice its memory.
        header = (tmp_path / "model" / file).read_bytes()[:8]
        assert int.from_bytes(header, "little") % 8 == 0
        tensors |= load_file(tmp_path / "model" / file)
    assert set(tensors) == set(index)
    expert = tensors["model.layers.0.mlp.experts.0.up_proj.weight"].float()
    assert 0.018 < expert.std() < 0.022 and abs(expert.mean()) < 0.002
    assert 0.9 < tensors["model.embed_tokens.weight"].float().std() < 1.1
    assert (tensors["model.norm.weight"] == 1).all()
    other = tensors["model.layers.0.mlp.experts.1.up_proj.weight"].float()
    assert abs(torch.corrcoef(torch.stack([expert.flatten(), other.flatten()]))[0, 1]) < 0.1
    assert torch.linalg.matrix_rank(tensors["lm_head.weight"].float()) == 64


def test_made_once_listed_and_removed(small_models: None) -> None:
    made = make_synthetic("mixtral-8x7b", 1)
    assert (made.name, made.source) == ("synthetic:mixtral-8x7b@1", "synthetic")
    written = (made.folder / "config.json").stat().st_mtime_ns
    assert make_synthetic("mixtral-8x7b", 1) == made == resolve_model(made.name)
    assert (made.folder / "config.json").stat().st_mtime_ns == written
    (listed,) = [model for model in list_models() if model.source == "synthetic"]
    assert listed.name == made.name and listed.state == "complete" and listed.summary.moe_layers == 1
    freed = remove(plan_removal(made.name))
    assert freed == listed.nbytes and not made.folder.exists()
    with pytest.raises(ModelNotFoundError, match="--synthetic mixtral-8x7b --layers 1"):
        resolve_model(made.name)


def test_layers_count_those_with_experts(small_models: None) -> None:
    made = make_synthetic("deepseek-v2-lite", 2)
    config = json.loads((made.folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert summarize(made.folder).moe_layers == 2
    for layers in (0, -1, 3):
        with pytest.raises(UsageError, match="1 to 2 layers"):
            make_synthetic("deepseek-v2-lite", layers)
    with pytest.raises(ModelNotFoundError, match="There are: mixtral-8x7b"):
        make_synthetic("gpt-9")


def test_the_one_used_longest_ago_goes(small_models: None) -> None:
    first = make_synthetic("mixtral-8x7b", 1)
    second = make_synthetic("olmoe-1b-7b", 1)
    sizes = {made.name: made.nbytes for made in made_models()}
    os.utime(first.folder / "moei-synthetic.json", (1, 1))
    os.utime(second.folder / "moei-synthetic.json", (2, 2))
    make_synthetic("mixtral-8x7b", 1)  # used again: now the younger
    make_synthetic("qwen3-30b-a3b", 1, limit_nbytes=sum(sizes.values()) + 200_000)
    assert {made.name for made in made_models()} == {"synthetic:mixtral-8x7b@1", "synthetic:qwen3-30b-a3b@1"}
    with pytest.raises(DoesNotFitError, match="MOEI_SYNTHETIC_LIMIT"):
        make_synthetic("gpt-oss-20b", 1, limit_nbytes=1000)
    assert len(made_models()) == 2


def test_layers_are_an_option_and_no_part_of_the_name() -> None:
    with pytest.raises(ModelNotFoundError, match="--layers"):
        make_synthetic("olmoe-1b-7b@4")


def test_the_limit_can_be_set(small_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEI_SYNTHETIC_LIMIT", "1KB")
    with pytest.raises(DoesNotFitError):
        make_synthetic("olmoe-1b-7b", 1)
    monkeypatch.setenv("MOEI_SYNTHETIC_LIMIT", "much")
    with pytest.raises(UsageError, match="MOEI_SYNTHETIC_LIMIT"):
        make_synthetic("olmoe-1b-7b", 1)


def test_a_death_while_writing_leaves_nothing_that_counts(
    small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_write_weights", lambda *args: os._exit(9))
        child = os.fork()
        if child == 0:
            make_synthetic("olmoe-1b-7b", 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert made_models() == [] and list(synthetic_root().glob(".*unfinished"))
    make_synthetic("olmoe-1b-7b", 1)
    assert not list(synthetic_root().glob(".*unfinished"))


@pytest.mark.slow
def test_routing_does_not_collapse_in_deep_layers(tmp_path: Path) -> None:
    """Neighbouring tokens share about as many experts as chance gives, in the last of eight real-width layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = SYNTHETIC_MODELS["olmoe-1b-7b"]
    config = model.cut(8) | {"intermediate_size": 32, "vocab_size": 4096, "eos_token_id": 2}
    write_checkpoint(model, config, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    chosen: list[torch.Tensor] = []
    loaded.model.layers[7].mlp.gate.register_forward_hook(lambda *call: chosen.append(call[2][2]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        loaded(torch.randint(300, 4000, (1, 96), generator=generator))
    (experts,) = chosen
    assert experts.shape == (96, 8)
    assert len(set(experts.flatten().tolist())) > 55
    shared = [len(set(a.tolist()) & set(b.tolist())) / 8 for a, b in itertools.pairwise(experts)]
    assert sum(shared) / len(shared) < 0.2  # chance: 8 of 64, 0.125
