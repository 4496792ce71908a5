"""Where the time of a turn went, so that every millisecond has a name."""

from __future__ import annotations

from moei_core.engine.generate import GenerationTimes
from moei_core.engine.statistics import RuntimeStatistics


def time_split(times: GenerationTimes, work: RuntimeStatistics, total_s: float) -> dict[str, float]:
    """Seconds by part, in the order of a token's way; together they are ``total_s``.

    dense: attention, norms, routers, embeddings and the Python of transformers around them. experts: their
    products. disk: waiting for experts. decisions: cache, policy, predictor. moving: asking for experts and
    giving slots out, which is not waiting. combining: gathering the rows of experts and summing their outputs. gpu,
    with one: waiting for it at each router, for dense parts and experts that it computed meanwhile. unexplained:
    everything that none of these clocks saw.
    """
    known = {
        "dense": times.prefill_s + times.decode_s - work.layers_s - work.device_wait_s,
        "experts": work.expert_compute_s,
        "disk": work.stall_s,
        "decisions": work.decide_s,
        "moving": work.move_s,
        "combining": work.combine_s,
        "sampling": times.sampling_s,
    }
    if work.device_wait_s:
        known["gpu"] = work.device_wait_s
    return known | {"unexplained": total_s - sum(known.values())}


def decode_shares(times: GenerationTimes, work: RuntimeStatistics) -> tuple[float, float, float]:
    """Shares of the time after the first token: waiting for experts, computing them in RAM, waiting for a GPU.

    work: of the whole request.
    """
    spent = times.decode_s + times.sampling_s
    if not spent:
        return 0.0, 0.0, 0.0
    later = work.minus(times.prefill_work)
    return later.stall_s / spent, later.expert_compute_s / spent, later.device_wait_s / spent


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median, 90th and 99th percentile, by their names; nothing of nothing."""
    ordered = sorted(seconds)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 5)
        for share in (50, 90, 99)
        if ordered
    }
