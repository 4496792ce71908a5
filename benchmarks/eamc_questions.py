"""MoE-Infinity's open questions, asked of a trace with several tasks: plots and one line of JSON.

    python benchmarks/eamc_questions.py TRACE --out docs/figures [--sequences 40] [--skip 60] [--length 40]

Capacity of the collection (1 to 200), the number of nearest entries m, residency, what several users do to
request-level evidence, how many requests a change of task costs, and what decay of history is best. Recall is
the share of a layer's experts among the top-k predicted one layer ahead; hit rates are those of caches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moei_core.cache.expert_cache import ExpertCache
from moei_core.cache.policies import POLICIES
from moei_core.cache.policies.activation_aware import ActivationAware
from moei_core.cache.policies.base import CachePolicy
from moei_core.cache.policies.lfu import DecayedLFU
from moei_core.predict.base import ExpertPredictor, PassEvent, RequestEvent
from moei_core.predict.eamc import EAMCPredictor
from moei_core.predict.markov import MarkovPredictor, PopularityPredictor
from moei_core.scheduler import ExpertScheduler
from moei_core.sim.replay import passes, replay
from moei_core.sim.sweep import interleaved
from moei_core.trace import Trace, read_trace


def in_task_order(trace: Trace, count: int, skip: int, length: int) -> Trace:
    """``count`` sequences, equally many of each task, task after task, each cut to ``length`` tokens.

    The first ``skip`` tokens of each are left out: prompts of one task begin with the same words, and a cache
    that has learned those by heart would be mistaken for one that has learned the task.
    """
    tasks = sorted(set(trace.sequence_tasks))
    each = max(1, count // len(tasks))
    offsets = trace.sequence_offsets
    long = [at for at in range(trace.sequences) if offsets[at + 1] - offsets[at] > skip]
    chosen = [at for task in tasks for at in [i for i in long if trace.sequence_tasks[i] == task][:each]]
    pieces = [
        np.arange(offsets[at] + skip, min(offsets[at] + skip + length, offsets[at + 1])) for at in chosen
    ]
    bounds = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return replace(
        trace,
        experts=trace.experts[np.concatenate(pieces)],
        sequence_offsets=bounds,
        sequence_tasks=tuple(trace.sequence_tasks[at] for at in chosen),
    )


def recalls(trace: Trace, predictor: ExpertPredictor) -> list[float]:
    """Recall one layer ahead, a number for each request."""
    found: list[list[float]] = []
    for one in passes(trace):
        if one.starts_request:
            if one.index:
                predictor.observe(RequestEvent(start=False))
            predictor.observe(RequestEvent(start=True))
            found.append([])
        predictor.observe(PassEvent(one.phase))
        hits = total = 0
        for at, access in enumerate(one.accesses):
            if at:
                predicted = {key.expert for key, _ in predictor.predict(access.layer)[: len(access.experts)]}
                hits += len(predicted & set(access.experts))
                total += len(access.experts)
            predictor.observe(access)
        found[-1].append(hits / total)
    return [float(np.mean(request)) for request in found]


def hit_rate(trace: Trace, policy: CachePolicy, slots: int) -> float:
    scheduler = ExpertScheduler(ExpertCache(slots, policy), trace.num_experts_per_tok)
    replay(trace, scheduler)
    return scheduler.statistics.hit_rate


def answers(trace: Trace) -> Iterator[tuple[str, Any]]:
    experts, layers = trace.experts_by_layer, len(trace.moe_layers)
    quarter = trace.num_experts // 4 * layers
    yield (
        "capacity",
        {
            capacity: (
                float(np.mean(recalls(trace, EAMCPredictor(experts, capacity=capacity, match="request")))),
                hit_rate(trace, ActivationAware(quarter, experts, collection=capacity), quarter),
            )
            for capacity in (1, 2, 5, 10, 20, 50, 120, 200)
        },
    )
    yield (
        "nearest",
        {
            nearest: float(np.mean(recalls(trace, EAMCPredictor(experts, nearest=nearest, match="request"))))
            for nearest in (1, 2, 3, 5, 10, 20)
        },
    )
    yield (
        "match",
        {
            match: float(np.mean(recalls(trace, EAMCPredictor(experts, match=match))))
            for match in ("pass", "request")
        },
    )
    by_request = {
        "EAMC": recalls(trace, EAMCPredictor(experts, match="request")),
        "Markov": recalls(trace, MarkovPredictor(experts)),
        "popularity": recalls(trace, PopularityPredictor(experts)),
    }
    yield "predictors", {name: float(np.mean(values)) for name, values in by_request.items()}
    yield "by_request", by_request
    yield (
        "residency",
        {
            share: {
                name: hit_rate(trace, POLICIES[name](slots, experts), slots)
                for name in ("layer-lru", "request-lfu", "activation-aware", "learned")
            }
            for share in (10, 25, 50, 75)
            for slots in [trace.num_experts * share // 100 * layers]
        },
    )

    def decayed(decay: float) -> CachePolicy:
        policy = DecayedLFU(quarter, experts)
        policy.decay = decay
        return policy

    yield (
        "decay",
        {decay: hit_rate(trace, decayed(decay), quarter) for decay in (0.5, 0.8, 0.9, 0.95, 0.98, 0.995)},
    )
    yield (
        "users",
        {
            users: {
                name: hit_rate(interleaved(trace, users), POLICIES[name](quarter, experts), quarter)
                for name in ("layer-lru", "request-lfu", "activation-aware", "learned")
            }
            for users in (1, 2, 4, 8)
        },
    )


def plot(found: dict[str, Any], tasks: tuple[str, ...], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(name: str, **labels: str) -> None:
        axes.set(**labels)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png")
        plt.close(figure)

    size = {"figsize": (5, 3), "dpi": 90}
    figure, axes = plt.subplots(**size)
    for at, label in enumerate(("recall one layer ahead", "hit rate at 25%")):
        axes.plot(
            list(found["capacity"]), [pair[at] for pair in found["capacity"].values()], "o-", label=label
        )
    axes.set_xscale("log")
    save("eamc-capacity", xlabel="entries in the collection", ylabel="share", title="EAMC capacity")
    figure, axes = plt.subplots(**size)
    for name, values in found["by_request"].items():
        axes.plot(values, label=name, linewidth=1)
    for at in range(1, len(tasks)):
        if tasks[at] != tasks[at - 1]:
            axes.axvline(at - 0.5, color="grey", linewidth=0.7)
    save("eamc-adaptation", xlabel="request (lines: the task changes)", ylabel="recall", title="Adaptation")
    for key, label in (("residency", "experts resident (%)"), ("users", "users mixed token by token")):
        figure, axes = plt.subplots(**size)
        for name in next(iter(found[key].values())):
            axes.plot(list(found[key]), [row[name] for row in found[key].values()], "o-", label=name)
        save(f"eamc-{key}", xlabel=label, ylabel="hit rate", title=key.capitalize())
    figure, axes = plt.subplots(**size)
    axes.plot(list(found["nearest"]), list(found["nearest"].values()), "o-", label="m nearest: recall")
    axes.plot(
        [1 / (1 - d) for d in found["decay"]],
        list(found["decay"].values()),
        "s-",
        label="decay: hit rate, by 1/(1-decay)",
    )
    axes.set_xscale("log")
    save("eamc-sensitivity", xlabel="m, or tokens remembered", ylabel="share", title="Sensitivity")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--skip", type=int, default=60)
    parser.add_argument("--length", type=int, default=40)
    options = parser.parse_args()
    trace = in_task_order(read_trace(options.trace), options.sequences, options.skip, options.length)
    found: dict[str, Any] = {}
    for key, value in answers(trace):
        found[key] = value
        if key != "by_request":
            print(key, value, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    plot(found, trace.sequence_tasks, options.out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
