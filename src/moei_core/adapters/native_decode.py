"""Norms and attention of single tokens as one native call each, where that computes the same.

Families write these modules in many variants, so what a module computes is found by trying it: its own forward and
the native one get the same random numbers, and only if the results agree is the native one used, for few rows. An
attention with attributes that are not known here may do something that no trial shows, and is left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from moei_core.adapters.dense_clock import DENSE_CLOCK
from moei_core.adapters.dense_linear import TYPES, BlockLinear, NativeLinear
from moei_core.adapters.growing_layer import GrowingLayer
from moei_core.adapters.norm_trial import try_norm
from moei_core.quant import native
from moei_core.quant.formats import FORMATS
from moei_core.quant.native_latent import LatentAttention

_MOST_VALUES = 1 << 14
"""Values of a norm's input up to which one native call beats several of torch."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_SINKS = "sinks"
_KNOWN_ATTRIBUTES = frozenset({
    "attention_bias", "attention_dropout", "config", "head_dim", "hidden_size", "is_causal", "is_sliding", "layer_idx",
    "layer_type", "max_position_embeddings", "num_attention_heads", "num_heads", "num_key_value_groups",
    "num_key_value_heads", "rope_parameters", "rope_theta", "scaling", "sliding_window", "sliding_window_pattern",
    "training", "use_qk_norm",
})  # fmt: skip
_TRIAL_TOKENS, _TRIALS = 7, ((1.0, False), (3.0, True))
"""Tokens of a trial; scale of its input, and whether some tokens are hidden."""
_Arguments = tuple[str, int, tuple[int, int], tuple[int, int, int, int], int]
_EXACT, _ROUNDED = 1e-4, 0.02
"""Tolerances of a trial when all is float32 and when something is rounded."""
_SEEDS = 3
"""Rounding alone may be more than that by chance, where scores are large: so a trial has some more chances."""


