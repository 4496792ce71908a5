"""A Mixtral with a gigabyte of experts, for what only shows at size: memory, downloads."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import save_tokenizer


def save_large(folder: Path) -> Path:
    """48 experts of 22 MB, 1.06 GB in shards of 300 MB, in bfloat16. Returns ``folder``."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=258, hidden_size=1024, intermediate_size=3584, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    model.save_pretrained(folder, max_shard_size="300MB")
    save_tokenizer(folder)
    return folder
