"""``ModelShape``: what a forecast must know of a model, from its config alone.

Sources, from the best: the files here (exact sizes), the config and file list of the hub, and for well-known models
``shapes.toml``, which needs no network. Sizes that only the config gives are counted from its dimensions.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from moei_core.errors import MoeiError, OfflineError, UnsupportedModelError
from moei_core.forecast.formats import FORMATS, QUANTISED, StorageFormat, stored_format
from moei_core.hardware.budget import kv_width
from moei_core.hub.aliases import find_alias
from moei_core.hub.summary import expert_count, expert_top_k, read_config, summarize, text_config
from moei_core.hub.synthetic_models import SYNTHETIC_MODELS
from moei_core.paths import cache_dir
from moei_core.quant import native
from moei_core.types import ModelSpec

if TYPE_CHECKING:
    from moei_core.hub.remote import Remote

Config = Mapping[str, Any]

NATIVE_ATTENTION = frozenset({
    "axk1", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "gpt_oss", "granitemoe", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
})  # fmt: skip
"""Kinds of models whose attention the engine computes natively. It finds out by trying (``adapters/native_decode.py``);
a test compares."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions and weights (numbers, not bytes) of a model.

    layers: decoder layers, of which ``moe_layers`` have ``experts`` routed experts of ``expert_weights`` each, and
    ``top_k`` serve a token. dense_weights: everything else, embeddings included; a token reads ``active_weights``
    of it. unused_weights: of layers that a chat never runs. format: of the experts as stored; dense_format: of the
    rest. uniform_routing: random weights, so every expert is as likely as the others. source: where this comes from.
    """

    name: str
    model_type: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    expert_weights: int
    dense_weights: int
    active_weights: int
    unused_weights: int
    head_weights: int
    config: Config
    format: StorageFormat
    dense_format: StorageFormat
    source: str
    uniform_routing: bool = False

    @property
    def kv_nbytes_per_token(self) -> int:
        """Keys and values of one token over all layers, in 16 bits."""
        return self.layers * kv_width(self.config) * 2

    @property
    def heads_width(self) -> float:
        """Values of a token's query over all heads, or of what they mix, on average."""
        text = self.config
        heads = text["num_attention_heads"]
        if text.get("kv_lora_rank"):
            key = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
            return float(heads * (key + text["v_head_dim"]) / 2)
        return float(kv_width(text) / 2 * heads / (text.get("num_key_value_heads") or heads))

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def total_experts(self) -> int:
        return self.moe_layers * self.experts

    @property
    def native_attention(self) -> bool:
        """Whether the engine computes a token's attention as one native call."""
        return self.model_type in NATIVE_ATTENTION and native.available()

    @property
    def eager_attention(self) -> bool:
        """Whether a prompt's attention holds its scores: gpt-oss's sinks have no fused kernel here."""
        return self.model_type == "gpt_oss"

    @property
    def expansion_weights(self) -> int:
        """Weights of a layer's matrix that each token expands all compressed keys and values with.

        0 where they are kept as they are, or where the engine attends without expanding them.
        """
        text = self.config
        if not text.get("kv_lora_rank") or self.native_attention:
            return 0
        width = text["qk_nope_head_dim"] + text["v_head_dim"]
        return int(text["kv_lora_rank"] * text["num_attention_heads"] * width)

    def layer_nbytes(self, form: StorageFormat) -> float:
        """Bytes of weights that a token reads in a layer, on average."""
        dense = self.dense_in(form).bits / 8 * (self.active_weights - self.head_weights)
        return (dense + self.moe_layers * self.top_k * self.expert_nbytes(form)) / self.layers

    def dense_in(self, form: StorageFormat) -> StorageFormat:
        """What the dense part is in memory when the experts are in ``form``.

        Packing makes Q8_0 blocks of it, and where the native kernels are, they stay blocks.
        """
        if form.name in QUANTISED and native.available():
            return FORMATS["q8_0"]
        return self.dense_format if self.dense_format.runs or not form.runs else FORMATS["bf16"]

    def dense_nbytes(self, form: StorageFormat) -> int:
        """Bytes of the dense part in memory when the experts are in ``form``."""
        return self.dense_in(form).nbytes(self.dense_weights)

    def expert_nbytes(self, form: StorageFormat) -> int:
        """Bytes of one expert in ``form``."""
        return form.nbytes(self.expert_weights)

    def nbytes(self, form: StorageFormat) -> int:
        """Bytes of what a chat needs with the experts in ``form``."""
        return self.dense_nbytes(form) + self.total_experts * self.expert_nbytes(form)

    def spec(self, form: StorageFormat) -> ModelSpec:
        """As the engine describes it. Which layers are dense does not matter to a budget."""
        first = self.layers - self.moe_layers
        numbers = range(first, self.layers)
        return ModelSpec(
            self.model_type,
            dict.fromkeys(numbers, self.experts),
            self.top_k,
            self.hidden_size,
            dict.fromkeys(numbers, self.expert_nbytes(form)),
        )


