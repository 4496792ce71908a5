"""The brain's front door: events in, a ``FetchPlan`` out. It never moves a byte.

The engine carries a plan out by moving bytes, the simulator by advancing a clock; both call the same methods
in the same order, so a recorded chat replays to the same plans. Whatever depends on the machine (when a
prefetch began and ended, how long a pass waited, a new budget) comes in as an event too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from moei_core.cache.expert_cache import CacheStatistics, ExpertCache
from moei_core.cache.expert_sizes import slots_for
from moei_core.predict.base import ExpertPredictor, PassEvent, RequestEvent
from moei_core.prefetch import PrefetchController, PrefetchMode, PrefillStream
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase, Wave, layer_keys


@dataclass(slots=True)
class PrefetchStatistics:
    """What became of prefetches, in experts.

    started = useful + late + wasted + cancelled + those still waiting for their layer. useful: complete when
    the gate chose them. late: chosen while still in flight, so part of the load was waited for. wasted:
    complete, but gone or not chosen at the layer's next access. cancelled: overtaken by the gate, or failed.
    """

    started: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    cancelled: int = 0
    refused: int = 0

    def minus(self, earlier: PrefetchStatistics) -> PrefetchStatistics:
        """What happened since ``earlier`` was copied."""
        return PrefetchStatistics(
            *(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self))
        )


class ExpertScheduler:
    """Decides, for each access, what to load, evict, release, prefetch, and in which order to compute.

    Prefetching (ProMoE, arXiv 2410.22134): after each access ``FetchPlan.prefetch`` lists absent experts of
    the next layers, most certain first and nearer layers first, at most as much as the budget. Whoever
    moves bytes takes from that list only while no demand load waits, a chunk at a time, and reports
    ``start_load`` and ``finish_load``. A prefetch in flight when its gate speaks is finished first if it was
    right and is in ``FetchPlan.cancel`` if it was wrong.

    Prefetches need slots to arrive in, beside the working set. They are the residents' until a predictor is followed,
    when the policy's victims leave them, and again as soon as none is: so a predictor that is not followed costs no
    hit. What is in flight then is cancelled.

    Streaming: in a pass over many tokens ``FetchPlan.stream`` lists the absent experts of the next layer that it
    is all but certain to need. They use slots that are free then, and in a long pass those that the policy's victims
    leave for them (``PrefillStream.lent``), which later experts get again.
    """

    def __init__(
        self,
        cache: ExpertCache,
        working_slots: int,
        predictor: ExpertPredictor | None = None,
        mode: PrefetchMode = PrefetchMode.AUTO,
        *,
        look_ahead: int = 2,
        least_score: float = 0.3,
        prefetch_budget: int | None = None,
        prefetch_slots: int = 0,
        num_experts: Mapping[int, int] | None = None,
    ) -> None:
        """working_slots: W of ``ExpertCache``, at least the largest top-k of the model.

        predictor: None switches prefetching off for good. look_ahead: how many layers ahead. least_score:
        predictions below this probability are not worth the link. prefetch_budget: what one plan may ask
        for, in the unit of the cache's ``size_of`` (experts, or bytes where sizes differ); None: working_slots
        experts. prefetch_slots: of the cache's capacity, what residents give up while a predictor is followed; 0:
        there is room for prefetches beside it. num_experts: by layer, to stream with; None: no streaming.
        """
        assert working_slots >= 1
        self._cache = cache
        self._capacity, self._prefetch_slots = cache.capacity, prefetch_slots
        # Whether residents have given slots to prefetches, and to a long prompt's stream; how many.
        self._shared, self._taken, self._lent = (False, False), 0, 0
        self._working_slots = working_slots
        self._predictor = predictor
        self._look_ahead, self._least_score = look_ahead, least_score
        self._budget = prefetch_budget
        self._candidates = () if predictor is None else tuple(predictor.candidates())
        self.controller = PrefetchController(
            PrefetchMode.OFF if predictor is None else mode, [one.learns for one in self._candidates]
        )
        self.prefetch_statistics = PrefetchStatistics()
        # Predictors that observe this pass; the others are not worth their time now.
        self._watching: tuple[ExpertPredictor, ...] = ()
        # The number of the one to prefetch by.
        self._followed: int | None = None
        self._watch()
        self._in_flight: dict[ExpertKey, float] = {}
        # Prefetched residents whose layer has not run yet, with their scores. They must survive until then.
        self._waiting: dict[ExpertKey, float] = {}
        self._offered: dict[ExpertKey, float] = {}
        # Everything predicted, resident or not, with how many layers ahead it is.
        self._predicted: dict[ExpertKey, int] = {}
        self._keys: dict[int, tuple[ExpertKey, ...]] = {}
        self._phase, self._tokens = Phase.DECODE, 1
        self._stream = None if num_experts is None else PrefillStream(num_experts, working_slots)
        self._layers = len(num_experts or ())
        self._whole = 0 if num_experts is None else slots_for(num_experts, cache.sizes)
        # What the latest plan streams.
        self._streamed: tuple[ExpertKey, ...] = ()
        self._value = getattr(cache.policy, "value", None)
        # What a tier in front of this one holds: not worth prefetching.
        self._nearer: ExpertCache | tuple[ExpertKey, ...] = ()

    @property
    def statistics(self) -> CacheStatistics:
        return self._cache.statistics

    @property
    def working_slots(self) -> int:
        return self._working_slots

    @property
    def prefetching_by(self) -> str | None:
        """The kind of predictor that the controller keeps; None: prefetching has not earned its place."""
        kept = self.controller.kept
        return None if kept is None else type(self._candidates[kept]).__name__

    @property
    def wants_hints(self) -> bool:
        """Whether hints for the accesses of this pass would be looked at."""
        return any(predictor.needs_hints for predictor in self._watching)

    @property
    def resident_count(self) -> int:
        return len(self._cache)

    @property
    def free_slots(self) -> int:
        """Slots that no resident has: the working set, what a stream has, and what has not been filled yet."""
        return self._working_slots + self._lent + self._cache.room

    def residents(self) -> list[ExpertKey]:
        """All resident experts, ascending."""
        return self._cache.residents()

    def request_start(self) -> None:
        """A request (one turn) starts."""
        self._cache.policy.on_request()
        if self._predictor is not None:
            self._predictor.observe(RequestEvent(start=True))

    def request_end(self) -> None:
        """The request has ended, normally or not."""
        self._cache.policy.on_request_end()
        if self._predictor is not None:
            self._predictor.observe(RequestEvent(start=False))

    def forward_pass(self, phase: Phase, tokens: int = 1) -> None:
        """A forward pass over ``tokens`` tokens starts; its accesses follow in layer order."""
        self._phase, self._tokens = phase, tokens
        self._cache.policy.on_pass()
        if self._candidates:
            self._watch()
            for predictor in self._watching:
                predictor.observe(PassEvent(phase))

    def pass_end(self, stall_seconds: float, seconds: float) -> None:
        """The pass is over: how long it waited for experts, and how long it took in all.

        Decides whether prefetching earns its place. An engine that never calls this never prefetches in
        ``PrefetchMode.AUTO``.
        """
        if self._candidates and self._phase is Phase.DECODE:
            # Whole nanoseconds, which is what a trace keeps, so that a replay compares the same numbers.
            self.controller.on_pass(round(seconds * 1e9), round(stall_seconds * 1e9))

    def foresee(self, next_use: Sequence[int]) -> None:
        """The next uses of the experts of the access that follows; only for policies that need the future."""
        self._cache.policy.foresee(next_use)

    def access(self, access: LayerAccess) -> FetchPlan:
        """Plan one layer of one forward pass: ``decide`` and ``look_ahead``."""
        plan = self.decide(access)
        return plan._replace(prefetch=self.look_ahead(access))

    def decide(self, access: LayerAccess, routed: LayerAccess | None = None) -> FetchPlan:
        """What is to be done for one layer; hints are not looked at, and nothing is prefetched yet.

        routed: all that the router chose, if ``access`` is a part of it. Waves: first the experts that are resident,
        without any load; then the missing ones in ascending order, those in flight first, as many at a time as the
        working set holds.
        """
        cache = self._cache
        left: tuple[ExpertKey, ...] = ()
        cancel: tuple[ExpertKey, ...] = ()
        sharing = self._followed is not None, self._stream is not None and self._tokens >= PrefillStream.LONG
        if sharing != self._shared:
            left, cancel = self._share_slots(sharing)
        hits, misses = cache.touch(access, self._layer_keys(access))
        if self._in_flight or self._waiting:
            cancel += self._gate_spoke(access, misses)
        if self._streamed:
            needed = set(misses)
            cancel += tuple(key for key in self._streamed if key not in needed)
            self._streamed = ()
        waves = [Wave(left, (), tuple(hits), ())] if hits or left else []
        if misses:
            waves += self._load(hits, misses)
        if self._stream is not None and self._tokens > 1:
            self._streamed = self._plan_stream(routed or access, self._stream)
        return FetchPlan(
            access.layer, tuple(waves), len(hits), len(misses), cancel, (), self._streamed, self._taken
        )

    def look_ahead(self, access: LayerAccess) -> tuple[ExpertKey, ...]:
        """What to prefetch behind all that ``decide`` asked for. Once after it, with what the router chose.

        So an engine can compute hints, and this, while it waits for experts.
        """
        for predictor in self._watching:
            predictor.observe(access)
        if self._followed is None or self._streamed:
            return ()
        return self._plan_prefetch(access, self._candidates[self._followed])

    def _load(self, hits: list[ExpertKey], misses: list[ExpertKey]) -> list[Wave]:
        """The waves that bring in ``misses``."""
        place, width = self._cache.place, self._working_slots
        excluded: set[ExpertKey] = {*hits, *self._waiting}
        waves: list[Wave] = []
        for start in range(0, len(misses), width):
            load = tuple(misses[start : start + width])
            evict: tuple[ExpertKey, ...] = ()
            release: tuple[ExpertKey, ...] = ()
            excluded.update(load)
            for key in load:
                stays, evicted = place(key, excluded)
                if not stays:
                    release += (key,)
                if evicted:
                    evict += evicted
            waves.append(Wave(evict, load, load, release))
        return waves

    def start_load(self, key: ExpertKey) -> None:
        """The prefetch of ``key``, taken from the latest plan, has begun."""
        self._in_flight[key] = self._offered.get(key, 0.0)
        self.prefetch_statistics.started += 1

    def finish_load(self, key: ExpertKey) -> tuple[bool, tuple[ExpertKey, ...]]:
        """The prefetch of ``key`` is complete: (whether it becomes a resident, who gives up a slot for it).

        It stays only if its victim is worth less than the prediction and is not itself predicted.
        """
        score = self._in_flight.pop(key, None)
        if score is None or key in self._cache:
            return False, ()
        excluded = set(self._waiting)
        ahead = self._predicted.get(key, self._look_ahead)
        excluded.update(other for other, steps in self._predicted.items() if steps <= ahead)
        stays, evicted = self._cache.place(key, excluded, lambda victim: self._worth(victim) < score)
        if stays:
            self._waiting[key] = score
        else:
            self.prefetch_statistics.refused += 1
            self.prefetch_statistics.wasted += 1
        return stays, evicted

    def cancel_load(self, key: ExpertKey) -> None:
        """The planned bytes of ``key`` did not arrive: it is not resident."""
        if self._in_flight.pop(key, None) is not None:
            self.prefetch_statistics.cancelled += 1
        if self._waiting.pop(key, None) is not None:
            self.prefetch_statistics.wasted += 1
        if key in self._cache:
            self._cache.drop(key)

    def resize(self, capacity: int) -> tuple[ExpertKey, ...]:
        """The residents may now take ``capacity``, less what prefetches and streams arrive in. Returns who must go
        before anything else is loaded."""
        self._capacity = capacity
        return self._fit()

    def _fit(self) -> tuple[ExpertKey, ...]:
        self._taken = min(self._prefetch_slots, self._capacity) if self._shared[0] else 0
        left = self._capacity - self._taken
        self._lent = PrefillStream.lent(self._tokens, left, self._whole, self._layers)
        gone = tuple(self._cache.resize(left - self._lent))
        for key in gone:
            if self._waiting.pop(key, None) is not None:
                self.prefetch_statistics.wasted += 1
        return gone

    def _share_slots(self, sharing: tuple[bool, bool]) -> tuple[tuple[ExpertKey, ...], tuple[ExpertKey, ...]]:
        """Take slots for prefetches and streams, or give them back: (residents that go, prefetches in flight that end).

        Before the access is looked at: none of its experts is spared yet, so all slots can be had at once.
        """
        self._shared = sharing
        ended = () if sharing[0] else tuple(self._in_flight)
        self.prefetch_statistics.cancelled += len(ended)
        if ended:
            self._in_flight.clear()
        return (self._fit() if self._prefetch_slots or self._whole else ()), ended

    def prefetch_mode(self, mode: PrefetchMode) -> None:
        """The person or the engine has switched prefetching off, on, or to deciding for itself."""
        if self._predictor is not None:
            self.controller.mode = mode
            self._watch()

    def _watch(self) -> None:
        self._watching = tuple(self._candidates[at] for at in self.controller.watching)
        self._followed = self.controller.active

    def _layer_keys(self, access: LayerAccess) -> tuple[ExpertKey, ...]:
        layer = access.layer
        keys = self._keys.get(layer)
        # A layer may choose nothing at all for a token.
        largest = access.experts[-1] if access.experts else 0
        if keys is None or largest >= len(keys):
            keys = self._keys[layer] = layer_keys(layer, max(64, 2 * largest))
        return keys

    def _gate_spoke(self, access: LayerAccess, misses: list[ExpertKey]) -> tuple[ExpertKey, ...]:
        """Settle the prefetches for this layer; those rightly in flight move to the front of ``misses``."""
        layer, chosen, count = access.layer, access.experts, self.prefetch_statistics
        for key in [key for key in self._waiting if key.layer == layer]:
            del self._waiting[key]
            if key.expert in chosen:
                count.useful += 1
            else:
                count.wasted += 1
        cancel: list[ExpertKey] = []
        for key in [key for key in self._in_flight if key.layer == layer]:
            del self._in_flight[key]
            if key in misses:
                count.late += 1
                misses.remove(key)
                misses.insert(0, key)
            else:
                count.cancelled += 1
                cancel.append(key)
        return tuple(cancel)

    def _plan_prefetch(self, access: LayerAccess, predictor: ExpertPredictor) -> tuple[ExpertKey, ...]:
        cache = self._cache
        left = self._working_slots * cache.size_of(access.layer) if self._budget is None else self._budget
        offered: dict[ExpertKey, float] = {}
        predicted: dict[ExpertKey, int] = {}
        for ahead, layer in enumerate(predictor.layers_after(access.layer, self._look_ahead), 1):
            size, absent = cache.size_of(layer), dict[ExpertKey, float]()
            for key, score in predictor.predict(layer):
                if score < self._least_score:
                    break
                predicted[key] = ahead
                if (
                    size <= left
                    and key not in cache
                    and key not in self._in_flight
                    and key not in self._nearer
                ):
                    absent[key] = score
                    left -= size
            # What the policy expects of an expert is further evidence, and all there is where scores are equal.
            offered |= sorted(absent.items(), key=lambda item: -item[1] - self._worth(item[0]))
        self._offered, self._predicted = offered, predicted
        return tuple(offered)

    def _plan_stream(self, access: LayerAccess, stream: PrefillStream) -> tuple[ExpertKey, ...]:
        layer, experts = stream.after(access, self._tokens)
        keys = (ExpertKey(layer, expert) for expert in experts.tolist())
        return tuple(
            key
            for key in keys
            if key not in self._cache and key not in self._in_flight and key not in self._nearer
        )

    def _worth(self, key: ExpertKey) -> float:
        """The uses that the policy expects of ``key``; 0 of all where it values none."""
        return 0.0 if self._value is None else float(self._value(key))
