"""The real shapes of well-known models: their ``config.json`` as published and the tensors of their checkpoints.

Every tensor's name and shape is computed from the config, so a test can shrink the config and load the result
with transformers itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Config = dict[str, Any]


class TensorPlan(NamedTuple):
    """One tensor to write.

    kind: ``weight`` (random), ``embedding`` (random, larger), ``output`` (random, smaller: what a layer adds to
    the residual stream), ``norm`` (ones).
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "weight"


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """A model that can be made here.

    dense_layers: leading decoder layers without routed experts; they are always kept.
    layer_tensors: the tensors of one decoder layer, given the config and the layer's index.
    """

    name: str
    config: Config
    layer_tensors: Callable[[Config, int], Iterator[TensorPlan]]
    dense_layers: int = 0

    @property
    def moe_layers(self) -> int:
        return int(self.config["num_hidden_layers"]) - self.dense_layers

    def cut(self, layers: int) -> Config:
        """The config with ``layers`` layers of routed experts, after the leading dense ones."""
        config = copy.deepcopy(self.config)
        config["num_hidden_layers"] = self.dense_layers + layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][: self.dense_layers + layers]
        return config

    def tensors(self, config: Config) -> Iterator[TensorPlan]:
        """All tensors of the checkpoint, in the order of the layers."""
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        yield TensorPlan("model.embed_tokens.weight", (vocab, hidden), "embedding")
        for layer in range(config["num_hidden_layers"]):
            for tensor in self.layer_tensors(config, layer):
                yield tensor._replace(name=f"model.layers.{layer}.{tensor.name}")
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield TensorPlan(f"model.layers.{layer}.{norm}.weight", (hidden,), "norm")
        yield TensorPlan("model.norm.weight", (hidden,), "norm")
        yield TensorPlan("lm_head.weight", (vocab, hidden))


def _attention(config: Config, bias: bool = False) -> Iterator[TensorPlan]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    outputs = {"q_proj": heads * head, "k_proj": config["num_key_value_heads"] * head}
    outputs["v_proj"] = outputs["k_proj"]
    for name, rows in outputs.items():
        yield TensorPlan(f"self_attn.{name}.weight", (rows, hidden))
        if bias:
            yield TensorPlan(f"self_attn.{name}.bias", (rows,))
    yield TensorPlan("self_attn.o_proj.weight", (hidden, heads * head), "output")
    if bias:
        yield TensorPlan("self_attn.o_proj.bias", (hidden,))


def _mlp(prefix: str, hidden: int, ffn: int, names: tuple[str, str, str]) -> Iterator[TensorPlan]:
    """names: of gate, up and down."""
    gate, up, down = names
    yield TensorPlan(f"{prefix}{gate}.weight", (ffn, hidden))
    yield TensorPlan(f"{prefix}{up}.weight", (ffn, hidden))
    yield TensorPlan(f"{prefix}{down}.weight", (hidden, ffn), "output")


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _mixtral(config: Config, layer: int) -> Iterator[TensorPlan]:
    hidden, experts = config["hidden_size"], config["num_local_experts"]
    yield from _attention(config)
    yield TensorPlan("block_sparse_moe.gate.weight", (experts, hidden))
    for expert in range(experts):
        at = f"block_sparse_moe.experts.{expert}."
        yield from _mlp(at, hidden, config["intermediate_size"], ("w1", "w3", "w2"))


def _qwen3(config: Config, layer: int) -> Iterator[TensorPlan]:
    hidden, experts = config["hidden_size"], config["num_experts"]
    yield from _attention(config)
    for name in ("q_norm", "k_norm"):
        yield TensorPlan(f"self_attn.{name}.weight", (config["head_dim"],), "norm")
    yield TensorPlan("mlp.gate.weight", (experts, hidden))
    for expert in range(experts):
        yield from _mlp(f"mlp.experts.{expert}.", hidden, config["moe_intermediate_size"], _PROJECTIONS)


def _olmoe(config: Config, layer: int) -> Iterator[TensorPlan]:
    hidden, experts = config["hidden_size"], config["num_experts"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield from _attention(config)
    yield TensorPlan("self_attn.q_norm.weight", (hidden,), "norm")
    yield TensorPlan("self_attn.k_norm.weight", (kv,), "norm")
    yield TensorPlan("mlp.gate.weight", (experts, hidden))
    for expert in range(experts):
        yield from _mlp(f"mlp.experts.{expert}.", hidden, config["intermediate_size"], _PROJECTIONS)


def _deepseek_v2(config: Config, layer: int) -> Iterator[TensorPlan]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield TensorPlan("self_attn.q_proj.weight", (heads * (nope + rope), hidden))
    yield TensorPlan("self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden))
    yield TensorPlan("self_attn.kv_a_layernorm.weight", (rank,), "norm")
    yield TensorPlan("self_attn.kv_b_proj.weight", (heads * (nope + value), rank))
    yield TensorPlan("self_attn.o_proj.weight", (hidden, heads * value), "output")
    if layer < config["first_k_dense_replace"]:
        yield from _mlp("mlp.", hidden, config["intermediate_size"], _PROJECTIONS)
        return
    ffn = config["moe_intermediate_size"]
    yield TensorPlan("mlp.gate.weight", (config["n_routed_experts"], hidden))
    for expert in range(config["n_routed_experts"]):
        yield from _mlp(f"mlp.experts.{expert}.", hidden, ffn, _PROJECTIONS)
    yield from _mlp("mlp.shared_experts.", hidden, ffn * config["n_shared_experts"], _PROJECTIONS)


def _gpt_oss(config: Config, layer: int) -> Iterator[TensorPlan]:
    """The bf16 layout: all experts of a layer in one tensor, inputs first, as transformers writes it."""
    hidden, ffn, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield from _attention(config, bias=True)
    yield TensorPlan("self_attn.sinks", (config["num_attention_heads"],))
    yield TensorPlan("mlp.router.weight", (experts, hidden))
    yield TensorPlan("mlp.router.bias", (experts,))
    yield TensorPlan("mlp.experts.gate_up_proj", (experts, hidden, 2 * ffn))
    yield TensorPlan("mlp.experts.gate_up_proj_bias", (experts, 2 * ffn))
    yield TensorPlan("mlp.experts.down_proj", (experts, ffn, hidden), "output")
    yield TensorPlan("mlp.experts.down_proj_bias", (experts, hidden))


_COMMON: Config = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

_MIXTRAL: Config = _COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "vocab_size": 32000,
}

_QWEN3: Config = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_DEEPSEEK_V2_LITE: Config = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}

_GPT_OSS_20B: Config = _COMMON | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}

_OLMOE: Config = _COMMON | {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "vocab_size": 50304,
}

SYNTHETIC_MODELS: dict[str, SyntheticModel] = {
    model.name: model
    for model in (
        SyntheticModel("mixtral-8x7b", _MIXTRAL, _mixtral),
        SyntheticModel("qwen3-30b-a3b", _QWEN3, _qwen3),
        SyntheticModel("deepseek-v2-lite", _DEEPSEEK_V2_LITE, _deepseek_v2, dense_layers=1),
        SyntheticModel("gpt-oss-20b", _GPT_OSS_20B, _gpt_oss),
        SyntheticModel("olmoe-1b-7b", _OLMOE, _olmoe),
    )
}
