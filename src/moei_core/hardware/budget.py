"""The one place that decides how memory is shared out and how many expert slots there are.

Every number carries its reason: ``SlotBudget.lines`` are the whole account, ``SlotBudget.reason`` its one-line form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moei_core.cache.expert_sizes import ExpertSizes, experts_in, slots_for
from moei_core.config import PREFILL_CHUNK, PREFILL_CHUNKS, ExpertBudget, format_size
from moei_core.errors import DoesNotFitError
from moei_core.types import ModelSpec

SYSTEM_SHARE = 10
"""One part in so many of the free memory is left to the system when nobody gave a limit."""


def kv_width(config: Mapping[str, Any]) -> int:
    """Numbers that one layer keeps of one token: its keys and values. config: fields as in ``config.json``."""
    heads = config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        # Multi-head latent attention: transformers caches the latent, and the turned key that all heads share.
        return int(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * (config.get("num_key_value_heads") or heads) * head_dim)


_LARGEST_PASS = 512 << 20


def prefill_chunk(
    config: Mapping[str, Any], top_k: int, context: int, item: int, eager_attention: bool
) -> int:
    """Tokens of a prompt that go through the model in one pass: as many as half a GiB of temporary memory serves.

    Each pass reads the absent experts that it needs once, and it needs nearly all, so a prompt in a quarter of the
    passes reads a quarter of the bytes. Depends on the model's shape and the context alone, never on a budget: other
    shapes would give other roundings (contract E1). Arguments as of ``workspace_nbytes``.
    """
    fitting = (
        chunk
        for chunk in PREFILL_CHUNKS
        if _pass_nbytes(config, top_k, context, item, chunk, eager_attention) <= _LARGEST_PASS
        # A pass can have no more tokens than the context.
        and chunk < 2 * context
    )
    return next(fitting, PREFILL_CHUNK)


def workspace_nbytes(
    config: Mapping[str, Any], top_k: int, context: int, item: int, slot_nbytes: int, eager_attention: bool
) -> int:
    """The largest temporary memory of a forward pass. item: bytes of one activation.

    eager_attention: only attention without a fused kernel holds its scores (gpt-oss: its sinks have none here).
    """
    chunk = prefill_chunk(config, top_k, context, item, eager_attention)
    expanded = 0
    if config.get("kv_lora_rank"):
        # A prompt expands the latents of one layer: the product, the keys put together; keys, and values made as wide,
        # filled up to few shapes.
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        parts = nope + value + 4 * (nope + config["qk_rope_head_dim"])
        expanded = context * (config["num_attention_heads"] * parts * item + config["kv_lora_rank"] * 6)
    # Beside what grows with the pass: the logits of one token; one expert reordered by a library.
    return (
        _pass_nbytes(config, top_k, context, item, chunk, eager_attention)
        + int(expanded)
        + 3 * int(config["vocab_size"]) * 4
        + slot_nbytes
    )


def _pass_nbytes(
    config: Mapping[str, Any], top_k: int, context: int, item: int, chunk: int, eager_attention: bool
) -> int:
    hidden, rows = config["hidden_size"], chunk * top_k
    width = max(hidden, config.get("intermediate_size") or 0)
    scores = 2 * config["num_attention_heads"] * chunk * context * 4 if eager_attention else 0
    # Expert outputs in float32 and their gathered inputs; a few activations of the widest dense layer;
    # a native product's copy of its inputs, in float32 and in int8 with scales; the attention mask.
    return int(
        rows * hidden * (4 + 4 + item) + chunk * width * (4 * item + 6) + 2 * chunk * context * item + scores
    )


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What the process needs beside expert slots, in bytes.

    process: what it holds now, of which ``dense`` are dense weights. kv: keys and values of ``context`` tokens.
    workspace: the largest temporary memory of a forward pass over ``chunk`` tokens.
    """

    process: int
    kv: int
    workspace: int
    dense: int = 0
    context: int = 0
    chunk: int = PREFILL_CHUNK

    @property
    def margin(self) -> int:
        """For what cannot be foreseen: allocator, threads' stacks, kernel memory, libraries' caches."""
        return (24 << 20) + (self.process + self.kv + self.workspace) // 50

    @property
    def total(self) -> int:
        return self.process + self.kv + self.workspace + self.margin

    def lines(self) -> list[BudgetLine]:
        """The account of ``total``."""
        context = f"keys and values of {self.context} tokens" if self.context else "keys and values"
        return [
            BudgetLine("runtime", self.process - self.dense, "Python, torch and transformers, measured"),
            BudgetLine("dense weights", self.dense, "attention, norms, routers, embeddings: for every token"),
            BudgetLine("context", self.kv, context),
            BudgetLine("workspace", self.workspace, f"the largest temporary memory of {self.chunk} tokens"),
            BudgetLine("margin", self.margin, "allocator, threads, kernel, libraries' caches: 24 MiB and 2%"),
        ]


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """One number of a budget and why it is that number."""

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class SlotBudget:
    """How many experts are held at once, and why so many.

    working: slots for misses in passing. spare: slots that prefetches arrive in. resident: slots for experts
    that stay; with slots for all experts all of them stay, and none needs to pass. limit: bytes that the
    process may hold by this budget, None if only the experts were bounded. lines: the account: what the process
    needs, then the slots. prefill_chunk: tokens of a prompt's pass, for which there is workspace. sizes: of
    unequal experts, of which more stay than there are slots (of the largest); None: a slot each.
    """

    slots: int
    working: int
    resident: int
    slot_nbytes: int
    reason: str
    spare: int = 0
    limit: int | None = None
    lines: tuple[BudgetLine, ...] = ()
    prefill_chunk: int = PREFILL_CHUNK
    sizes: ExpertSizes | None = None

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_nbytes

    @property
    def experts(self) -> int:
        """Experts that all slots hold, on average where they are unequal."""
        return experts_in(self.slots, self.sizes)


