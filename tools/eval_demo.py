"""Measures the demonstration model: answers, refusals, sums, routing, cache and size.

    python tools/eval_demo.py [--model FOLDER] [--write-trace FILE]

Prints a table, and as its last line the same as JSON. Answers are greedy; the weights are the published
(bfloat16) ones, calculated in float32 by transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_demo
from demo_corpus import arithmetic
from demo_corpus.build import Corpus
from demo_corpus.grammar import FACT_TOPICS, TOPICS
from demo_eval import questions, routing

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "src" / "moei_core" / "bundled" / "moei-demo"


class Chat:
    """The model with its tokenizer, answering greedily."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.padding_side = "left"
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager", local_files_only=True
        ).eval()
        self.experts = self.model.config.num_experts

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The chat as text, ready for the answer."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def answers(self, asked: list[str], batch: int = 40) -> list[str]:
        """Greedy answers to single questions."""
        out = []
        for at in range(0, len(asked), batch):
            texts = [self.prompt([{"role": "user", "content": q}]) for q in asked[at : at + batch]]
            inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
            ids = self.model.generate(**inputs, max_new_tokens=96, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            out += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return out

    @torch.no_grad()
    def routed(self, asked: list[tuple[str, str]], answers: list[str], topic: str) -> routing.Routed:
        """The experts used in a conversation with these answers, earlier turns being kept."""
        ids, requests, passes, decode = [], [], [], []
        messages = []
        for (_, question), answer in zip(asked, answers, strict=True):
            messages.append({"role": "user", "content": question})
            prompt = self.tokenizer(self.prompt(messages)).input_ids
            assert prompt[: len(ids)] == ids
            requests.append(len(ids))
            passes.append(len(ids))
            decode += [0] * (len(prompt) - len(ids))
            spoken = self.tokenizer(answer).input_ids
            passes += range(len(prompt), len(prompt) + len(spoken))
            decode += [1] * len(spoken)
            ids = prompt + spoken
            messages.append({"role": "assistant", "content": answer})
        recorder = routing.RouterRecorder(self.model)
        self.model(input_ids=torch.tensor([ids]))
        experts = recorder.take()
        for handle in recorder.handles:
            handle.remove()
        return routing.Routed(topic, experts, np.array(decode), requests, passes)


def perplexity(chat: Chat, count: int = 300) -> float:
    """Perplexity of the answers in conversations drawn with a seed that training did not use."""
    samples = train_demo.encode(
        list(Corpus(90_001).conversations(count)), chat.tokenizer.backend_tokenizer, seed=90_001
    )
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for group in train_demo.batches(samples, 4096, seed=1):
            ids, learn, _, _ = train_demo.collate(group)
            logits = chat.model(input_ids=ids).logits[learn]
            loss += float(F.cross_entropy(logits, ids.roll(-1, dims=1)[learn], reduction="sum"))
            tokens += int(learn.sum())
    return math.exp(loss / tokens)


def evaluate(folder: Path, verbose: bool, name: str = "heldout", trace: Path | None = None) -> dict:
    """All measures."""
    chat = Chat(folder)
    held, strange = questions.read_held(name), questions.read_out_of_scope()
    corpus = Corpus(train_demo.SEED)
    turns = [t for c in corpus.conversations(train_demo.CONVERSATIONS, train_demo.EASY) for t in c.turns]
    common = questions.overlaps([h.question for h in held], (t.question for t in turns))
    for question, shared in common.items():
        print(f"shares words with training: {question!r}: {shared!r}")
    trained = {" ".join(questions.words(t.question)) for t in turns}
    seen = [q for q in strange if " ".join(questions.words(q)) in trained]
    nearest = questions.NearestNeighbour(
        [t.question for t in turns[:60_000]], [t.answer for t in turns[:60_000]]
    )

    answers = chat.answers([h.question for h in held])
    right = [h.correct(a) for h, a in zip(held, answers, strict=True)]
    base = [h.correct(nearest.answer(h.question)) for h in held]
    refusals = chat.answers(strange)
    refused = ["do not know" in a for a in refusals]
    refused_base = ["do not know" in nearest.answer(q) for q in strange]
    if verbose:
        for h, a, r in zip(held, answers, right, strict=True):
            print(f"{'ok  ' if r else 'MISS'} {h.topic}: {h.question} -> {a!r}")
        for q, a, r in zip(strange, refusals, refused, strict=True):
            print(f"{'ok  ' if r else 'MISS'} unknown: {q} -> {a!r}")

    sums = [("+", a, b) for a in range(10) for b in range(10)] + [
        ("*", a, b) for a in range(10) for b in range(10)
    ]
    sums += [("-", a, b) for a in range(10) for b in range(a + 1)]
    single = chat.answers([f"What is {a} {op} {b}?" for op, a, b in sums], 85)
    correct = [t.strip() == arithmetic.answer(*s) for s, t in zip(sums, single, strict=True)]
    corpus = Corpus(90_002)
    drawn = [arithmetic.draw(corpus.rng) for _ in range(150)]
    asked = [arithmetic.question(*s, corpus.rng) for s in drawn]
    sums_said = chat.answers(asked, 75)
    easy = [t.strip() == arithmetic.answer(*s) for s, t in zip(drawn, sums_said, strict=True)]

    requests = [
        chat.routed([(h.topic, h.question)], [a], h.topic) for h, a in zip(held, answers, strict=True)
    ]
    fact_topics = routing.topic_test(requests, chat.experts)
    requests += [
        chat.routed([("unknown", q)], [a], "unknown") for q, a in zip(strange[:9], refusals, strict=False)
    ]
    requests += [chat.routed([("arithmetic", asked[i])], [sums_said[i]], "arithmetic") for i in range(9)]
    talk = [corpus.turn("smalltalk") for _ in range(9)]
    spoken = chat.answers([t.question for t in talk])
    requests += [
        chat.routed([("smalltalk", t.question)], [a], "smalltalk") for t, a in zip(talk, spoken, strict=True)
    ]
    all_topics = routing.topic_test(requests, chat.experts)

    conversations = test_conversations(chat)
    decoded = np.concatenate([r.experts[r.decode == 1] for r in conversations])
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    result = {
        "heldout_correct": sum(right),
        "heldout_total": len(held),
        "heldout_sharing_five_words": len(common),
        "baseline_correct": sum(base),
        "out_of_scope_refused": sum(refused),
        "out_of_scope_total": len(strange),
        "out_of_scope_in_training": len(seen),
        "baseline_refused": sum(refused_base),
        "single_digit_arithmetic": sum(correct) / len(correct),
        "drawn_arithmetic": sum(easy) / len(easy),
        "routing_fact_topics": fact_topics,
        "routing_all_topics": all_topics,
        "lru_hit_rate_quarter": routing.lru_hit_rate(decoded, chat.experts // 4),
        "decode_tokens_replayed": len(decoded),
        "least_used_expert_vs_uniform": routing.least_share(requests + conversations, chat.experts),
        "perplexity": perplexity(chat),
        "safetensors_bytes": size,
        "parameters": sum(p.numel() for p in chat.model.parameters()),
    }
    if trace is not None:
        note = "Greedy answers in float32; earlier turns are kept between the requests of a sequence."
        routing.write_trace(trace, conversations, chat.experts, "tools/eval_demo.py", note)
        result["trace_bytes"] = trace.stat().st_size
    return result


def test_conversations(chat: Chat, count: int = 42) -> list[routing.Routed]:
    """Conversations of one to three turns over all topics, in mixed order, answered by the model."""
    corpus = Corpus(90_003)
    out = []
    for i in range(count):
        topic = TOPICS[(7 * i) % len(TOPICS)]
        asked, answers, messages = [], [], []
        for _ in range(1 + i % 3):
            turn = corpus.turn(topic)
            messages.append({"role": "user", "content": turn.question})
            inputs = chat.tokenizer(chat.prompt(messages), return_tensors="pt")
            with torch.no_grad():
                ids = chat.model.generate(**inputs, max_new_tokens=96, do_sample=False)
            text = chat.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            asked.append((topic, turn.question))
            answers.append(text)
            messages.append({"role": "assistant", "content": text})
        out.append(chat.routed(asked, answers, topic))
    return out


def show(result: dict, prefix: str = "") -> None:
    """The measures as a table."""
    for key, value in result.items():
        if isinstance(value, dict):
            show(value, f"{prefix}{key}.")
        else:
            print(
                f"{prefix + key:55} {value:.4f}" if isinstance(value, float) else f"{prefix + key:55} {value}"
            )


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLED, help="folder of the model")
    parser.add_argument("--write-trace", type=Path, help="write the routing of the test conversations here")
    parser.add_argument("--questions", default="heldout", help="name of the set of questions: heldout or dev")
    parser.add_argument("--verbose", action="store_true", help="print every answer")
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    assert len(FACT_TOPICS) >= 4
    result = evaluate(args.model, args.verbose, args.questions, args.write_trace)
    show(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
