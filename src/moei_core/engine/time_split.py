"""Where the time of a turn went, so that every millisecond has a name."""

from __future__ import annotations

from moei_core.engine.generate import GenerationTimes
from moei_core.engine.statistics import RuntimeStatistics


def time_split(times: GenerationTimes, work: RuntimeStatistics, total_s: float) -> dict[str, float]:
    """Seconds by part, in the order of ``PARTS``; together they are ``total_s``.

    dense: computing attention, norms, routers, embeddings and the head, in RAM. framework: the Python of transformers,
    torch and ours around that, and the launches of what a GPU computes: what is left of forward passes. experts: their
    products. disk: waiting for experts. link and gpu, with a GPU: what the engine waited for when it needed the GPU's
    results, copies of experts to it or its computing of dense parts and experts; queueing copies too. decisions: cache,
    policy, predictor, hints. moving: asking for experts and giving slots out, which is not waiting. combining:
    gathering the rows of experts and summing their outputs. unexplained: what none of these clocks saw, outside of
    forward passes: tokens to text and back.
    """
    passes = {
        "dense": work.dense_s,
        "framework": 0.0,
        "experts": work.expert_compute_s,
        "disk": work.stall_s,
        "decisions": work.decide_s,
        "moving": work.move_s,
        "combining": work.combine_s,
    }
    if work.link_s or work.device_wait_s:
        passes |= {"link": work.link_s, "gpu": work.device_wait_s}
    passes["framework"] = times.prefill_s + times.decode_s - sum(passes.values())
    known = passes | {"decisions": work.decide_s + work.turn_s, "sampling": times.sampling_s}
    return known | {"unexplained": total_s - sum(known.values())}


def decode_shares(times: GenerationTimes, work: RuntimeStatistics) -> tuple[float, float, float]:
    """Shares of the time after the first token: waiting for experts, computing them in RAM, waiting for a GPU and for
    copies to it.

    work: of the whole request.
    """
    spent = times.decode_s + times.sampling_s
    if not spent:
        return 0.0, 0.0, 0.0
    later = work.minus(times.prefill_work)
    return later.stall_s / spent, later.expert_compute_s / spent, (later.device_wait_s + later.link_s) / spent


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median, 90th and 99th percentile, by their names; nothing of nothing."""
    ordered = sorted(seconds)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 5)
        for share in (50, 90, 99)
        if ordered
    }