def shape_of_config(name: str, config: Config, stored: str = "", source: str = "its config") -> ModelShape:
    """Count the weights of ``config``. stored: format of the experts, found out if empty.

    Raises: UnsupportedModelError if the config has no routed experts or lacks a dimension.
    """
    text = text_config(config)
    experts, top_k = expert_count(config), expert_top_k(config)
    if experts < 2 or not top_k:
        raise UnsupportedModelError(
            f"{name} is not a Mixture-of-Experts model.",
            "Its config names no routed experts.",
            "moei plan needs one; `moei list` shows those here.",
        )
    try:
        why = _nonsense(text, experts, top_k)
        if not why:
            return _count(name, text, experts, top_k, stored or _stored(config), source)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        why = f"It lacks {error}."
    raise UnsupportedModelError(
        f"The config of {name} cannot be understood.", why, "moei plan needs its dimensions."
    )


def _nonsense(text: Config, experts: int, top_k: int) -> str:
    """What a config says that no model can have; empty if nothing."""
    if top_k > experts:
        return f"A token would use {top_k} of {experts} experts."
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
        if not isinstance(text[key], int) or text[key] < 1:
            return f"Its {key} is {text[key]!r}."
    return ""


def _stored(config: Config) -> str:
    method = config.get("quantization_config")
    named = str(method.get("quant_method", "")).lower() if isinstance(method, Mapping) else ""
    if named in FORMATS:
        return named
    return {"float32": "f32", "float16": "f16"}.get(
        str(config.get("torch_dtype") or config.get("dtype")), "bf16"
    )


def _count(name: str, text: Config, experts: int, top_k: int, stored: str, source: str) -> ModelShape:
    hidden, layers, vocab = text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]
    moe_layers = _moe_layers(text)
    ffn = text.get("moe_intermediate_size") or text["intermediate_size"]
    expert = 3 * hidden * ffn
    shared = text.get("shared_expert_intermediate_size") or ffn * (
        text.get("n_shared_experts") or text.get("moe_num_shared_experts") or 0
    )
    attention = _attention(text)
    # Norms and biases are thousandths of the rest.
    dense = attention + moe_layers * (3 * hidden * shared + experts * hidden)
    dense += (layers - moe_layers) * 3 * hidden * (text.get("intermediate_size") or ffn)
    table = hidden * vocab
    total = dense + table * (1 if text.get("tie_word_embeddings") else 2)
    # A multi-token prediction layer is a whole layer and a projection of two hidden states.
    extra = int(text.get("num_nextn_predict_layers") or 0)
    unused = extra * (
        attention // layers + experts * (expert + hidden) + 3 * hidden * shared + 2 * hidden * hidden
    )
    form = FORMATS[stored]
    dense_format = FORMATS["fp8"] if stored == "fp8" else FORMATS["f32" if stored == "f32" else "bf16"]
    return ModelShape(
        name,
        str(text.get("model_type", "?")),
        layers,
        moe_layers,
        experts,
        top_k,
        expert,
        total,
        dense + table,
        unused,
        table,
        text,
        form,
        dense_format,
        source,
    )


def _moe_layers(text: Config) -> int:
    """How many decoder layers have routed experts, by the several ways in which configs say it."""
    layers = int(text["num_hidden_layers"])
    pattern = text.get("moe_layer_freq")
    if isinstance(pattern, list):
        return sum(bool(one) for one in pattern)
    first = text.get("first_k_dense_replace") or text.get("moe_layer_start_index") or 0
    step = text.get("decoder_sparse_step") or 1
    dense = set(text.get("mlp_only_layers") or ())
    return sum(1 for layer in range(first, layers) if layer not in dense and (layer + 1) % step == 0)


def _attention(text: Config) -> int:
    """Weights of the attention of all layers."""
    hidden, heads, layers = text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]
    if rank := text.get("kv_lora_rank"):
        key, rope, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
        query = heads * (key + rope)
        low = text.get("q_lora_rank")
        one = low * (hidden + query) if low else hidden * query
        one += hidden * (rank + rope) + rank * heads * (key + value) + heads * value * hidden
        return int(layers * one)
    head = text.get("head_dim") or hidden // heads
    groups = text.get("num_key_value_heads") or heads
    one = 2 * hidden * heads * head + 2 * hidden * groups * head
    interval = text.get("full_attention_interval")
    if not interval:
        return int(layers * one)
    # Qwen3-Next: gated full attention in one layer of so many, linear attention in the others.
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    linear = hidden * (2 * keys + 2 * values) + values * hidden
    full = layers // interval
    return int(full * (one + hidden * heads * head) + (layers - full) * linear)


