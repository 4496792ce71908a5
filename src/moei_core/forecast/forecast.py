"""The forecast: tokens a second and time to the first token, from shape, machine, budget and routing.

The cost model is the simulator's (one compute lane, one disk), in closed form: in each layer the resident experts are
computed while the missing ones are read one after the other, and each of those is computed when it has arrived. Every
term is a time that was measured on this machine for this size of work, times how often the work is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moei_core.config import PREFILL_CHUNK, ExpertBudget, format_size
from moei_core.errors import DoesNotFitError
from moei_core.forecast.formats import FORMATS, QUANTISED, StorageFormat
from moei_core.forecast.gpu import GPU_MODEL_ERROR, GpuPlan, decode_on_gpu, prefill_on_gpu
from moei_core.forecast.limits import MODEL_ERROR, limits
from moei_core.forecast.parts import ExpertTimes, Parts
from moei_core.forecast.routing import Range, Routing, routing_of
from moei_core.forecast.shape import ModelShape
from moei_core.forecast.speed import Speeds
from moei_core.hardware.budget import MemoryUse, SlotBudget, plan_slots, prefill_chunk, workspace_nbytes
from moei_core.prefetch import PrefillStream

_DENSE_MATRICES = 6
"""Matrices of a layer's dense part: four of attention, two or three of a shared expert. Only their size counts."""
_SLOT_SLACK = 8192
"""What page alignment costs a slot, in bytes."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect. residency: share of each layer's experts that stays, in RAM or on a GPU. hit: of decode lookups.

    tokens_per_s, ttft_s (seconds of a cold prompt of ``prompt_tokens``) and warm_ttft_s are ranges; decode and
    prefill split their expected times. limits: what takes most of a token's, one name or two that may be as large.
    gpu: what a GPU would hold, None without one; gpu_hit: lookups that find their expert there.
    """

    form: StorageFormat
    budget: SlotBudget
    prompt_tokens: int
    residency: float
    hit: Range
    tokens_per_s: Range
    ttft_s: Range
    warm_ttft_s: Range
    decode: Parts
    prefill: Parts
    limits: tuple[str, ...]
    gpu: GpuPlan | None = None
    gpu_hit: float = 0.0


def plan_budget(
    shape: ModelShape,
    form: StorageFormat,
    speeds: Speeds,
    usable: int,
    context: int,
    ram: int | None = None,
    experts: ExpertBudget | None = None,
    *,
    on_gpu: bool = False,
) -> SlotBudget:
    """The budget that loading the model would come to. usable: bytes free before anything is loaded.

    on_gpu: dense part, keys and values are there. Raises: DoesNotFitError.
    """
    slot = shape.expert_nbytes(form) + _SLOT_SLACK
    dense = 0 if on_gpu else shape.dense_nbytes(form)
    process = speeds.framework.process_nbytes + dense
    workspace = workspace_nbytes(shape.config, shape.top_k, context, 2, slot, shape.eager_attention)
    kv = 0 if on_gpu else shape.kv_nbytes_per_token * context
    chunk = prefill_chunk(shape.config, shape.top_k, context, 2, shape.eager_attention)
    use = MemoryUse(process, kv, workspace, dense, context, chunk)
    if ram is None and usable < process:
        raise DoesNotFitError(
            f"The dense part alone is larger than the free memory: {format_size(process)} of {format_size(usable)}.",
            "Attention, norms, routers and embeddings stay in RAM for every token.",
            "Close other programs, or choose a smaller model: moei plan --compare.",
        )
    return plan_slots(shape.spec(form), slot, use, usable - process, ram, experts)


