"""Trains moei-demo, the bundled demonstration model, from scratch on two CPU cores.

    python tools/train_demo.py --out src/moei_core/bundled/moei-demo

One pass over conversations drawn from `tools/demo_corpus`, single questions first, with a learning rate that
rises and falls once; nothing is downloaded.

Beside the usual loss on the answers there are two terms on the router: one keeps all experts in use (load
balancing), the other raises the mutual information between a question's topic and the experts used for it, up
to a target, so that topics can be told apart by their experts while no topic owns an expert. A further term,
from a small head that is thrown away afterwards, asks the third layer which fact is wanted just before the
answer begins; it makes the model learn to read the question long before the answers' wording alone would.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_corpus.build import Conversation, Corpus
from demo_corpus.grammar import TOPICS
from demo_model import DemoConfig, DemoModel

SEED = 7
#: About 21 million tokens, 50 minutes at 7,000 tokens/s.
CONVERSATIONS = 270_000
#: The share of conversations that come first and are single questions.
EASY = 0.1
HIGHEST_RATE = 3e-3

END, START, END_OF_TEXT = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
MAX_CONTEXT = 2048
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@dataclass
class Sample:
    """An encoded conversation: ids, which of them are learnt, their topics, and each answer's meaning."""

    ids: np.ndarray
    learn: np.ndarray
    topic: np.ndarray
    meanings: list[int]


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer that splits numbers into digits."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok


def encode(conversations: list[Conversation], tok: Tokenizer, seed: int) -> list[Sample]:
    """Token ids in the chat format; a part of the questions is split less regularly (BPE dropout)."""
    questions = [t.question for c in conversations for t in c.turns]
    answers = [e.ids for e in tok.encode_batch([t.answer for c in conversations for t in c.turns])]
    plain = [e.ids for e in tok.encode_batch(questions)]
    rng = random.Random(seed)
    odd = [i for i in range(len(questions)) if rng.random() < 0.2]
    tok.model.dropout = 0.1
    for i, e in zip(odd, tok.encode_batch([questions[i] for i in odd]), strict=True):
        plain[i] = e.ids
    tok.model.dropout = None
    end, newline = tok.token_to_id(END), tok.encode("\n").ids
    user = tok.encode(f"{START}user\n").ids
    assistant = tok.encode(f"{START}assistant\n").ids
    systems = {}
    out, at = [], 0
    for c in conversations:
        ids, learn, topic = [], [], []
        if c.system:
            if c.system not in systems:
                systems[c.system] = tok.encode(f"{START}system\n{c.system}{END}\n").ids
            ids += systems[c.system]
            learn += [0] * len(ids)
            topic += [-1] * len(ids)
        for t in c.turns:
            head = user + plain[at] + [end] + newline + assistant
            tail = answers[at] + [end]
            ids += head + tail + newline
            learn += [0] * len(head) + [1] * len(tail) + [0] * len(newline)
            topic += [-1] * len(user) + [TOPICS.index(t.topic)] * (len(ids) - len(topic) - len(user))
            at += 1
        out.append(
            Sample(
                np.array(ids, np.int16),
                np.array(learn, bool),
                np.array(topic, np.int8),
                [t.meaning for t in c.turns],
            )
        )
    return out


def batches(samples: list[Sample], tokens: int, seed: int) -> list[list[Sample]]:
    """Groups of similar length with at most `tokens` tokens after padding, in random order."""
    rng = random.Random(seed)
    out = []
    for at in range(0, len(samples), 4096):
        pool = sorted(samples[at : at + 4096], key=lambda s: len(s.ids))
        groups, group = [], []
        for s in pool:
            if group and len(s.ids) * (len(group) + 1) > tokens:
                groups.append(group)
                group = []
            group.append(s)
        rng.shuffle(groups)
        out += groups
    return out