@cache
def bundled_configs() -> Mapping[str, Config]:
    """The configs that need no network, by alias."""
    text = resources.files(__package__).joinpath("shapes.toml").read_text(encoding="utf-8")
    configs: dict[str, Config] = {name: model.config for name, model in SYNTHETIC_MODELS.items()}
    shared: dict[str, str] = {}
    for name, facts in tomllib.loads(text).items():
        if "same_as" in facts:
            shared[name] = facts["same_as"]
        else:
            configs[name] = facts
    return configs | {name: configs[other] for name, other in shared.items()}


def bundled_shape(text: str) -> ModelShape | None:
    """The shape of the well-known model that ``text`` (alias or repository) names, without any network."""
    alias = find_alias(text)
    if alias is None or alias.name not in bundled_configs():
        return None
    return shape_of_config(
        alias.name, bundled_configs()[alias.name], alias.format, "moei's table of known shapes"
    )


def shape_of_folder(name: str, folder: Path, *, uniform_routing: bool = False) -> ModelShape:
    """The shape of a model here, its sizes counted from the headers of its files.

    Raises: DamagedFileError, UnsupportedModelError, MoeiError.
    """
    shape = shape_of_config(name, read_config(folder), source="the files here")
    found = summarize(folder)
    if not found.moe_layers:
        raise UnsupportedModelError(
            f"{name} has no routed experts.",
            "None of its tensors is one.",
            "Is it a Mixture-of-Experts model?",
        )
    if found.quantization in FORMATS and found.quantization != "fp8":
        # Packed: both experts and dense part stay in blocks.
        form = FORMATS[found.quantization]
        weights = round(found.expert_nbytes * 8 / form.bits)
        return replace(shape, expert_weights=weights, format=form, uniform_routing=uniform_routing)
    form = FORMATS[stored_format(next(iter(found.formats), "BF16"))]
    width = form.bits / 8
    active = found.active_nbytes - found.moe_layers * found.top_k * found.expert_nbytes
    return replace(
        shape,
        moe_layers=found.moe_layers,
        experts=found.num_experts,
        expert_weights=round(found.expert_nbytes / width),
        dense_weights=round(found.dense_nbytes / width),
        active_weights=round(active / width),
        unused_weights=round(found.unused_nbytes / width),
        format=form,
        dense_format=form,
        uniform_routing=uniform_routing,
    )


def shape_of_repo(repo: str, revision: str | None, remote: Remote | None = None) -> ModelShape:
    """The shape of a model on the hub: reads its config and file list, a few kilobytes, and keeps them.

    Without a network, what was kept. remote: None for the hub that is set.
    Raises: ModelNotFoundError, OfflineError, UnsupportedModelError, MoeiError.
    """
    from moei_core.hub.remote import Remote

    kept = cache_dir() / "plans" / (quote(f"{repo}@{revision or ''}", safe="@") + ".json")
    source = "its config and file list on the hub"
    try:
        config, nbytes = _ask_hub(remote or Remote(repo), revision)
    except OfflineError:
        try:
            content = json.loads(kept.read_text())
            config, nbytes = dict(content["config"]), int(content["nbytes"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        else:
            return _with_total(shape_of_config(repo, config, source=f"{source}, as it was last time"), nbytes)
        raise
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"config": config, "nbytes": nbytes}))
    return _with_total(shape_of_config(repo, config, source=source), nbytes)


def _ask_hub(remote: Remote, revision: str | None) -> tuple[dict[str, Any], int]:
    """(config, bytes of all weight files)."""
    from moei_core.hub.layout import DEFAULT_REVISION

    info = remote.model_info(revision or DEFAULT_REVISION)
    try:
        config = json.loads(remote.read(info.sha or revision or DEFAULT_REVISION, "config.json"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise MoeiError(f"The config of {remote.repo} is not valid JSON.", hint="Ask the model's authors.")
    sizes = [one.size or 0 for one in info.siblings or () if one.rfilename.endswith(".safetensors")]
    return config, sum(sizes)


def _with_total(shape: ModelShape, nbytes: int) -> ModelShape:
    """Let the dense part be what the files' size leaves beside the experts, if that is believable."""
    experts = (shape.total_experts * shape.expert_weights + shape.unused_weights) * shape.format.bits / 8
    counted = shape.dense_format.nbytes(shape.dense_weights)
    dense = nbytes - experts
    if not 0.5 * counted < dense < 2 * counted:
        return shape
    scale = dense / counted
    return replace(
        shape,
        dense_weights=round(shape.dense_weights * scale),
        active_weights=round(shape.active_weights * scale),
    )