def residents(slots: int, working: int, whole: int) -> int:
    """How many of ``slots`` are for those that stay: all if they are ``whole``, which hold every expert, else all but
    those in passing."""
    return whole if slots == whole else slots - working


def plan_slots(
    spec: ModelSpec,
    slot_nbytes: int,
    use: MemoryUse,
    available: int,
    ram: int | None = None,
    experts: ExpertBudget | None = None,
    spare: int = 0,
    sizes: ExpertSizes | None = None,
) -> SlotBudget:
    """How many slots of ``slot_nbytes`` to have. sizes: of unequal experts, None: a slot for each.

    Residents give ``spare`` of theirs, if there are so many, to prefetches while a predictor is followed.

    available: bytes that can still be taken beside ``use.process``. ram: bound on the whole process. experts:
    bound on the slots alone. With both, the smaller counts; with neither, what ``available`` memory allows.
    Raises: DoesNotFitError, naming the smallest that works.
    """
    working = spec.num_experts_per_tok
    total, whole = spec.total_experts, slots_for(spec.num_experts, sizes)
    limit = ram
    bounds: list[tuple[int, str]] = [(whole, f"all {total} routed experts fit")]
    if experts is not None:
        slots = experts.slots(whole, slot_nbytes)
        asked = (
            f"{experts.fraction * 100:.3g}%"
            if experts.fraction is not None
            else format_size(experts.nbytes or 0)
        )
        if slots < working:
            smallest = f"{working / whole * 100 + 0.05:.1f}%"
            raise DoesNotFitError(
                f"--experts {asked} is too small: it pays for {slots} of {whole} experts.",
                f"One token uses {working} experts of a layer at once, "
                f"{format_size(slot_nbytes)} each, so that many slots are the least.",
                f"The smallest that works is --experts {smallest} ({_up(working * slot_nbytes)}).",
                working,
            )
        bounds.append((slots, f"--experts {asked} of {total} routed experts"))
    if ram is not None:
        slots = (ram - use.total) // slot_nbytes
        if slots < working:
            raise too_small(ram, use, working, slot_nbytes)
        bounds.append((slots, f"--ram {format_size(ram)} - {_explain(use)}"))
    elif experts is None:
        left = available // SYSTEM_SHARE
        free = available - left - use.kv - use.workspace
        if free // slot_nbytes < working:
            raise DoesNotFitError(
                f"There is not enough free memory: {format_size(available)} are available.",
                f"Beside what is loaded, {_up(use.kv + use.workspace + working * slot_nbytes)} are needed.",
                "Close other programs, or ask for a shorter context with --context.",
                working,
            )
        reason = (
            f"{format_size(available)} free memory - {format_size(left)} left to the system, "
            f"{format_size(use.kv)} context, {format_size(use.workspace)} workspace"
        )
        bounds.append((free // slot_nbytes, reason))
    slots, reason = min(bounds, key=lambda bound: bound[0])
    spare = 0 if slots == whole else min(spare, slots - working)
    count = BudgetLine("expert slots", slots * slot_nbytes, f"{slots} of {whole}: {reason}")
    lines = use.lines()
    if ram is None and experts is None:
        # The system's part is the margin then, and far larger.
        lines[-1] = BudgetLine(
            "margin", available // SYSTEM_SHARE, "a tenth of free memory, left to the system"
        )
        limit = use.process + available
    stay = residents(slots, working, whole)
    return SlotBudget(
        slots, working, stay, slot_nbytes, reason, spare, limit, (*lines, count), use.chunk, sizes
    )


LEAST_RING = 2
"""Device slots that experts pass through, at least: one is computed while the next one arrives."""
_RING_SHARE = 8
"""One in so many slots may be the ring's: with a token's experts in it a layer takes one launch, not several."""

DEVICE_MARGIN = 256 << 20
"""Of a device's memory, for what cannot be foreseen: libraries' own memory, rounding."""


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """How the memory of a device is shared out, and why so. slots: of residents, and of the ring, through which pass
    those that do not stay. prefetch: of the residents' slots, those that experts copied ahead take while a predictor
    is followed."""

    slots: int
    resident: int
    slot_nbytes: int
    reason: str
    lines: tuple[BudgetLine, ...] = ()
    prefetch: int = 0

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_nbytes


def plan_device_slots(
    total: int,
    slot_nbytes: int,
    dense: int,
    kv: int,
    workspace: int,
    free: int,
    vram: int | None = None,
    prefetch: int = 0,
    top_k: int = LEAST_RING,
) -> DeviceBudget:
    """How many of ``total`` experts a device holds beside the dense model and its keys and values, all in bytes.

    free: what can be allocated there. vram: bound on all that is allocated; a larger one than ``free`` counts as
    that. prefetch: slots wanted for experts copied ahead; at most a quarter of all. top_k: experts of a token.
    Raises: DoesNotFitError, naming the smallest ``vram``, if the dense model and the ring do not fit.
    """
    margin = DEVICE_MARGIN + (dense + kv + workspace) // 50
    use = dense + kv + workspace + margin
    limit = free if vram is None else min(vram, free)
    most = max(LEAST_RING, top_k)
    slots = min((limit - use) // slot_nbytes, total + most)
    if slots < LEAST_RING:
        asked = f"--vram {format_size(vram)}" if vram is not None and vram <= free else "Free GPU memory"
        raise DoesNotFitError(
            f"{asked}{'' if asked.startswith('--') else f' ({format_size(free)})'} is too small for this model.",
            f"On the GPU it needs {format_size(dense)} dense weights, {format_size(kv)} context, "
            f"{format_size(workspace)} workspace and {format_size(margin)} margin.",
            f"The smallest that works is --vram {_up(use + LEAST_RING * slot_nbytes)}; "
            "or run without the GPU: --device cpu.",
        )
    source = f"{format_size(free)} free GPU memory" if limit == free else f"--vram {format_size(limit)}"
    ring = slots - total if slots >= total + LEAST_RING else max(LEAST_RING, min(slots // _RING_SHARE, most))
    room = slots - ring
    prefetch = 0 if room == total else min(prefetch, room // 4)
    reason = (
        f"all {total} routed experts fit"
        if room == total
        else f"{source} - {format_size(use)} for dense weights, context, workspace and margin"
    )
    lines = (
        BudgetLine("GPU dense weights", dense, "attention, norms, routers, embeddings"),
        BudgetLine("GPU context", kv, "keys and values"),
        BudgetLine("GPU workspace", workspace, "the largest temporary memory of a prompt's pass"),
        BudgetLine("GPU margin", margin, "libraries' own memory and rounding: 256 MiB and 2%"),
        BudgetLine(
            "GPU expert slots",
            slots * slot_nbytes,
            f"{room} of {total} stay{f', {prefetch} fewer while others are copied ahead' if prefetch else ''}, "
            f"{ring} for those in passing: {reason}",
        ),
    )
    return DeviceBudget(slots, room, slot_nbytes, reason, lines, prefetch)


def too_small(ram: int, use: MemoryUse, working: int, slot_nbytes: int) -> DoesNotFitError:
    """The refusal of a ``--ram`` that cannot hold even the working set."""
    return DoesNotFitError(
        f"--ram {format_size(ram)} is too small for this model.",
        f"It needs {_explain(use)}, and {format_size(working * slot_nbytes)} for the experts of one token.",
        f"The smallest that works is --ram {_up(use.total + working * slot_nbytes)}.",
        working,
    )


def _explain(use: MemoryUse) -> str:
    parts = (("process and dense weights", use.process), ("context", use.kv), ("workspace", use.workspace))
    return ", ".join(f"{format_size(nbytes)} {name}" for name, nbytes in (*parts, ("margin", use.margin)))


def _up(nbytes: int) -> str:
    """A size that can be typed back and is no smaller than ``nbytes``, with 2% to spare."""
    return f"{-(-nbytes * 102 // 100 >> 20) + 1}MiB"