def collate(group: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask of the positions whose successor is learnt, topics, all padded on the right, and meanings."""
    width = max(len(s.ids) for s in group)
    ids = torch.zeros(len(group), width, dtype=torch.long)
    learn = torch.zeros(len(group), width, dtype=torch.bool)
    topic = torch.full((len(group), width), -1, dtype=torch.long)
    for i, s in enumerate(group):
        n = len(s.ids)
        ids[i, :n] = torch.from_numpy(s.ids.astype(np.int64))
        learn[i, : n - 1] = torch.from_numpy(s.learn[1:])
        topic[i, :n] = torch.from_numpy(s.topic.astype(np.int64))
    return ids, learn, topic, torch.tensor([m for s in group for m in s.meanings])


def router_terms(probs: torch.Tensor, choice: torch.Tensor, topic: torch.Tensor):
    """Load-balancing loss, mutual information of topic and expert (nats), and the experts' shares of use."""
    known = topic >= 0
    probs, choice, topic = probs[known], choice[known], topic[known]
    share = torch.bincount(choice.reshape(-1), minlength=probs.shape[1]).float() / choice.numel()
    balance = probs.shape[1] * (share * probs.mean(0)).sum()
    belongs = F.one_hot(topic, len(TOPICS)).float()
    count = belongs.sum(0)
    seen = count > 0
    by_topic = (belongs.t() @ probs)[seen] / count[seen, None]
    mean = by_topic.mean(0)
    information = (by_topic * (by_topic + 1e-9).log()).sum(1).mean() - (mean * (mean + 1e-9).log()).sum()
    return balance, information, share


def train(
    model: DemoModel,
    groups: list[list[Sample]],
    args: argparse.Namespace,
    keep: Callable[[], None],
) -> None:
    """One pass over the groups; `keep` is called now and then to save what there is."""
    reader = torch.nn.Linear(model.c.hidden, Corpus(args.seed).meanings)
    decay = [p for p in model.parameters() if p.dim() > 1] + [reader.weight]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    total, seen, began = len(groups), 0, time.time()
    stats: list[tuple[float, ...]] = []
    for step, group in enumerate(groups):
        warm = min(1.0, (step + 1) / 100)
        rate = args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        for g in optimizer.param_groups:
            g["lr"] = rate
        ids, learn, topic, meaning = collate(group)
        hidden, probs, choices, states = model(ids)
        logits = F.linear(hidden[learn], model.embed)
        targets = ids.roll(-1, dims=1)[learn]
        loss = F.cross_entropy(logits, targets)
        first = learn & ~learn.roll(1, dims=1)
        read = reader(F.rms_norm(states[-2][first], (model.c.hidden,)))
        reading = F.cross_entropy(read, meaning)
        understood = (read.argmax(-1) == meaning).float().mean()
        flat = topic.reshape(-1)
        terms = [router_terms(p, c, flat) for p, c in zip(probs, choices, strict=True)]
        balance = torch.stack([t[0] for t in terms]).mean()
        information = torch.stack([t[1] for t in terms])
        lack = (args.information - information).clamp(min=0).mean()
        (loss + args.reading * reading + args.balance * balance + args.topic * lack).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        least = min(float(t[2].min()) * t[2].numel() for t in terms)
        stats.append((float(loss.detach()), float(understood), float(information.detach().mean()), least))
        if step % 50 == 49 or step + 1 == total:
            mean = np.mean(stats, axis=0)
            spent = time.time() - began
            print(
                f"step {step + 1}/{total} loss {mean[0]:.4f} understood {mean[1]:.3f} "
                f"information {mean[2]:.3f} least expert {mean[3]:.2f} "
                f"{seen / spent:.0f} tokens/s {spent / 60:.1f} min",
                flush=True,
            )
            stats.clear()
        if step % 400 == 399:
            keep()


def save(model: DemoModel, tok: Tokenizer, folder: Path) -> None:
    """Writes weights, tokenizer, chat template and configuration in the published layout."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16) for k, v in model.to_hf_state().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"eos_token_id": tok.token_to_id(END), "pad_token_id": tok.token_to_id(END_OF_TEXT)}
    config = model.hf_config() | {"bos_token_id": None} | ids
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, "max_new_tokens": 128} | ids
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START],
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def check_same(model: DemoModel, folder: Path) -> float:
    """The largest difference of logits between this code and the published implementation, in float32."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    state = model.to_hf_state()
    with torch.no_grad():
        reference.eval()
        rounded = DemoModel(model.c)
        rounded.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()})
        ids = torch.randint(0, model.c.vocab, (4, 64), generator=torch.Generator().manual_seed(1))
        ours = F.linear(rounded(ids)[0], rounded.embed)
        worst = float((reference(ids).logits - ours).abs().max())
    assert worst < 1e-4, f"logits differ by {worst}"
    assert len(state) == 3 * model.c.layers * model.c.experts + 9 * model.c.layers + 2
    return worst


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--batch", type=int, default=3072, help="tokens per step, padding included")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rate", type=float, default=HIGHEST_RATE, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument(
        "--reading", type=float, default=0.5, help="weight of telling which fact is asked for"
    )
    parser.add_argument("--balance", type=float, default=0.02)
    parser.add_argument("--topic", type=float, default=1.5, help="weight of the information term")
    parser.add_argument("--information", type=float, default=1.1, help="its target, in nats")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    began = time.time()
    model = DemoModel(DemoConfig(max_positions=MAX_CONTEXT))
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    conversations = list(Corpus(args.seed).conversations(args.conversations, EASY))
    some = conversations[:: max(1, len(conversations) // 40_000)]
    tok = train_tokenizer([x for c in some for t in c.turns for x in (t.question, t.answer)], model.c.vocab)
    samples = encode(conversations, tok, args.seed)
    groups = batches(samples, args.batch, args.seed)
    print(
        f"{len(conversations)} conversations, {sum(len(s.ids) for s in samples)} tokens, "
        f"{sum(int(s.learn.sum()) for s in samples)} learnt, {len(groups)} steps",
        flush=True,
    )
    train(model, groups, args, functools.partial(save, model, tok, args.out))
    save(model, tok, args.out)
    print(f"logits differ from transformers by {check_same(model, args.out):.1e}")
    print(f"done in {(time.time() - began) / 60:.1f} min")
    return 0


#: Threads that wait without spinning, and freed memory that is kept: both speed up training on a shared CPU.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

if __name__ == "__main__":
    if any(os.environ.get(k) != v for k, v in _ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ENVIRONMENT})
    sys.exit(main())
