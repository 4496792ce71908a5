"""Routers of later layers applied early (Pre-gated MoE, arXiv 2308.12066): what hints are made of.

Modules have other names in every family, so they are found by what they do: one token is run, and a layer's
router is the module that returned the experts which its experts module was then given; the norm before it is
the one whose output the router was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from moei_core.adapters.native_decode import NativeNorm
from moei_core.adapters.native_layer import NativeLayer, NativeRouter
from moei_core.adapters.skeleton import experts_modules


@dataclass(slots=True)
class _Router:
    """A layer's router: what its input looks like, where in its output the chosen experts are, its norm and layer."""

    module: nn.Module
    place: int
    dimensions: int
    block: nn.Module
    norm: nn.Module | None = None
    native: NativeRouter | None = None
    native_norm: NativeNorm | None = None
    """Both as native calls, if they are."""


class EarlyRouters:
    """The routers of a model by decoder layer, for single tokens.

    While it is attached it keeps, for each layer, the last input of the layer's norm: the residual stream,
    which is what a later layer's norm expects. ``close`` detaches it.
    """

    def __init__(self, model: nn.Module, run_token: Callable[[], Mapping[int, torch.Tensor]]) -> None:
        """run_token: runs one token and returns what each layer's experts were given, ``top_k_index``."""
        self._routers = _find(model, run_token)
        self._next = dict(pairwise(self.layers))
        self._residual: dict[int, torch.Tensor] = {}
        self._asked: dict[int, bool] = {}
        self._queued: dict[int, tuple[bool, torch.Tensor]] = {}
        self._watching, self._detach = False, list[Callable[[], None]]()
        self.watch(True)

    @property
    def watching(self) -> bool:
        """Whether residual streams are kept."""
        return self._watching

    def kept(self, layer: int) -> torch.Tensor | None:
        """The residual stream of ``layer``, if it is kept."""
        return self._residual.get(layer)

    def keep(self, layer: int, residual: torch.Tensor) -> None:
        """A layer is run without its modules: this is the residual stream that its norm would have been given."""
        if self._watching:
            self._residual[layer] = residual

    def watch(self, wanted: bool) -> None:
        """Keep residual streams from now on, or no longer."""
        if wanted is self._watching:
            return
        self._watching = wanted
        for detach in self._detach:
            detach()
        self._detach.clear()
        for kept in (self._residual, self._asked, self._queued):
            kept.clear()
        for layer, router in self._routers.items():
            if wanted and router.norm is not None:
                self._detach.append(self._attach(layer, router.block.forward, router.norm))

    def _attach(self, layer: int, forward: Any, norm: nn.Module) -> Callable[[], None]:
        """Keep what the norm of ``layer`` is given. Returns what ends that."""

        def keep(residual: torch.Tensor) -> None:
            self._residual[layer] = residual
            self._queued.pop(layer, None)

        if not isinstance(forward, NativeLayer):
            return norm.register_forward_pre_hook(lambda _, inputs: keep(inputs[0])).remove
        # A hook would take the layer off its native call.
        forward.watcher = keep
        return partial(setattr, forward, "watcher", None)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose router was found, ascending."""
        return tuple(sorted(self._routers))

    def after(self, layer: int) -> int | None:
        """The next layer after ``layer`` whose router was found; None: ``layer`` has none itself, or is the last."""
        return self._next.get(layer)

    def has_norm(self, layer: int) -> bool:
        """Whether the norm before the router of ``layer`` is known."""
        return self._routers[layer].norm is not None

    def route(self, layer: int, hidden_states: torch.Tensor) -> list[int]:
        """What the router of ``layer`` chooses for one token, most weight first where the router sorts.

        hidden_states: [1, hidden_size], as the layer's experts would be given it.
        """
        native = self._routers[layer].native
        if native is not None and (chosen := native.early(hidden_states)) is not None:
            return chosen
        # The engine knows hidden states of the host; the routers may be on a device.
        given = hidden_states.to(next(self._routers[layer].module.parameters()).device)
        with torch.inference_mode():
            return [int(expert) for expert in self._chosen(layer, given).tolist()]

    def _chosen(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        router = self._routers[layer]
        shape = (1,) * (router.dimensions - 1) + (hidden_states.shape[-1],)
        chosen: torch.Tensor = router.module(hidden_states.reshape(shape))[router.place]
        return chosen.reshape(-1)

    def can_apply(self, source: int, norm: bool) -> bool:
        """Whether the router of the layer after ``source`` can be applied to what its experts are given now.

        norm: to the residual stream that is kept instead, through its own norm.
        """
        target, residual = self.after(source), self._residual.get(source)
        if target is None or not norm:
            return target is not None
        return residual is not None and _is_single(residual) and self.has_norm(target)

    def early(self, source: int, hidden_states: torch.Tensor, norm: bool) -> torch.Tensor:
        """What it then chooses for a single token, on the device, without waiting. hidden_states: of ``source``."""
        target = self.after(source)
        assert target is not None
        return self._chosen(target, self._normed(target, self._residual[source]) if norm else hidden_states)

    def _normed(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        norm = self._routers[layer].norm
        assert norm is not None
        output: torch.Tensor = norm(residual)
        # Running the norm has set off its own hook.
        self._residual.pop(layer, None)
        return output

    def recorded(self, source: int, norm: bool) -> list[int] | None:
        """What ``early`` gave where it was queued with the token's recording; None: it was not, and the first that is
        asked for so will be queued with the next token's."""
        self._asked.setdefault(source, norm)
        found = self._queued.pop(source, None)
        return (
            None if found is None or found[0] is not norm else [int(expert) for expert in found[1].tolist()]
        )

    def queue(self, source: int, pieces: Mapping[bool, tuple[Callable[[], None], torch.Tensor]]) -> None:
        """A token comes to the experts of ``source``. pieces: by norm, what queues ``early``, and where its result will
        be on the host."""
        self._queued.pop(source, None)
        norm = self._asked.pop(source, None)
        if self._watching and norm is not None and norm in pieces:
            queue, host = pieces[norm]
            queue()
            self._queued[source] = norm, host

    def route_residual(self, layer: int, source: int) -> list[int] | None:
        """What the router of ``layer`` chooses for the residual stream before the experts of ``source``, through the
        norm of ``layer``. None if that stream was not seen since the last question."""
        router, residual = self._routers[layer], self._residual.pop(source, None)
        if router.norm is None or residual is None or not _is_single(residual):
            return None
        if router.native is not None and router.native_norm is not None:
            chosen = router.native.early(residual, router.native_norm)
            if chosen is not None:
                return chosen
        with torch.inference_mode():
            output = self._normed(layer, residual)
        return self.route(layer, output.reshape(1, -1))

    def close(self) -> None:
        """Leave the model as it was."""
        self.watch(False)


