"""Which experts the model used: topics in the routing, a replayed LRU cache, and the trace file."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file


@dataclass
class Routed:
    """The experts used in one conversation.

    `experts` is [tokens, layers, top-k]; `decode` marks the tokens that were generated and fed back;
    `requests` and `passes` hold the first token of each request and of each forward pass.
    """

    topic: str
    experts: np.ndarray
    decode: np.ndarray
    requests: list[int]
    passes: list[int]


def activation_matrix(r: Routed, experts: int) -> np.ndarray:
    """Counts of routed tokens, layers by experts, over prefill and decode, as one vector."""
    layers = r.experts.shape[1]
    counts = [np.bincount(r.experts[:, layer].ravel(), minlength=experts) for layer in range(layers)]
    return np.stack(counts).astype(np.float64).ravel()


def topic_test(
    requests: list[Routed], experts: int, triples: int = 20_000, seed: int = 5
) -> dict[str, float]:
    """How often requests of a topic are more alike than of different topics; also with shuffled labels."""
    matrix = np.stack([activation_matrix(r, experts) for r in requests])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    alike = matrix @ matrix.T
    labels = np.array([r.topic for r in requests])
    rng = np.random.default_rng(seed)

    def share(labels: np.ndarray) -> float:
        wins = 0
        for _ in range(triples):
            a = rng.integers(len(labels))
            same = np.flatnonzero((labels == labels[a]) & (np.arange(len(labels)) != a))
            other = np.flatnonzero(labels != labels[a])
            wins += alike[a, rng.choice(same)] > alike[a, rng.choice(other)]
        return wins / triples

    topics = sorted(set(labels))
    off = ~np.eye(len(labels), dtype=bool)
    mean = np.array([[alike[np.ix_(labels == s, labels == t)][off[np.ix_(labels == s, labels == t)]].mean()
                      for t in topics] for s in topics])  # fmt: skip
    within = np.diag(mean)
    pairs = [within[i] > mean[i, j] for i in range(len(topics)) for j in range(len(topics)) if i != j]
    return {
        "triples_within_above_across": share(labels),
        "triples_shuffled": share(rng.permutation(labels)),
        "topic_mean_pairs": float(np.mean(pairs)),
        "mean_similarity_within": float(within.mean()),
        "mean_similarity_across": float(mean[~np.eye(len(topics), dtype=bool)].mean()),
    }


def lru_hit_rate(accesses: np.ndarray, capacity: int) -> float:
    """Hit rate of one LRU cache per layer; an access is one token in one layer, all its experts at once."""
    hits = total = 0
    for layer in range(accesses.shape[1]):
        cache: OrderedDict[int, None] = OrderedDict()
        for chosen in accesses[:, layer].tolist():
            hits += sum(e in cache for e in chosen)
            total += len(chosen)
            for e in chosen:
                cache[e] = None
                cache.move_to_end(e)
            while len(cache) > capacity:
                cache.popitem(last=False)
    return hits / total


def least_share(requests: list[Routed], experts: int) -> float:
    """The smallest share of routed tokens of any expert in any layer, relative to a uniform share."""
    used = np.concatenate([r.experts for r in requests])
    counts = [np.bincount(used[:, layer].ravel(), minlength=experts) for layer in range(used.shape[1])]
    return float(min(c.min() / c.mean() for c in counts))


def write_trace(path: Path, conversations: list[Routed], experts: int, source: str, note: str) -> None:
    """The trace file, version 1; see the module that reads traces for its meaning."""
    sequence, request, passes = [0], [], []
    for r in conversations:
        request += [sequence[-1] + i for i in r.requests]
        passes += [sequence[-1] + i for i in r.passes]
        sequence.append(sequence[-1] + len(r.experts))
    used = np.sort(np.concatenate([r.experts for r in conversations]), axis=2)
    end = sequence[-1]
    tensors = {
        "experts": np.ascontiguousarray(used.astype(np.uint8)),
        "phase": np.concatenate([r.decode for r in conversations]).astype(np.uint8),
        "sequence_offsets": np.array(sequence, np.int64),
        "request_offsets": np.array([*request, end], np.int64),
        "pass_offsets": np.array([*passes, end], np.int64),
    }
    metadata = {
        "format": "moei-trace",
        "version": "1",
        "model": "moei-demo",
        "num_experts": str(experts),
        "num_experts_per_tok": str(used.shape[2]),
        "moe_layers": json.dumps(list(range(used.shape[1]))),
        "source": source,
        "note": note,
        "sequence_tasks": json.dumps([r.topic for r in conversations]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)


class RouterRecorder:
    """Collects the experts chosen in each layer while the model runs."""

    def __init__(self, model: torch.nn.Module):
        self.chosen: list[torch.Tensor] = []
        self.handles = [
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.chosen.append(out[-1]))
            for layer in model.model.layers
        ]

    def take(self) -> np.ndarray:
        """The experts of the last forward pass, [tokens, layers, top-k]."""
        out = torch.stack(self.chosen, dim=1).numpy()
        self.chosen.clear()
        return out