class NativeNorm:
    """The forward of a norm: native for few values, else its own."""

    def __init__(self, module: nn.Module, weight: list[float], eps: float, dtype: torch.dtype) -> None:
        self.weight, self.eps = weight, eps
        self._own, self._dtype, self._type, self._width = module.forward, dtype, TYPES[dtype], len(weight)
        self.kernel = native.RmsNorm(weight, eps)

    def takes(self, hidden_states: torch.Tensor) -> bool:
        """Whether the native kernel computes it."""
        few = hidden_states.numel() <= _MOST_VALUES
        return few and hidden_states.dtype == self._dtype and hidden_states.is_contiguous()

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        if not self.takes(hidden_states):
            return self._own(hidden_states)
        count = hidden_states.numel()
        out = torch.empty_like(hidden_states)
        self.kernel(self._type, hidden_states.data_ptr(), count // self._width, out.data_ptr())
        return out


def use_native_norms(model: nn.Module) -> None:
    """Give every RMS norm of ``model`` the native forward."""
    if not native.available():
        return
    for module in model.modules():
        found = _norm(module)
        if found is not None:
            module.forward = found


def _norm(module: nn.Module) -> NativeNorm | None:
    """The native forward of ``module``, or None if it is no norm of this kind."""
    trial = try_norm(module)
    if trial is None or trial.weight.dtype not in TYPES:
        return None
    # Gemma's norms, and some after them, store what is added to 1.
    for values in (trial.weight.float(), trial.weight.float() + 1):
        found = NativeNorm(module, values.tolist(), trial.eps, trial.weight.dtype)
        if trial.agrees(found(trial.given), places=3):
            return found
    return None


@dataclass(slots=True)
class ModuleCall:
    """What a module was called with beside the hidden states, by name."""

    arguments: Mapping[str, Any]


class NativeAttention:
    """The forward of an attention module: native for one token of one sequence, else its own."""

    def __init__(self, module: Any, turn: torch.Tensor, rotation: str, dtype: torch.dtype) -> None:
        """turn: cosines, [..., those of a token]. rotation: of ``native.ROTATIONS``. ValueError if parts do not fit."""
        q, k, v, o = (getattr(module, name) for name in _PROJECTIONS)
        projections = linear_kernel(q), linear_kernel(k), linear_kernel(v), linear_kernel(o)
        self.head_dim = int(module.head_dim)
        heads, self.kv_heads = q.out_features // self.head_dim, k.out_features // self.head_dim
        norms = [getattr(module, name).forward for name in _NORMS if hasattr(module, name)]
        if norms and (not all(isinstance(one, NativeNorm) for one in norms) or norms[0].eps != norms[1].eps):
            raise ValueError("norms of another kind")
        weights = (norms[0].weight, norms[1].weight) if norms else None
        self._own, self._layer, self._dtype = module.forward, module.layer_idx, dtype
        self._turn, self._turn_dtype = turn.shape[-1], turn.dtype
        self._type, self.width = TYPES[dtype], q.in_features
        self.tolerance = tolerance(dtype, (q, k, v, o))
        sinks = getattr(module, _SINKS, None)
        # What clips hardly ever clips in a trial, so this one is known by its name.
        clip = getattr(getattr(module, "config", None), "clip_qkv", None)
        self.kernel: native.Attention | LatentAttention = native.Attention(
            projections,
            (heads, self.kv_heads, self.head_dim, self._turn * (2 if rotation == "short" else 1)),
            float(module.scaling),
            weights,
            norms[0].eps if norms else 0.0,
            () if sinks is None else sinks.tolist(),
            math.inf if clip is None else float(clip),
            rotation,
            TYPES[turn.dtype],
        )

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> Any:
        if hidden_states.numel() == hidden_states.shape[-1] and past_key_values is not None:
            result = self._one_token(hidden_states, position_embeddings, attention_mask, past_key_values)
            if result is not None:
                return result, None
        return self._own(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **others,
        )

    def _one_token(
        self, hidden_states: torch.Tensor, turn: Any, mask: torch.Tensor | None, cache: Cache
    ) -> torch.Tensor | None:
        """[1, 1, hidden], or None for what the kernel cannot do."""
        prepared = self.prepare(hidden_states, turn, mask, cache)
        if prepared is None:
            return None
        layer, arguments = prepared
        out = torch.empty_like(hidden_states)
        started = time.perf_counter()
        self.kernel(*arguments, out.data_ptr())
        DENSE_CLOCK.seconds += time.perf_counter() - started
        layer.wrote_token()
        return out

    def prepare(
        self, hidden_states: torch.Tensor, turn: Any, mask: torch.Tensor | None, cache: Cache | None
    ) -> tuple[GrowingLayer, _Arguments] | None:
        """The cache's layer for one token, with room for it, and the kernel's arguments but the last.

        None for what the kernel cannot do.
        """
        turns = self._turns(turn)
        if cache is None or turns is None:
            return None
        layer = cache.layers[self._layer]
        if not isinstance(layer, GrowingLayer):
            return None
        if hidden_states.dtype != self._dtype or not hidden_states.is_contiguous():
            return None
        seen = 0
        if mask is not None:
            shown = _seen(mask)
            if shown is None or shown.numel() != layer.get_seq_length() + 1 or not shown.is_contiguous():
                return None
            seen = shown.data_ptr()
        place = self._place(layer, hidden_states)
        return None if place is None else (layer, (self._type, hidden_states.data_ptr(), turns, place, seen))

    def _turns(self, turn: Any) -> tuple[int, int] | None:
        """The addresses of one token's cosines and sines, or None if they are not as the kernel wants them."""
        if not isinstance(turn, tuple) or len(turn) != 2:
            return None
        for given in turn:
            if given.numel() != self._turn or given.dtype != self._turn_dtype or not given.is_contiguous():
                return None
        return turn[0].data_ptr(), turn[1].data_ptr()

    def _place(self, layer: GrowingLayer, like: torch.Tensor) -> tuple[int, int, int, int] | None:
        return layer.place_for_token(self.kv_heads, self.head_dim, like)

    def random_turns(self, like: Any, tokens: int, generator: torch.Generator) -> Any:
        """Numbers where ``like`` are cosines and sines.

        They are no rotation: so a variant that pairs other values cannot agree by chance.
        """
        return tuple(some((1, tokens, self._turn), generator, one.dtype) for one in like)

    def random_states(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers where a cache has ``tokens`` keys and values."""
        shape = (1, self.kv_heads, tokens, self.head_dim)
        return some(shape, generator, self._dtype), some(shape, generator, self._dtype)


def some(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers for a trial."""
    return torch.randn(shape, generator=generator).to(dtype)


def tolerance(dtype: torch.dtype, projections: Sequence[nn.Module], rounded: float = _ROUNDED) -> float:
    """How far the results of a trial may be apart, relative: ``rounded``, unless all is float32."""
    blocks = (one.matrix.format for one in projections if isinstance(one, BlockLinear))
    exact = dtype == torch.float32 and all(FORMATS[name].is_float for name in blocks)
    return _EXACT if exact else rounded


_last_mask: tuple[torch.Tensor, torch.Tensor | None] | None = None


def _seen(mask: torch.Tensor) -> torch.Tensor | None:
    """Which tokens a mask shows: itself, or what one that is added to the scores leaves. None if it is something else.

    The layers of a pass share few masks, often one after the other. So the last one is remembered.
    """
    global _last_mask
    if mask.dtype == torch.bool:
        return mask
    last = _last_mask
    if last is None or last[0] is not mask:
        shown = mask == 0
        only = mask.dtype.is_floating_point and bool(torch.all(shown | (mask <= torch.finfo(mask.dtype).min)))
        last = _last_mask = mask, shown if only else None
    return last[1]


def trial_mask(call: ModuleCall, shown: list[bool]) -> torch.Tensor | None:
    """A mask [1, 1, 1, tokens] of the kind that the module was called with; None if it had none and all are shown."""
    given = call.arguments.get("attention_mask")
    seen = torch.tensor(shown).view(1, 1, 1, -1)
    if given is None or given.dtype == torch.bool:
        return None if given is None and all(shown) else seen
    hides = torch.finfo(given.dtype).min
    return torch.zeros(seen.shape, dtype=given.dtype).masked_fill(~seen, hides)


def linear_kernel(module: nn.Module) -> native.Linear:
    """The kernel of a linear layer. Raises: ValueError if it has none."""
    if isinstance(module, (NativeLinear, BlockLinear)):
        return module.kernel
    if type(module) is not nn.Linear or module.weight.dtype not in TYPES:
        raise ValueError("not a linear layer")
    return NativeLinear(module).kernel


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that look like grouped-query attention and have nothing that is not known here."""
    found = []
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        if not set(_PROJECTIONS) <= children or children - {*_PROJECTIONS, *_NORMS}:
            continue
        own = {name for name in vars(module) if not name.startswith("_")}
        both = len(children & set(_NORMS)) in (0, 2)
        needed = {"head_dim", "layer_idx", "scaling"}
        parameters = dict(module.named_parameters(recurse=False))
        plain = set(parameters) <= {_SINKS} and not list(module.buffers(recurse=False))
        if both and plain and needed <= own and own <= _KNOWN_ATTRIBUTES:
            found.append(module)
    return found


def use_native_attention(calls: Mapping[nn.Module, ModuleCall], dtype: torch.dtype) -> None:
    """Give attention modules the native forward. calls: what each was called with for one token."""
    if not native.available() or dtype not in TYPES:
        return
    for module, call in calls.items():
        turn = call.arguments.get("position_embeddings")
        if not isinstance(turn, tuple) or not all(isinstance(one, torch.Tensor) for one in turn):
            continue
        for rotation in native.ROTATIONS:
            try:
                found = NativeAttention(module, turn[0], rotation, dtype)
            except Exception:
                # Parts of another kind.
                continue
            if agrees(found, call):
                module.forward = found
                break


def agrees(found: NativeAttention, call: ModuleCall) -> bool:
    """Whether ``found`` gives what its module's own forward gives. call: what the module was called with."""
    try:
        return all(any(_agrees(found, call, *trial, seed) for seed in range(_SEEDS)) for trial in _TRIALS)
    except Exception:
        # Whatever a trial with arguments of our making raises: not the attention that we know.
        return False


def _agrees(found: NativeAttention, call: ModuleCall, scale: float, hidden: bool, seed: int) -> bool:
    """Whether both forwards give the same for a token after some others. hidden: it does not see some of them."""
    generator = torch.Generator().manual_seed(seed)
    given = (torch.randn((1, _TRIAL_TOKENS, found.width), generator=generator) * scale).to(found._dtype)
    turns = found.random_turns(call.arguments["position_embeddings"], _TRIAL_TOKENS, generator)
    mask = trial_mask(call, [not (hidden and token in (1, 2)) for token in range(_TRIAL_TOKENS)])
    cache = Cache(layers=[GrowingLayer() for _ in range(found._layer + 1)])
    layer = cache.layers[found._layer]
    results = []
    for forward, tokens, shown in (
        (found._own, slice(0, -1), None),
        (found._own, slice(-1, None), mask),
        (found, slice(-1, None), mask),
    ):
        layer.cut_to(_TRIAL_TOKENS - 1)
        arguments = {**call.arguments, "attention_mask": shown, "past_key_values": cache}
        turn = arguments["position_embeddings"] = _of_tokens(turns, tokens)
        if forward is found and found.prepare(given[:, tokens].contiguous(), turn, shown, cache) is None:
            # It would leave this to the module itself.
            return False
        output = forward(hidden_states=given[:, tokens].contiguous(), **arguments)
        last = layer.get_seq_length() - 1
        results.append((output[0], layer.keys[..., last, :].clone(), layer.values[..., last, :].clone()))
    for theirs, ours in zip(*results[1:], strict=True):
        error = (ours.float() - theirs.float()).square().mean().sqrt()
        if not error <= found.tolerance * theirs.float().square().mean().sqrt():
            return False
    return True


def _of_tokens(turns: Any, tokens: slice) -> Any:
    if isinstance(turns, tuple):
        return tuple(one[:, tokens].contiguous() for one in turns)
    return turns[:, tokens].contiguous()
