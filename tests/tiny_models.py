"""Tiny random models of real architectures, saved in their published layout."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 258  # the bytes, and two tokens of the chat template

_CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=512, tie_word_embeddings=True,
    ),
    "deepseek_v2": DeepseekV2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=16, n_shared_experts=2, num_experts_per_tok=4,
        first_k_dense_replace=1, max_position_embeddings=512, topk_method="greedy", n_group=1, topk_group=1,
    ),
    "gpt_oss": GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=16, num_experts_per_tok=4, sliding_window=32,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip

FAMILIES = tuple(_CONFIGS)

_LATENT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 32, "n_routed_experts": 16, "n_shared_experts": 2,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "max_position_embeddings": 2048, "n_group": 4,
    "topk_group": 2,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}
_CONFIGS |= {
    "deepseek_v2_low": DeepseekV2Config(
        **_LATENT,
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
        rope_parameters={**_YARN, "original_max_position_embeddings": 512},
    ),
    "deepseek_v3": DeepseekV3Config(**_LATENT, norm_topk_prob=True),
    "deepseek_v3_halves": DeepseekV3Config(**_LATENT, rope_interleave=False, attention_bias=True),
}
_WIDE = {
    "vocab_size": VOCABULARY + 4, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip
_CONFIGS |= {
    "qwen3_moe_wide": Qwen3MoeConfig(**_WIDE, head_dim=64, norm_topk_prob=True, tie_word_embeddings=True),
    "qwen2_moe_wide": Qwen2MoeConfig(**_WIDE, shared_expert_intermediate_size=512, norm_topk_prob=False),
}
"""Wide enough for blocks of 256 weights."""
LATENT_FAMILIES = ("deepseek_v2", "deepseek_v2_low", "deepseek_v3", "deepseek_v3_halves")
"""Those that attend over latents: with and without a low-rank query, in every pairing of the values that turn."""


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model whose logits have a standard deviation near 1 and whose routers use every expert."""
    torch.manual_seed(seed)
    config = type(_CONFIGS[family]).from_dict(_CONFIGS[family].to_dict())
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 and not name.endswith("bias"):
                parameter.fill_(1.0)  # norms
                continue
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 16
            if "experts" in name and family == "gpt_oss" and not name.endswith("bias"):
                fan_in = parameter.shape[-2]
            scale = fan_in**-0.5
            # Attention mixes tokens and would make their routers agree; experts must show in the logits.
            if "o_proj" in name:
                scale *= 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        embeddings = model.get_input_embeddings().weight
        if not config.tie_word_embeddings:
            embeddings.mul_(8.0)
    return model.to(dtype).eval()


_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a ChatML template: every byte is a token."""
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_TEMPLATE,
    )
    fast.save_pretrained(folder)


def save_chat(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A model folder that ``moei chat`` takes: weights and tokenizer. Its replies are random bytes."""
    save(family, folder, dtype, shard)
    save_tokenizer(folder)
    return folder


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """Write the model to ``folder`` as its authors would publish it. Returns ``folder``."""
    build(family, dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