def forecast(
    shape: ModelShape,
    form: StorageFormat,
    speeds: Speeds,
    budget: SlotBudget,
    prompt_tokens: int,
    routing: Routing | None = None,
    gpu: GpuPlan | None = None,
) -> Forecast:
    """What the model does with ``budget``. routing: None for the one that fits it. gpu: what a GPU takes over."""
    routing = routing or routing_of(shape.experts, shape.top_k, uniform=shape.uniform_routing)
    nearer = 0.0 if gpu is None else gpu.budget.resident / shape.total_experts
    # What moves up to the GPU ages out of RAM: together they hold as many as they have places.
    residency = min(1.0, nearer + budget.resident / shape.total_experts)
    hit, here = routing.hit(residency), routing.hit(nearer)
    decode = {
        name: _decode(shape, form, speeds, rate, prompt_tokens, name)
        if gpu is None
        else decode_on_gpu(shape, form, speeds, gpu, (there, rate), prompt_tokens, name)
        for name, rate, there in (
            ("low", hit.high, here.high),
            ("value", hit.value, here.value),
            ("high", hit.low, here.low),
        )
    }
    cold, warm = (
        {
            name: _prefill(shape, form, speeds, routing, residency, budget, prompt_tokens, name, cold=is_cold)
            if gpu is None
            else _prefill_on_gpu(
                shape,
                form,
                speeds,
                routing,
                (nearer, residency),
                gpu,
                budget,
                prompt_tokens,
                name,
                cold=is_cold,
            )
            for name in ("low", "value", "high")
        }
        for is_cold in (True, False)
    )
    error = 1 + (MODEL_ERROR if gpu is None else GPU_MODEL_ERROR)
    return Forecast(
        form,
        budget,
        prompt_tokens,
        residency,
        hit,
        Range(1 / (decode["high"].total * error), 1 / decode["value"].total, error / decode["low"].total),
        _seconds(cold, error),
        _seconds(warm, error),
        decode["value"],
        cold["value"],
        limits(decode["value"].sizes, (decode["low"].sizes, decode["high"].sizes)),
        gpu,
        here.value if gpu is not None else 0.0,
    )


def _seconds(parts: dict[str, Parts], error: float) -> Range:
    # A prompt that uses fewer experts can take longer: below a certain share the next layer's are not read ahead.
    totals = [one.total for one in parts.values()]
    return Range(min(totals) / error, parts["value"].total, max(totals) * error)


def _decode(
    shape: ModelShape, form: StorageFormat, speeds: Speeds, hit: float, position: int, bound: str
) -> Parts:
    """Seconds of one token. bound: which end of the disk's range."""
    cost, layers, lookups = speeds.framework, shape.moe_layers, shape.top_k
    times = ExpertTimes.of(shape, form, speeds, 1)
    attention = _attention(shape, speeds, position)
    through = shape.layer_nbytes(form)
    framework = shape.layers * cost.layer(through, native=shape.native_attention)
    framework += cost.token + cost.sampling * shape.vocab_size
    wait = computing = handling = 0.0
    for missing in range(lookups + 1):
        chance = math.comb(lookups, missing) * (1 - hit) ** missing * hit ** (lookups - missing)
        reading = speeds.read(shape.expert_nbytes(form), missing)
        wait += chance * times.wait(lookups - missing, missing, getattr(reading, bound))
        computing += chance * times.computing(lookups - missing, missing)
        handling += chance * missing * times.handling
    dense = _dense(shape, form, speeds, 1, 1) + _expansion(shape, form, speeds, position) + attention
    return Parts(layers * wait, layers * computing, dense, framework + layers * handling)


def _dense(shape: ModelShape, form: StorageFormat, speeds: Speeds, rows: int, heads: int) -> float:
    """Seconds of the dense products of one pass over ``rows`` tokens, logits for ``heads`` of them."""
    stored, weights = shape.dense_in(form), shape.active_weights - shape.head_weights
    matrix = weights / (shape.layers * _DENSE_MATRICES)
    body = shape.layers * _DENSE_MATRICES * speeds.product(stored, matrix, rows)
    return body + speeds.product(stored, shape.head_weights, heads)


def _attention(shape: ModelShape, speeds: Speeds, position: int) -> float:
    """Seconds in which one token's queries meet keys and values of all tokens before it."""
    reading = position * shape.kv_nbytes_per_token / speeds.memory_bandwidth
    text = shape.config
    if not text.get("kv_lora_rank") or not shape.native_attention:
        return reading
    # Latents, few bytes, meet every head twice: two products with as many rows as there are heads.
    weights = position * (2 * text["kv_lora_rank"] + text["qk_rope_head_dim"])
    return max(reading, shape.layers * speeds.product(FORMATS["bf16"], weights, text["num_attention_heads"]))


_STEADY_ROWS = 64


