"""``LoadedModel``: a model folder brought to life - dense weights in memory, experts behind the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from moei_core.adapters.device_norms import use_device_norms
from moei_core.adapters.skeleton import experts_modules
from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.cache.expert_cache import CacheStatistics, ExpertCache
from moei_core.cache.expert_sizes import experts_in
from moei_core.cache.policies import DEFAULT_POLICY, live_policy
from moei_core.config import (
    DEFAULT_CONTEXT,
    FULL_OVERLAP,
    ExpertBudget,
    GenerationSettings,
    Overlap,
    conversation_tokens,
)
from moei_core.engine.copies_ahead import AHEAD_S
from moei_core.engine.decode_graphs import DecodeGraphs
from moei_core.engine.device_compute import decoded_nbytes, why_not
from moei_core.engine.device_slots import DeviceSlots, LinkedSlotPool
from moei_core.engine.devices import Device
from moei_core.engine.expert_compute import DECODED_NBYTES
from moei_core.engine.hints import Hinter, RouterHints, StrideHints
from moei_core.engine.model_settings import end_tokens, float_type, load_tokenizer, recommended_settings
from moei_core.engine.placement import device_governor, device_tier, measure_costs, open_device
from moei_core.engine.runtime import ExpertRuntime
from moei_core.engine.slots import SizedSlotPool, SlotPool, unequal_sizes
from moei_core.engine.threads import compute_threads, physical_cores
from moei_core.engine.tiered_runtime import TieredRuntime
from moei_core.errors import DoesNotFitError, UsageError
from moei_core.hardware.budget import (
    DeviceBudget,
    MemoryUse,
    SlotBudget,
    kv_width,
    plan_device_slots,
    plan_slots,
    prefill_chunk,
    too_small,
    workspace_nbytes,
)
from moei_core.hardware.memory import available_memory, resident_memory
from moei_core.hardware.pressure import MemoryGovernor, Resize
from moei_core.predict import PREDICTORS, ExpertPredictor
from moei_core.prefetch import PrefetchMode
from moei_core.quant import native
from moei_core.scheduler import ExpertScheduler, PrefetchStatistics
from moei_core.store.base import ExpertStore
from moei_core.tiers import LinkCosts, TieredScheduler
from moei_core.trace.writer import TraceWriter
from moei_core.types import ModelSpec

PREFETCH_SLOTS = 2
"""One prefetch on its way while the one before waits for the next layer."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """ram: bytes for the whole process. experts: bound on the slots. context: tokens of one conversation.

    policy: a name of ``POLICIES``. dtype: ``float32``, ``bfloat16``, ``float16`` or None for the checkpoint's.
    predictor: a name of ``PREDICTORS`` to prefetch by, a file of ``moei trace train``, or None. prefetch: when to
    follow it. overlap: how moving and computing share the time. device: of ``DEVICES``; ``auto`` is a GPU if there is
    one that the model fits on. vram: bytes of its memory. misses: of ``MISSES``.
    """

    ram: int | None = None
    experts: ExpertBudget | None = None
    context: int | None = None
    policy: str = DEFAULT_POLICY
    dtype: str | None = None
    predictor: str | None = None
    prefetch: PrefetchMode = PrefetchMode.AUTO
    overlap: Overlap = FULL_OVERLAP
    device: str = "auto"
    vram: int | None = None
    misses: str = "auto"


class LoadedModel:
    """A model ready to generate. Use as a context manager, or call ``close``."""

    def __init__(
        self,
        folder: Path,
        options: LoadOptions,
        device: Device | None = None,
        costs: LinkCosts | None = None,
    ) -> None:
        """device: instead of the one that ``options`` name. costs: of its link, instead of measuring them.

        Raises: errors of ``moei_core.errors`` for anything that is wrong with the folder or the options.
        """
        started = time.perf_counter()
        self._device_note = ""
        if device is None:
            device, self._device_note = open_device(options.device, options.vram, options.misses)
        make_policy = live_policy(options.policy)
        make_predictor = _predictor(options.predictor)
        self.folder = folder
        self.adapter = TransformersAdapter(folder, float_type(options.dtype), native_dense=device is None)
        self.spec: ModelSpec = self.adapter.spec()
        threads = compute_threads(self.spec)
        longest = getattr(self.adapter.config.get_text_config(), "max_position_embeddings", None)
        self.context = conversation_tokens(options.context, longest)
        self.longest_context: int = longest or DEFAULT_CONTEXT
        self.tokenizer: Any = load_tokenizer(folder)
        store = self.adapter.open_store()
        linked: LinkedSlotPool | None = None
        try:
            slot_nbytes = max(store.layout(key).slot_nbytes for key in store.experts())
            self._refuse_hopeless(options, slot_nbytes)
            self.adapter.load()
            self.spec = self.adapter.spec()
            hinter = self._hinter(options.predictor)
            self.device_budget: DeviceBudget | None = None
            self._no_device = ""
            if device is not None:
                self._move_dense(device, options, store, slot_nbytes)
                if self.device_budget is None:
                    device.close()
                    self.adapter.compute_natively()
            use = self._memory_use(resident_memory(), slot_nbytes)
            if self.device_budget is not None:
                use = replace(use, kv=0, dense=0)
            # What a GPU copies from is locked slot by slot.
            sizes = unequal_sizes(store, self.spec.num_experts) if self.device_budget is None else None
            self.budget: SlotBudget = plan_slots(
                self.spec,
                slot_nbytes,
                use,
                available_memory(),
                options.ram,
                options.experts,
                PREFETCH_SLOTS if make_predictor else 0,
                sizes,
            )
            policy = make_policy(experts_in(self.budget.resident, sizes), self.spec.num_experts)
            cache = ExpertCache(self.budget.resident, policy, sizes=sizes)
            predictor = (
                make_predictor(self.spec.num_experts)
                if make_predictor
                and (self.budget.spare or (self.device_budget is not None and self.device_budget.prefetch))
                else None
            )
            streamed = self.spec.num_experts if options.overlap.stream else None
            if native.available():
                native.set_num_threads(physical_cores())
            self.scheduler: ExpertScheduler
            self.runtime: ExpertRuntime
            if device is None or self.device_budget is None:
                self.scheduler = ExpertScheduler(
                    cache,
                    self.budget.working,
                    predictor,
                    options.prefetch,
                    prefetch_slots=self.budget.spare,
                    num_experts=streamed,
                )
                count = self.budget.slots
                pool = SlotPool(count, slot_nbytes) if sizes is None else SizedSlotPool(count, sizes)
                self.runtime = ExpertRuntime(store, pool, self.scheduler, threads, options.overlap)
            else:
                linked = LinkedSlotPool(self.budget.slots, slot_nbytes, device)
                staying = self.device_budget.resident
                slots = DeviceSlots(device, staying, self.device_budget.slots - staying, slot_nbytes)
                modules = {layer: module for _, layer, module in experts_modules(self.adapter.model)}
                first = next(iter(store.experts()))
                module, layout = modules[first.layer], store.layout(first)
                costs = costs or measure_costs(device, slots, linked, module, layout, self.spec)
                front = make_policy(self.device_budget.resident, self.spec.num_experts)
                tier = device_tier(self.device_budget, front, self.spec, options.misses, costs)
                tiers = TieredScheduler(
                    cache,
                    self.budget.working,
                    tier,
                    predictor,
                    options.prefetch,
                    prefetch_slots=self.budget.spare,
                    num_experts=streamed,
                )
                self.scheduler = tiers
                at_once = max(1, int(AHEAD_S / costs.copy_seconds(slot_nbytes)))
                tiered = TieredRuntime(store, linked, tiers, device, slots, threads, options.overlap, at_once)
                self.runtime = tiered
                tiered.device_governor = device_governor(device, self.device_budget, slots)
                tiered.warm_up(modules, self.spec, self.adapter.dtype)
            least = self.budget.working + self.budget.spare
            self.runtime.governor = MemoryGovernor(self.budget.slots, least, slot_nbytes)
            self.runtime.hinter = hinter
            self.adapter.time_dense()
            self.adapter.install(self.runtime)
            self.graphs: DecodeGraphs | None = None
            if isinstance(self.runtime, TieredRuntime):
                routers = hinter.routers if isinstance(hinter, RouterHints) else None
                self.graphs = DecodeGraphs(self.adapter, self.runtime, self.runtime.device, routers)
        except BaseException as error:
            if hasattr(self, "runtime"):
                self.runtime.close()
                self.adapter.uninstall()
            else:
                if linked is not None:
                    linked.close()
                store.close()
                if device is not None:
                    device.close()
            if isinstance(error, torch.OutOfMemoryError):
                raise DoesNotFitError(
                    "The GPU's memory is not enough to load this model.",
                    "Other programs use it too.",
                    "Close them, or ask for less: --vram, --context, or --device cpu.",
                ) from error
            raise
        self.options = options
        self.load_s = time.perf_counter() - started

    def _move_dense(self, device: Device, options: LoadOptions, store: ExpertStore, slot_nbytes: int) -> None:
        """Take the model's dense part to ``device``, if it fits there; else, unless a person insisted, say why not.

        Raises: DoesNotFitError, UsageError.
        """
        use = self._memory_use(0, slot_nbytes)
        insists = options.vram is not None or options.device != "auto"
        reason = why_not(store.layout(key) for key in store.experts())
        if any(getattr(m, "has_post_expert_norm", False) for _, _, m in experts_modules(self.adapter.model)):
            # Experts computed in RAM would need that norm on both sides.
            reason = "there is a norm behind its experts"
        if reason is not None and insists:
            raise UsageError(
                f"This model cannot use the GPU: {reason}.", hint="Leave --device and --vram out."
            )
        if reason is None:
            try:
                self.device_budget = plan_device_slots(
                    self.spec.total_experts,
                    slot_nbytes,
                    use.dense,
                    use.kv,
                    use.workspace + decoded_nbytes(store.layout(key) for key in store.experts()),
                    device.free_nbytes(),
                    options.vram,
                    2 * self.spec.num_experts_per_tok if options.predictor is not None else 0,
                    self.spec.num_experts_per_tok,
                )
            except DoesNotFitError as error:
                if insists:
                    raise
                reason = " ".join((error.what, error.why))
        if reason is not None:
            self._no_device = f"The GPU is not used: {reason.rstrip('.')}."
            return
        use_device_norms(self.adapter.model)
        self.adapter.model.to(device.place)  # type: ignore[arg-type]

    def _hinter(self, predictor: str | None) -> Hinter | None:
        """What computes the hints that ``predictor`` needs. Raises: UsageError, DamagedFileError."""
        if _is_file(predictor):
            return StrideHints(Path(str(predictor)), self.spec.num_experts, self.spec.hidden_size)
        if predictor not in ("router", "mixed"):
            return None
        routers = self.adapter.early_routers()
        if predictor == "router" and not routers.layers:
            raise UsageError(
                "--predictor router: the routers of this model cannot be applied early.",
                "They do not return the experts that they choose.",
                f"Choose another: {', '.join(name for name in PREDICTORS if name != 'router')}.",
            )
        return RouterHints(routers)

    def _refuse_hopeless(self, options: LoadOptions, slot_nbytes: int) -> None:
        """Before reading gigabytes: refuse a ``--ram`` that the dense weights alone exceed."""
        if options.ram is None:
            return
        after = resident_memory() + self.adapter.expected_dense_nbytes
        use = self._memory_use(after, slot_nbytes)
        if after > options.ram:
            raise too_small(options.ram, use, self.spec.num_experts_per_tok, slot_nbytes)

    def _memory_use(self, process: int, slot_nbytes: int) -> MemoryUse:
        config = self.adapter.config.get_text_config()
        eager = getattr(config, "_attn_implementation", None) == "eager"
        shape = config.to_dict(), self.spec.num_experts_per_tok, self.context, self.adapter.dtype.itemsize
        workspace = workspace_nbytes(*shape, slot_nbytes, eager)
        if self.adapter.packed is not None:
            workspace += DECODED_NBYTES
        kv = self.kv_nbytes_per_token * self.context
        chunk = prefill_chunk(*shape, eager)
        return MemoryUse(process, kv, workspace, self.adapter.dense_nbytes, self.context, chunk)

    @property
    def kv_nbytes_per_token(self) -> int:
        """Keys and values of one token over all layers, from the configuration."""
        width = kv_width(self.adapter.config.get_text_config().to_dict())
        layers = len(DynamicCache(config=self.adapter.config).layers)
        return layers * width * self.adapter.dtype.itemsize

    @property
    def device_statistics(self) -> CacheStatistics | None:
        """Lookups in a device's memory so far; None if there is no device."""
        return self.scheduler.device_statistics if isinstance(self.scheduler, TieredScheduler) else None

    @property
    def device_prefetch_statistics(self) -> PrefetchStatistics:
        """What became of prefetches into a device's memory so far, but for their lateness, which the runtime knows."""
        if isinstance(self.scheduler, TieredScheduler):
            return self.scheduler.device.prefetch_statistics
        return PrefetchStatistics()

    @property
    def resizes(self) -> dict[str, list[Resize]]:
        """How the numbers of slots have followed the free memory, by tier: ``RAM`` and, with a device, ``GPU``."""
        governors = {"RAM": self.runtime.governor}
        if isinstance(self.runtime, TieredRuntime):
            governors["GPU"] = self.runtime.device_governor
        return {tier: one.resizes for tier, one in governors.items() if one is not None}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about how this model runs."""
        graphs = self.graphs.note if self.graphs is not None else ""
        notes = tuple(filter(None, (self._device_note, self._no_device, graphs)))
        if native.available():
            return notes
        what = self.adapter.packed.format.lower() if self.adapter.packed is not None else "the"
        return (*notes, f"{native.unavailable_reason()} So {what} experts are computed on a slow torch path.")

    def record(self, path: Path, name: str, source: str = "") -> TraceWriter:
        """Record from now on all that a replay needs, hints included; ``close`` of the result writes ``path``."""
        hinter = self.runtime.hinter
        self.runtime.recorder = TraceWriter(
            path,
            name,
            self.spec.num_experts,
            self.spec.num_experts_per_tok,
            hints=2 * self.spec.num_experts_per_tok if hinter else 0,
            hint_distances=hinter.distances if hinter else (1,),
            source=source,
        )
        return self.runtime.recorder

    def generation_defaults(self) -> GenerationSettings:
        """What the model's authors recommend, else ours. Raises: DamagedFileError."""
        return recommended_settings(self.folder)

    def end_tokens(self) -> frozenset[int]:
        """The token ids that end a reply."""
        named = self.adapter.config.get_text_config().eos_token_id, self.tokenizer.eos_token_id
        return end_tokens(self.folder, named)

    def close(self) -> None:
        """End the reader threads, keep what was learned about the files, free the slots. The model runs no more."""
        if self.graphs is not None:
            self.graphs.close()
        self.runtime.close()
        self.adapter.uninstall()
        self.adapter.release()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_file(predictor: str | None) -> bool:
    return predictor is not None and predictor.endswith(".safetensors")


def _predictor(name: str | None) -> Callable[[Mapping[int, int]], ExpertPredictor] | None:
    if name is None:
        return None
    if _is_file(name):
        return PREDICTORS["stride"]
    if name == "stride" or name not in PREDICTORS:
        live = ", ".join(known for known in PREDICTORS if known != "stride")
        raise UsageError(
            f"There is no predictor '{name}' for a chat.",
            hint=f"Choose from: {live}, or a file of moei trace train.",
        )
    return PREDICTORS[name]
