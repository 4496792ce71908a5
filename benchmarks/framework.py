"""What a token costs beside its weights: a model of tiny dimensions and many layers, where all is overhead.

    python benchmarks/framework.py [--layers 48] [--contexts 0,4096] [--tokens 32] [--rounds 5]

A Qwen3-MoE with random weights (hidden 64, 128 experts of 32, top 8) decodes with every expert resident. Printed for
each context, in milliseconds a layer: the whole token, and its split as the engine's clocks see it. Ceiling: the time
that reading the token's weights, keys and values takes at the read bandwidth measured beside it. Then sampling from
152k logits with the settings of a chat. The medians over rounds, with the least and most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from moei_core.config import ExpertBudget, GenerationSettings
from moei_core.engine.forced_routing import ForcedRouting
from moei_core.engine.generate import GenerationTimes, Generator
from moei_core.engine.kv_cache import ConversationCache
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.engine.sampling import Sampler
from moei_core.engine.time_split import time_split
from moei_core.quant import native
from moei_core.trace import Trace

VOCABULARY = 151936
_TINY = 512


def save_tiny(folder: Path, layers: int) -> None:
    """A model folder of the shape described above."""
    config = Qwen3MoeConfig(
        vocab_size=_TINY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, max_position_embeddings=8192, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={chr(256 + i): i for i in range(_TINY)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def decode(model: LoadedModel, context: int, tokens: int) -> tuple[float, dict[str, float]]:
    """Seconds of one decoded token after ``context`` others, and of its parts."""
    times = GenerationTimes()
    generator = Generator(
        model.adapter.model, model.runtime, ConversationCache(model.adapter.config), lambda: False
    )
    prompt = torch.randint(0, _TINY, (max(1, context),), generator=torch.Generator().manual_seed(1)).tolist()
    settings = GenerationSettings(max_new_tokens=tokens + 1, temperature=1.0, seed=0)
    model.runtime.request_start()
    before = model.runtime.snapshot()
    for _ in generator.tokens(prompt, settings, frozenset(), times, model.context):
        pass
    model.runtime.request_end()
    work = model.runtime.statistics.minus(before).minus(times.prefill_work)
    decoding = GenerationTimes(decode_s=times.decode_s)
    split = time_split(decoding, work, times.decode_s + work.turn_s)
    count = len(times.token_s)
    return statistics.median(times.token_s), {name: seconds / count for name, seconds in split.items()}


def bring_all_in(model: LoadedModel) -> None:
    """Make every expert resident: a prompt whose routing goes through all of them."""
    layers, experts, top_k = len(model.spec.num_experts), 128, model.spec.num_experts_per_tok
    every = np.arange(experts).reshape(-1, 1, top_k).repeat(layers, 1)
    tokens = len(every)
    model.runtime.routing = ForcedRouting(
        Trace("all", experts, top_k, tuple(model.spec.num_experts), every, np.array([0, tokens])), model.spec
    )
    decode(model, tokens, 1)
    model.runtime.routing = None
    assert model.scheduler.resident_count == model.spec.total_experts


def sampling(rounds: int) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of a draw from 152k logits: median, least, most."""
    cases = {
        "greedy": GenerationSettings(temperature=0.0),
        "temperature": GenerationSettings(temperature=0.7, seed=0),
        "top-k 20, top-p .8": GenerationSettings(temperature=0.7, top_k=20, top_p=0.8, seed=0),
        "top-p .9": GenerationSettings(temperature=0.7, top_p=0.9, seed=0),
        "top-k 50, min-p .05, penalty 1.1": GenerationSettings(
            temperature=0.7, top_k=50, min_p=0.05, repetition_penalty=1.1, seed=0
        ),
    }
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)).mul(3).to(torch.bfloat16)
    history = list(range(1000))
    found = {}
    for name, settings in cases.items():
        sampler = Sampler(settings)
        taken = []
        for _ in range(max(10, 4 * rounds)):
            started = time.perf_counter()
            sampler.next_token(history, logits)
            taken.append((time.perf_counter() - started) * 1e3)
        found[name] = (statistics.median(taken), min(taken), max(taken))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--contexts", default="0,4096")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    layers, results = options.layers, []
    with tempfile.TemporaryDirectory() as name:
        save_tiny(Path(name), layers)
        loading = LoadOptions(experts=ExpertBudget(fraction=1.0), context=8192)
        with LoadedModel(Path(name), loading) as model:
            bring_all_in(model)
            for context in map(int, options.contexts.split(",")):
                rounds = [decode(model, context, options.tokens) for _ in range(options.rounds + 1)][1:]
                per_layer = [seconds * 1e3 / layers for seconds, _ in rounds]
                split = {
                    part: statistics.median(parts[part] for _, parts in rounds) * 1e3 / layers
                    for part in rounds[0][1]
                }
                ceiling = ceiling_ms(model, context) / layers
                print(
                    f"context {context}: {statistics.median(per_layer):.3f} ms a layer "
                    f"({min(per_layer):.3f}, {max(per_layer):.3f}), ceiling {ceiling:.4f}"
                )
                print("  " + ", ".join(f"{part} {value:.3f}" for part, value in split.items()), flush=True)
                results.append({"context": context, "ms": per_layer, "split": split, "ceiling": ceiling})
    torch.set_num_threads(1)
    draws = sampling(options.rounds)
    for case, (median, least, most) in draws.items():
        print(f"sampling, {case}: {median:.3f} ms ({least:.3f}, {most:.3f})")
    print(json.dumps({"layers": layers, "contexts": results, "sampling": draws}))


def ceiling_ms(model: LoadedModel, context: int) -> float:
    """Milliseconds to read what one token touches, at the speed of memory."""
    spec = model.spec
    nbytes = model.adapter.dense_nbytes + context * model.kv_nbytes_per_token
    nbytes += sum(spec.num_experts_per_tok * each for each in spec.expert_nbytes.values())
    if not native.available():
        return float("nan")
    return nbytes / native.read_bandwidth(np.ones(1 << 28, np.uint8)) * 1e3


if __name__ == "__main__":
    main()
