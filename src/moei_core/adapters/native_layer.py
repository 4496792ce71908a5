"""Routers and whole decoder layers of single tokens as one native call each, where that computes the same.

Python, torch and the model's weights share the processor's caches: beside large weights each step of Python around a
layer takes several times as long as in a small model, so the steps are few here. As in ``native_decode`` a module is
known by trying it; a layer must give the very bits that its modules give one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from moei_core.adapters.base import ExpertsRuntime, NothingResident
from moei_core.adapters.dense_clock import DENSE_CLOCK
from moei_core.adapters.dense_linear import FEW_ROWS, TYPES
from moei_core.adapters.growing_layer import GrowingLayer
from moei_core.adapters.native_decode import ModuleCall, NativeAttention, NativeNorm, some, trial_mask
from moei_core.adapters.native_ffn import NativeFfn
from moei_core.adapters.skeleton import experts_modules
from moei_core.quant import native
from moei_core.quant.native_layer import Layer, Router, RouterKind

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_MIXTURES = ({"gate", "experts"}, {"router", "experts"}, {"gate", "experts", "shared_experts"})
_TRIAL_ROWS, _TRIAL_SCALES = 64, (1.0, 8.0)
_TRIAL_TOKENS = 5

Installed = Callable[[nn.Module], tuple[ExpertsRuntime, int] | None]
"""The runtime of an experts module and its layer."""


class NativeRouter:
    """The forward of a router: native for few rows, else its own. Which way depends on the rows alone."""

    def __init__(self, module: Any, kind: RouterKind) -> None:
        weight, bias = module.weight, getattr(module, "bias", None)
        self.top_k, self._own, self._weight = int(module.top_k), module.forward, weight
        self._type, (self._experts, self._width) = TYPES[weight.dtype], weight.shape
        matrix = native.Matrix(self._type, self._experts, self._width)
        linear = native.Linear(matrix, weight.data_ptr(), self._type, 0 if bias is None else bias.data_ptr())
        self.kernel = Router(linear, self.top_k, kind)
        self._scores = weight.dtype if kind.rounded else torch.float32
        self._logits = torch.float32 if kind.wide else weight.dtype

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        if not self._takes(hidden_states):
            return self._own(hidden_states)
        rows = hidden_states.numel() // self._width
        logits = torch.empty((rows, self._experts), dtype=self._logits)
        experts = torch.empty((rows, self.top_k), dtype=torch.long)
        weights = torch.empty((rows, self.top_k), dtype=torch.float32)
        self.kernel(
            self._type,
            hidden_states.data_ptr(),
            rows,
            logits.data_ptr(),
            experts.data_ptr(),
            weights.data_ptr(),
        )
        return logits, weights.to(self._scores), experts

    def _takes(self, hidden_states: torch.Tensor) -> bool:
        few = hidden_states.numel() <= FEW_ROWS * self._width
        return few and hidden_states.dtype == self._weight.dtype and hidden_states.is_contiguous()

    def early(self, hidden_states: torch.Tensor, norm: NativeNorm | None = None) -> list[int] | None:
        """What it would choose for one token, [.., hidden], through ``norm`` if there is one, in one call; None: the
        kernels do not take that."""
        if not (self._takes(hidden_states) if norm is None else norm.takes(hidden_states)):
            return None
        return self.kernel.early(None if norm is None else norm.kernel, self._type, hidden_states.data_ptr())


def use_native_routers(model: nn.Module) -> None:
    """Give every router of ``model`` that is a softmax, of all experts or of those chosen, the native forward."""
    if not native.available():
        return
    for module in model.modules():
        found = _router(module)
        if found is not None:
            module.forward = found


def _router(module: Any) -> NativeRouter | None:
    """The native forward of ``module``, or None if it is no router of this kind."""
    parameters = dict(module.named_parameters())
    weight: Any = parameters.get("weight")
    bias: Any = parameters.get("bias")
    if not {"weight"} <= set(parameters) <= {"weight", "bias"} or any(True for _ in module.buffers()):
        return None
    if weight.dim() != 2 or (
        bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], weight.dtype)
    ):
        return None
    top_k = getattr(module, "top_k", None)
    if not isinstance(top_k, int) or weight.dtype not in TYPES or not weight.is_contiguous():
        return None
    generator = torch.Generator().manual_seed(0)
    kinds = set()
    for scale in _TRIAL_SCALES:
        given = (torch.randn((_TRIAL_ROWS, weight.shape[1]), generator=generator) * scale).to(weight.dtype)
        try:
            logits, scores, experts = module(given)
            factor = float(getattr(module, "routed_scaling_factor", 1.0))
            kinds.add(_kind(given, weight, bias, top_k, logits, scores, experts, factor))
        except Exception:
            # It wants or returns something else.
            return None
    kind = kinds.pop()
    return None if kinds or kind is None else NativeRouter(module, kind)


def _kind(
    given: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    logits: torch.Tensor,
    scores: torch.Tensor,
    experts: Any,
    scale: float,
) -> RouterKind | None:
    """The kind of a router that returned this for ``given``, or None if it is computed otherwise."""
    exact = nn.functional.linear(given.float(), weight.float(), None if bias is None else bias.float())
    error = (logits.float() - exact).square().mean().sqrt()
    types = {torch.float32, weight.dtype}
    if logits.dtype not in types or not error <= torch.finfo(weight.dtype).eps * exact.square().mean().sqrt():
        return None
    if experts.dtype != torch.long or scores.dtype not in types:
        return None
    rounded, wide = scores.dtype == weight.dtype, logits.dtype == torch.float32
    for in_order, normed, factor in product((True, False), (True, False), dict.fromkeys((1.0, scale))):
        best, index = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1, sorted=in_order)
        expected = (best / best.sum(dim=-1, keepdim=True) if normed else best) * factor
        if torch.equal(index, experts) and torch.equal(scores, expected.to(scores.dtype)):
            return RouterKind(normed, rounded, wide, in_order, factor)
    best, index = torch.topk(logits, top_k, dim=-1)
    expected = torch.softmax(best, dim=-1, dtype=scores.dtype)
    late = torch.equal(index, experts) and torch.equal(scores, expected)
    return RouterKind(False, rounded, wide, late=True) if late else None


class NativeLayer:
    """The forward of a decoder layer: for one token of one sequence native up to its experts, or with them."""

    def __init__(self, module: Any, installed: Installed) -> None:
        """installed: gives the runtime of its experts. Raises: ValueError if the parts are of another kind."""
        mixture = module.mlp
        first, attention, behind = (
            getattr(module, name).forward
            for name in ("input_layernorm", "self_attn", "post_attention_layernorm")
        )
        gate = getattr(mixture, "gate", None) or mixture.router
        router = gate.forward
        if not isinstance(first, NativeNorm) or not isinstance(behind, NativeNorm):
            raise ValueError("norms of another kind")
        if not isinstance(attention, NativeAttention) or not isinstance(router, NativeRouter):
            raise ValueError("attention or router of another kind")
        self._own, self._installed, self._experts = module.forward, installed, mixture.experts
        self._behind = module.post_attention_layernorm
        self._attention, self._width = attention, len(first.weight)
        self._inner = [module.input_layernorm, module.self_attn, module.post_attention_layernorm]
        self._inner += [mixture, gate, mixture.experts]
        self._shared = _shared_forward(mixture)
        shared = None
        if self._shared is not None:
            shared = self._shared.kernel, self._shared.parts
            self._inner.append(mixture.shared_experts)
        self._kernel = Layer(attention.kernel, first.kernel, behind.kernel, router.kernel, shared)
        self._chosen = torch.empty((1, router.top_k), dtype=torch.long)
        self._weights = torch.empty((1, router.top_k), dtype=torch.float32)
        self._places = self._chosen.data_ptr(), self._weights.data_ptr()
        self.watcher: Callable[[torch.Tensor], None] | None = None
        """Is shown the residual stream as it is before the experts, [1, 1, hidden]; it changes afterwards."""

    def __call__(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        if not others and hidden_states.numel() == self._width:
            result = self._one_token(hidden_states, named)
            if result is not None:
                return result
            if self.watcher is not None:
                return self._own_watched(self.watcher, hidden_states, named)
        return self._own(hidden_states, *others, **named)

    def _own_watched(
        self, watcher: Callable[[torch.Tensor], None], hidden_states: torch.Tensor, named: Mapping[str, Any]
    ) -> Any:
        hook = self._behind.register_forward_pre_hook(lambda _, given: watcher(given[0]))
        try:
            return self._own(hidden_states, **named)
        finally:
            hook.remove()

    def _one_token(self, hidden_states: torch.Tensor, named: Mapping[str, Any]) -> torch.Tensor | None:
        """[1, 1, hidden], or None if it must be done module by module."""
        installed = self._installed(self._experts)
        if installed is None:
            return None
        for module in self._inner:
            # Somebody wants to see what goes through it.
            if module._forward_pre_hooks or module._forward_hooks:
                return None
        prepared = self._attention.prepare(
            hidden_states,
            named.get("position_embeddings"),
            named.get("attention_mask"),
            named.get("past_key_values"),
        )
        if prepared is None:
            return None
        cached, arguments = prepared
        runtime, layer = installed
        table = runtime.resident_experts(self._experts, layer)
        out = torch.empty_like(hidden_states)
        if table is not None:
            started = time.perf_counter()
            spent = self._kernel.run(*arguments, out.data_ptr(), self._places, table)
            DENSE_CLOCK.seconds += time.perf_counter() - started - spent / 1e9
            cached.wrote_token()
            runtime.computed(layer, self._chosen[0].tolist(), spent)
            return out
        normed = hidden_states.new_empty((1, self._width))
        started = time.perf_counter()
        self._kernel.route(*arguments, out.data_ptr(), self._places, normed.data_ptr())
        DENSE_CLOCK.seconds += time.perf_counter() - started
        cached.wrote_token()
        if self.watcher is not None:
            self.watcher(out)
        shared: list[torch.Tensor] = []
        own = self._shared
        meanwhile = None if own is None else lambda: shared.append(own(normed))
        mixed = runtime.run_layer(self._experts, layer, normed, self._chosen, self._weights, meanwhile)
        if shared:
            mixed = mixed + shared[0]
        out += mixed.view_as(out)
        return out


def _shared_forward(mixture: Any) -> NativeFfn | None:
    """The native forward of the expert that serves every token, if there is one. Raises: ValueError."""
    shared = getattr(mixture, "shared_experts", None)
    if shared is None:
        return None
    if not isinstance(shared.forward, NativeFfn):
        raise ValueError("a shared expert of another kind")
    return shared.forward


def layer_modules(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of two norms, attention and a router, experts and perhaps a shared one, by their names."""
    mixtures = {id(module) for _, _, module in experts_modules(model)}
    found = []
    for module in model.modules():
        if {name for name, _ in module.named_children()} != _PARTS:
            continue
        inner = dict(module.get_submodule("mlp").named_children())
        if set(inner) in _MIXTURES and id(inner["experts"]) in mixtures:
            found.append(module)
    return found