def _find(model: nn.Module, run_token: Callable[[], Mapping[int, torch.Tensor]]) -> dict[int, _Router]:
    calls: dict[int, list[tuple[nn.Module, torch.Tensor, Any]]] = {}
    blocks: dict[int, nn.Module] = {}
    hooks = []
    for path, layer, _ in experts_modules(model):
        # Everything in the same decoder layer: the path up to and with its number.
        pieces = path.split(".")
        number = next(at for at, piece in enumerate(pieces) if piece.isdigit())
        block = blocks[layer] = model.get_submodule(".".join(pieces[: number + 1]))
        seen = calls[layer] = []
        for module in block.modules():
            hooks.append(module.register_forward_hook(_noter(seen)))
    try:
        chosen = run_token()
    finally:
        for hook in hooks:
            hook.remove()
    routers: dict[int, _Router] = {}
    for layer, seen in calls.items():
        for module, given, output in seen:
            place = _place(output, chosen.get(layer))
            if place is None or any(True for _ in experts_modules(module)):
                continue
            alone = _alone(module, given)
            if isinstance(alone, tuple) and _place(alone, chosen[layer]) == place:
                router = routers[layer] = _Router(module, place, given.dim(), blocks[layer])
                router.norm = next(
                    (
                        norm
                        for norm, residual, normed in seen
                        if "norm" in type(norm).__name__.lower()
                        and isinstance(normed, torch.Tensor)
                        and normed.numel() == given.numel()
                        and torch.equal(normed.reshape(-1), given.reshape(-1))
                        and isinstance(_alone(norm, residual), torch.Tensor)
                    ),
                    None,
                )
                if isinstance(module.forward, NativeRouter):
                    router.native = module.forward
                if router.norm is not None and isinstance(router.norm.forward, NativeNorm):
                    router.native_norm = router.norm.forward
                break
    return routers


def _is_single(residual: torch.Tensor) -> bool:
    """Whether it is one token's."""
    return residual.numel() == residual.shape[-1]


def _alone(module: nn.Module, given: torch.Tensor) -> Any:
    """What the module makes of this and nothing else, which is all that there is early; None: it wants more."""
    try:
        with torch.inference_mode():
            return module(given)
    except Exception:
        return None


def _noter(seen: list[tuple[nn.Module, torch.Tensor, Any]]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            seen.append((module, inputs[0], output))

    return note


def _place(output: Any, chosen: torch.Tensor | None) -> int | None:
    """Where in a module's output the experts are that were chosen for the token; None: nowhere."""
    if chosen is None or not isinstance(output, tuple):
        return None
    for place, value in enumerate(output):
        whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
        if whole and value.numel() == chosen.numel() and torch.equal(value.reshape(-1), chosen.reshape(-1)):
            return place
    return None