def _expansion(shape: ModelShape, form: StorageFormat, speeds: Speeds, position: int) -> float:
    """Seconds for one token of the keys and values of all tokens before it, where attention keeps them compressed:
    transformers expands them anew each time, float weights on one thread."""
    weights = shape.expansion_weights
    stored = shape.dense_in(form)
    rows = -(-position // _STEADY_ROWS) * _STEADY_ROWS
    threads = 1 if stored.name in QUANTISED else speeds.cores
    return shape.layers * threads * speeds.product(stored, weights, rows) if weights else 0.0


def _prefill(
    shape: ModelShape,
    form: StorageFormat,
    speeds: Speeds,
    routing: Routing,
    residency: float,
    budget: SlotBudget,
    tokens: int,
    bound: str,
    *,
    cold: bool,
) -> Parts:
    """Seconds of a prompt. cold: the cache is empty, so the first chunk reads every expert that it touches, into
    slots that were never used."""
    cost, chunk, slots = speeds.framework, budget.prefill_chunk, budget.slots
    disk = experts = dense = framework = 0.0
    for number in range(math.ceil(tokens / chunk)):
        rows = min(chunk, tokens - number * chunk)
        touched = shape.experts * getattr(routing.touched(rows), bound)
        first = cold and number == 0
        missing = touched * (1.0 if first else 1 - residency)
        times = ExpertTimes.of(shape, form, speeds, rows * shape.top_k / touched)
        experts += shape.moe_layers * times.computing(touched - missing, missing)
        # An empty cache has slots that were never used, but no more than there are.
        fresh = min(missing, slots / shape.moe_layers) if first else 0.0
        reading = getattr(speeds.read(shape.expert_nbytes(form), fresh, fresh=True), bound)
        reading += getattr(speeds.read(shape.expert_nbytes(form), missing - fresh), bound)
        alone = shape.moe_layers * times.wait(touched - missing, missing, reading)
        body = _dense(shape, form, speeds, rows, 1)
        # Scores and their sums: 4 operations for each pair of positions, head and dimension.
        pairs = rows * (number * chunk + rows / 2)
        body += 4 * pairs * shape.heads_width * shape.layers / speeds.arithmetic_rate()
        dense += body
        # Streamed, the experts of all layers are one long reading beside all computing but the first dense part.
        computing = shape.moe_layers * times.computing(touched - missing, missing) - times.arriving
        around = shape.layers * cost.prefill_layer * max(1.0, rows / PREFILL_CHUNK)
        framework += around + cost.token + shape.moe_layers * missing * times.handling
        beside = (body + around) * (1 - 1 / shape.layers)
        together = min(alone, max(0.0, shape.moe_layers * reading - computing - beside))
        ahead = _streamed(rows, touched / shape.experts, missing, slots, shape, first=first)
        disk += ahead * together + (1 - ahead) * alone
    framework += cost.sampling * shape.vocab_size + (cost.first_pass if cold else 0.0)
    return Parts(disk, experts, dense, framework)


def _prefill_on_gpu(
    shape: ModelShape,
    form: StorageFormat,
    speeds: Speeds,
    routing: Routing,
    residency: tuple[float, float],
    gpu: GpuPlan,
    budget: SlotBudget,
    tokens: int,
    bound: str,
    *,
    cold: bool,
) -> Parts:
    """Seconds of a prompt. residency: shares of the experts that the GPU holds, and that it or RAM holds."""
    total = Parts(0.0, 0.0, 0.0, speeds.framework.sampling * shape.vocab_size)
    for before in range(0, tokens, budget.prefill_chunk):
        rows = min(budget.prefill_chunk, tokens - before)
        touched = shape.experts * getattr(routing.touched(rows), bound)
        absent = (1.0, 1.0) if cold and not before else (1 - residency[0], 1 - residency[1])
        total += prefill_on_gpu(shape, form, speeds, gpu, touched, absent, rows, before, bound)
    return total


def _streamed(
    rows: int, share: float, missing: float, slots: int, shape: ModelShape, *, first: bool
) -> float:
    """Which part of a prompt's reading goes on through the layers, as far as free slots allow.

    share: of a layer's experts that the prompt uses. The slots of an empty cache are free until residents have them;
    later only the working set is, and what residents lend.
    """
    if share < PrefillStream.CERTAIN or not missing:
        return 0.0
    lent = PrefillStream.lent(rows, slots, shape.experts * shape.moe_layers, shape.moe_layers)
    working = min(1.0, (shape.top_k + lent) / missing)
    return max(working, 1 - missing / slots) if first else working


def corrected(one: Forecast, decode_factor: float, ttft_factor: float) -> Forecast:
    """``one`` with what this machine has taught about earlier forecasts. Factors of the true times."""

    def scaled(span: Range, factor: float) -> Range:
        return Range(span.low * factor, span.value * factor, span.high * factor)

    return replace(
        one,
        tokens_per_s=scaled(one.tokens_per_s, 1 / decode_factor),
        ttft_s=scaled(one.ttft_s, ttft_factor),
        warm_ttft_s=scaled(one.warm_ttft_s, ttft_factor),
    )