def use_native_layers(
    model: PreTrainedModel, calls: Mapping[nn.Module, ModuleCall], installed: Installed, trial: LayerTrial
) -> None:
    """Give decoder layers the native forward. calls: what each was called with for one token.

    ``trial`` must be installed as the model's runtime meanwhile.
    """
    if not native.available():
        return
    for module in layer_modules(model):
        if module not in calls:
            continue
        try:
            found = NativeLayer(module, installed)
            agrees = trial.agrees(found, calls[module])
        except Exception:
            # Whatever a trial with arguments of our making raises: not the layer that we know.
            continue
        if agrees:
            module.forward = found


def leave_attention_to_torch(model: nn.Module) -> None:
    """Undo native attention, and layers that contain it: to measure what other models' layers cost."""
    for module in model.modules():
        if isinstance(module.forward, (NativeAttention, NativeLayer)):
            del module.forward


class LayerTrial(NothingResident):
    """An ``ExpertsRuntime`` that notes what experts are given, and returns something that depends on all of it."""

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def run_layer(
        self,
        module: nn.Module,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        if meanwhile is not None:
            meanwhile()
        self._seen.append((hidden_states.clone(), top_k_index.clone(), top_k_weights.to(torch.float32)))
        return hidden_states * 0.37

    def agrees(self, found: NativeLayer, call: ModuleCall) -> bool:
        """Whether both forwards give the same bits for a token after some others."""
        attention, generator = found._attention, torch.Generator().manual_seed(0)
        turns = attention.random_turns(call.arguments["position_embeddings"], 1, generator)
        given = some((1, 1, found._width), generator, attention._dtype)
        states = attention.random_states(_TRIAL_TOKENS - 1, generator)
        results = []
        for forward in (lambda x, named: found._own(x, **named), found._one_token):
            cache = Cache(layers=[GrowingLayer() for _ in range(attention._layer + 1)])
            layer = cache.layers[attention._layer]
            layer.update(states[0], states[1])
            self._seen.clear()
            arguments = {**call.arguments, "past_key_values": cache, "position_embeddings": turns}
            arguments["attention_mask"] = trial_mask(call, [True] * _TRIAL_TOKENS)
            output = forward(given, arguments)
            if len(self._seen) != 1 or not isinstance(output, torch.Tensor):
                return False
            kept = (one[..., :_TRIAL_TOKENS, :].clone() for one in (layer.keys, layer.values))
            results.append((output, *kept, *self._seen[0], torch.tensor(layer.get_seq_length())))
        return all(torch.equal(theirs, ours) for theirs, ours in zip(*results, strict=True))
