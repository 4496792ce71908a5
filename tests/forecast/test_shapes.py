"""Shapes of models from configs, against what was published and what lies in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moei_cli.forecasts import shape_of_files
from moei_core.errors import MoeiError, OfflineError, UnsupportedModelError
from moei_core.forecast.formats import FORMATS
from moei_core.forecast.shape import (
    bundled_configs,
    bundled_shape,
    shape_of_config,
    shape_of_folder,
    shape_of_repo,
)
from moei_core.hub.aliases import aliases
from moei_core.hub.remote import Remote
from moei_core.hub.resolve import resolve_model
from moei_core.hub.summary import summarize
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS
from tests.cli.conftest import Outcome
from tests.hub.conftest import REPO, Place
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("name", aliases())
def test_every_alias_has_a_shape_that_weighs_what_was_published(name: str) -> None:
    alias, shape = aliases()[name], bundled_shape(name)
    assert shape is not None
    assert (shape.moe_layers, shape.experts, shape.top_k) == (alias.layers, alias.experts, alias.top_k)
    assert shape.format.name == alias.format
    nbytes = shape.nbytes(shape.format) + shape.format.nbytes(shape.unused_weights)
    assert nbytes / 1e9 == pytest.approx(alias.gb, rel=0.015)
    # By its repository too, and smaller in fewer bits.
    assert bundled_shape(alias.repo) == shape
    assert shape.nbytes(FORMATS["q4_0"]) < shape.nbytes(FORMATS["q8_0"]) < shape.nbytes(FORMATS["bf16"])


def test_no_shape_without_an_alias() -> None:
    assert set(bundled_configs()) == set(aliases())
    assert bundled_shape("nobody/nothing") is None


@pytest.mark.parametrize("name", SYNTHETIC_MODELS)
def test_counted_weights_are_those_of_the_tensors(name: str) -> None:
    """Against the list of tensors that a synthetic checkpoint is made of: within the norms and biases."""
    model = SYNTHETIC_MODELS[name]
    shape = shape_of_config(name, model.config)
    routed = dense = 0
    for tensor in model.tensors(model.config):
        size = 1
        for dimension in tensor.shape:
            size *= dimension
        if ".experts." in tensor.name:
            routed += size
        else:
            dense += size
    assert shape.total_experts * shape.expert_weights == pytest.approx(routed, rel=0.01)
    assert shape.dense_weights == pytest.approx(dense, rel=0.01)
    assert shape.active_weights == shape.dense_weights - shape.config["vocab_size"] * shape.hidden_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_measured_and_not_counted(family: str, chat_folder: Callable[..., Path]) -> None:
    folder = chat_folder(family)
    shape, found = shape_of_folder("x", folder), summarize(folder)
    assert shape.format.name == "f32"
    assert shape.expert_nbytes(shape.format) == found.expert_nbytes
    assert shape.dense_nbytes(shape.format) == found.dense_nbytes
    assert shape.nbytes(shape.format) == found.total_nbytes


def test_a_packed_model_has_its_experts_in_blocks(moei: Callable[..., Outcome]) -> None:
    assert moei("quantize", "moei-demo", "q8_0").code == 0
    plain, packed = (shape_of_files(resolve_model(f"moei-demo:{form}")) for form in ("none", "q8_0"))
    assert (plain.format.name, packed.format.name, packed.dense_format.name) == ("bf16", "q8_0", "bf16")
    assert packed.total_experts == plain.total_experts
    assert packed.expert_weights == pytest.approx(plain.expert_weights, rel=0.01)
    assert packed.dense_weights == pytest.approx(plain.dense_weights, rel=0.02)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "llama", "hidden_size": 8}, "not a Mixture-of-Experts model"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 8}, "num_hidden_layers"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": None, "num_hidden_layers": 2,
          "vocab_size": 9, "intermediate_size": 4}, "cannot be understood"),
        ({"num_experts": 8, "num_experts_per_tok": 9, "hidden_size": 8}, "9 of 8 experts"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": "big"}, "hidden_size is 'big'"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_counted(config: dict[str, object], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        shape_of_config("it", config)


def test_dense_layers_are_said_in_several_ways() -> None:
    base = dict(bundled_configs()["qwen3-30b-a3b"]) | {"num_hidden_layers": 8}
    for change, layers in (
        ({}, 8),
        ({"first_k_dense_replace": 3}, 5),
        ({"decoder_sparse_step": 2}, 4),
        ({"mlp_only_layers": [0, 7]}, 6),
        ({"moe_layer_freq": [0, 1, 1, 1, 1, 1, 1, 1]}, 7),
        ({"moe_layer_start_index": 1}, 7),
    ):
        assert shape_of_config("x", base | change).moe_layers == layers


def test_a_hub_id_costs_its_config_and_file_list(place: Place) -> None:
    config = dict(bundled_configs()["olmoe-1b-7b"]) | {"num_hidden_layers": 2, "vocab_size": 64}
    counted = shape_of_config(REPO, config)
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": bytes(1 << 20)}
    place.hub.add(REPO, files)
    shape = shape_of_repo(REPO, None, place.remote())
    # The file is too small to be this model: what was counted stands.
    assert shape.nbytes(shape.format) == counted.nbytes(counted.format)
    assert (shape.moe_layers, shape.experts) == (2, 64)
    assert [name for _, name, _ in place.hub.requests if name in files] == ["config.json"]
    gone = "http://127.0.0.1:9"
    again = shape_of_repo(REPO, None, Remote(REPO, endpoint=gone, first_wait=0.01))
    assert again.total_experts == shape.total_experts
    assert "last time" in again.source
    with pytest.raises(OfflineError):
        shape_of_repo("never/seen", None, Remote("never/seen", endpoint=gone, first_wait=0.01))


def test_a_config_of_the_hub_that_is_no_json(place: Place) -> None:
    place.hub.add(REPO, {"config.json": b"<html>"})
    with pytest.raises(MoeiError, match="not valid JSON"):
        shape_of_repo(REPO, None, place.remote())


def test_the_file_list_corrects_the_dense_part() -> None:
    from moei_core.forecast.shape import _with_total

    shape = bundled_shape("mixtral-8x7b")
    assert shape is not None
    published = shape.nbytes(shape.format) + 300_000_000
    assert _with_total(shape, published).nbytes(shape.format) == pytest.approx(published, rel=1e-6)
    assert _with_total(shape, published * 3) == shape
