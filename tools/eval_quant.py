"""What packing costs the demonstration model in quality: each format against the weights as published.

    python tools/eval_quant.py [--model NAME] [--formats q8_0,q4_0] [--conversations 300]

The packed models run through moei itself in two ways: ``exact`` in float32 from the exact values of the blocks, so
that nothing but the format differs, and ``native`` as they run in a chat, where integer products quantise the
activations too. Prints perplexity, the mean Kullback-Leibler divergence of the next token's distribution
(over the answers of conversations that training did not draw) and the right answers to the held-out questions;
as its last line the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import eval_demo
import train_demo
from demo_corpus.build import Corpus
from demo_eval import questions
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.config import ExpertBudget
from moei_core.engine.loaded_model import LoadedModel, LoadOptions
from moei_core.hub.packed import UNPACKED, companion_files
from moei_core.hub.resolve import packed_source, resolve_model
from moei_core.quant import native
from moei_core.store.packing import pack, plan_packing


def kernels(name: str) -> AbstractContextManager[object]:
    """The native kernels while a model of this name is loaded and runs, or not."""
    return mock.patch.object(native, "available", lambda: False) if name.endswith("exact") else nullcontext()


def load(folder: Path, name: str) -> LoadedModel:
    """The model with all its experts in memory."""
    options = LoadOptions(experts=ExpertBudget(fraction=1.0), dtype="float32")
    with kernels(name):
        return LoadedModel(folder, options)


@torch.no_grad()
def distributions(models: dict[str, LoadedModel], conversations: int) -> dict[str, dict[str, float]]:
    """Perplexity of the answers, and the divergence from the first model's distributions."""
    first = next(iter(models.values()))
    samples = train_demo.encode(
        list(Corpus(90_001).conversations(conversations)), first.tokenizer.backend_tokenizer, seed=90_001
    )
    loss, divergence = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    tokens = 0
    for group in train_demo.batches(samples, 4096, seed=1):
        ids, learn, _, _ = train_demo.collate(group)
        target = ids.roll(-1, dims=1)[learn]
        tokens += len(target)
        reference: torch.Tensor | None = None
        for name, model in models.items():
            with kernels(name):
                logits = model.adapter.model(input_ids=ids).logits[learn]
            logs = F.log_softmax(logits.double(), dim=-1)
            reference = logs if reference is None else reference
            loss[name] += float(F.nll_loss(logs, target, reduction="sum"))
            divergence[name] += float(F.kl_div(logs, reference, log_target=True, reduction="sum"))
    return {
        name: {"perplexity": math.exp(loss[name] / tokens), "kl": divergence[name] / tokens}
        for name in models
    }


def evaluate(name: str, formats: list[str], conversations: int) -> dict[str, dict[str, float]]:
    """All measures, by format; the first is the model's own."""
    source = resolve_model(f"{name}:{UNPACKED}")
    held = questions.read_held()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = {"as published": stack.enter_context(load(source.folder, "as published"))}
        for form in formats:
            adapter = TransformersAdapter(source.folder)
            plan = plan_packing(
                adapter.pack_source(packed_source(source)),
                form.upper(),
                companions=companion_files(source.folder),
            )
            pack(plan, scratch / form)
            for way in ("exact", "native") if native.available() else ("exact",):
                models[f"{form} {way}"] = stack.enter_context(load(scratch / form, f"{form} {way}"))
        result = distributions(models, conversations)
        for form, model in models.items():
            with kernels(form):
                answers = eval_demo.Chat(source.folder, model.adapter.model).answers(
                    [h.question for h in held]
                )
            right = [h.correct(answer) for h, answer in zip(held, answers, strict=True)]
            result[form]["heldout_correct"] = sum(right)
            result[form]["heldout_total"] = len(held)
            result[form]["experts_bytes"] = model.spec.total_expert_nbytes
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="moei-demo", help="name of the model")
    parser.add_argument("--formats", default="q8_0,q4_0", help="formats, separated by commas")
    parser.add_argument("--conversations", type=int, default=300)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = evaluate(args.model, args.formats.split(","), args.conversations)
    first = next(iter(result.values()))
    print(f"{'':16}{'perplexity':>12}{'change':>9}{'KL':>11}{'questions':>11}{'experts MB':>12}")
    for form, row in result.items():
        change = row["perplexity"] / first["perplexity"] - 1
        asked = f"{row['heldout_correct']}/{row['heldout_total']}"
        print(
            f"{form:16}{row['perplexity']:12.4f}{change:9.2%}{row['kl']:11.6f}{asked:>11}"
            f"{row['experts_bytes'] / 1e6:12.2f}"
        )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
