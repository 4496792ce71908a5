"""What a hooked model runs its experts through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from moei_core.quant.native_layer import ExpertTable


class ExpertsRuntime(Protocol):
    """What runs in place of each layer's experts."""

    def run_layer(
        self,
        module: nn.Module,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """The routed experts' output for one layer.

        hidden_states: [tokens, hidden_size]. top_k_index: [tokens, top_k] integers; ``num_experts`` means no
        expert. top_k_weights: [tokens, top_k]. meanwhile: called once, when what is absent has been asked for.
        Returns [tokens, hidden_size] in ``hidden_states``' dtype.
        """

    def resident_experts(self, module: nn.Module, layer: int) -> ExpertTable | None:
        """A token comes to ``layer``: its experts, if the caller may compute them without asking for each.

        After computing it must call ``computed``. None: it must call ``run_layer``.
        """

    def computed(self, layer: int, experts: list[int], nanoseconds: int) -> None:
        """A token has been through ``experts`` of ``layer``, in the router's order, which took so long."""


class NothingResident:
    """The part of an ``ExpertsRuntime`` that wants to see every layer."""

    def resident_experts(self, module: nn.Module, layer: int) -> None:
        return

    def computed(self, layer: int, experts: list[int], nanoseconds: int) -> None:
        raise AssertionError("no expert is resident")
