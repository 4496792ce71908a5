"""Routers of later layers applied early (Pre-gated MoE, arXiv 2308.12066): what hints are made of.

Modules have other names in every family, so they are found by what they do: one token is run, and a layer's
router is the module that returned the experts which its experts module was then given; the norm before it is
the one whose output the router was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moei_core.adapters.skeleton import experts_modules


@dataclass(slots=True)
class _Router:
    """A layer's router: what its input looks like, where in its output the chosen experts are, its norm."""

    module: nn.Module
    place: int
    dimensions: int
    norm: nn.Module | None = None


class EarlyRouters:
    """The routers of a model by decoder layer, for single tokens.

    While it is attached it keeps, for each layer, the last input of the layer's norm: the residual stream,
    which is what a later layer's norm expects. ``close`` detaches it.
    """

    def __init__(self, model: nn.Module, run_token: Callable[[], Mapping[int, torch.Tensor]]) -> None:
        """run_token: runs one token and returns what each layer's experts were given, ``top_k_index``."""
        self._routers = _find(model, run_token)
        self._residual: dict[int, torch.Tensor] = {}
        self._watching, self._hooks = False, list[Any]()
        self.watch(True)

    def watch(self, wanted: bool) -> None:
        """Keep inputs from now on, or no longer: a layer whose norm is watched is not one native call."""
        if wanted is self._watching:
            return
        self._watching = wanted
        for hook in self._hooks:
            hook.remove()
        self._residual.clear()
        self._hooks = [
            router.norm.register_forward_pre_hook(self._keeper(layer))
            for layer, router in self._routers.items()
            if wanted and router.norm is not None
        ]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose router was found, ascending."""
        return tuple(sorted(self._routers))

    def has_norm(self, layer: int) -> bool:
        """Whether the norm before the router of ``layer`` is known."""
        return self._routers[layer].norm is not None

    def route(self, layer: int, hidden_states: torch.Tensor) -> list[int]:
        """What the router of ``layer`` chooses for one token, most weight first where the router sorts.

        hidden_states: [1, hidden_size], as the layer's experts would be given it.
        """
        router = self._routers[layer]
        shape = (1,) * (router.dimensions - 1) + (hidden_states.shape[-1],)
        # The engine knows hidden states of the host; the routers may be on a device.
        given = hidden_states.reshape(shape).to(next(router.module.parameters()).device)
        with torch.inference_mode():
            chosen = router.module(given)[router.place]
        return [int(expert) for expert in chosen.reshape(-1).tolist()]

    def normed(self, layer: int, source: int) -> torch.Tensor | None:
        """The residual stream before the experts of ``source``, through the norm of ``layer``: [1, hidden_size]."""
        norm, residual = self._routers[layer].norm, self._residual.get(source)
        if norm is None or residual is None or residual.numel() != residual.shape[-1]:
            return None
        kept = self._residual.get(layer)
        with torch.inference_mode():
            output = norm(residual)
        # Running the norm here has set off its own hook.
        if kept is None:
            self._residual.pop(layer, None)
        else:
            self._residual[layer] = kept
        return output.reshape(1, -1) if isinstance(output, torch.Tensor) else None

    def close(self) -> None:
        """Take the hooks off the model."""
        self.watch(False)

    def _keeper(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._residual[layer] = inputs[0]

        return keep


def _find(model: nn.Module, run_token: Callable[[], Mapping[int, torch.Tensor]]) -> dict[int, _Router]:
    calls: dict[int, list[tuple[nn.Module, torch.Tensor, Any]]] = {}
    hooks = []
    for path, layer, _ in experts_modules(model):
        # Everything in the same decoder layer: the path up to and with its number.
        pieces = path.split(".")
        number = next(at for at, piece in enumerate(pieces) if piece.isdigit())
        block = model.get_submodule(".".join(pieces[: number + 1]))
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
            if place is not None and not any(True for _ in experts_modules(module)):
                router = routers[layer] = _Router(module, place, given.dim())
                router.norm = next(
                    (
                        norm
                        for norm, _, normed in seen
                        if "norm" in type(norm).__name__.lower()
                        and isinstance(normed, torch.Tensor)
                        and normed.numel() == given.numel()
                        and torch.equal(normed.reshape(-1), given.reshape(-1))
                    ),
                    None,
                )
                break
    return routers


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
