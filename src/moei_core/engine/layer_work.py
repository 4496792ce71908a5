"""The rows of one layer of one forward pass, computed expert by expert and summed in a fixed order.

``LayerWork`` is the general way. ``TokenWork`` is the short one that decoding takes when all is in memory; it gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moei_core.adapters.dense_linear import TYPES
from moei_core.engine.expert_compute import HeldExpert, expert_forward
from moei_core.engine.native_compute import NativeExperts
from moei_core.engine.steady_shapes import missing_rows
from moei_core.quant.native_layer import weigh_rows


class Choice(NamedTuple):
    """What a layer's router chose. rows: flat positions [token * top_k + column] of each expert, experts and positions
    ascending, columns in ascending expert order; scale: its weights there, float32 [tokens * top_k, 1]."""

    rows: dict[int, NDArray[np.int64]]
    scale: torch.Tensor

    @classmethod
    def of(
        cls, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, named: tuple[int, ...], num_experts: int
    ) -> Choice:
        """Both [tokens, top_k], on the host; ``num_experts`` means no expert. named: of a single token, its experts."""
        width = top_k_index.shape[-1]
        if len(top_k_index) == 1 and len(named) == len(set(named)) == width:
            order = sorted(range(width), key=named.__getitem__)
            places = np.arange(width)
            rows = {named[column]: places[i : i + 1] for i, column in enumerate(order)}
            weights = top_k_weights[0].to(torch.float32).numpy().take(order)
            return cls(rows, torch.from_numpy(weights).view(-1, 1))
        index, columns = torch.sort(top_k_index, dim=-1)
        scale = torch.gather(top_k_weights, -1, columns).to(torch.float32).reshape(-1, 1)
        return cls(_rows_by_expert(index, num_experts), scale)


class LayerWork:
    """One layer of one forward pass: which rows each expert has, and where its outputs go."""

    def __init__(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        choice: Choice,
        kernel: Callable[[HeldExpert], NativeExperts | None],
    ) -> None:
        """hidden_states: [tokens, hidden]. kernel: what computes an expert natively, if anything does."""
        self.module, self.hidden_states, self._kernel = module, hidden_states, kernel
        self._exact: torch.Tensor | None = None
        self.rows, self._scale = choice
        self.tokens = len(hidden_states)
        self.top_k = len(self._scale) // self.tokens

    @cached_property
    def _outputs(self) -> torch.Tensor:
        # Zeros, since a row may have fewer experts than top_k.
        shape = self.tokens * self.top_k, self.hidden_states.shape[-1]
        return self.hidden_states.new_zeros(shape, dtype=torch.float32)

    def compute(self, experts: Sequence[HeldExpert]) -> None:
        """The outputs of some experts, each for all its tokens. How depends on the access alone."""
        batches: dict[int, tuple[NativeExperts, list[HeldExpert]]] = {}
        for expert in experts:
            kernel = self._kernel(expert)
            if kernel is not None and kernel.takes(len(self.rows[expert.key.expert])):
                batches.setdefault(id(kernel), (kernel, []))[1].append(expert)
            else:
                # The rows see to their number themselves: a prompt's ``SteadyShapes`` would cost more than it does.
                with torch._C.DisableTorchFunction():
                    self._compute_in_torch(expert)
        for kernel, batch in batches.values():
            self._compute_natively(kernel, batch)

    def _compute_natively(self, kernel: NativeExperts, batch: list[HeldExpert]) -> None:
        positions = [self.rows[expert.key.expert] for expert in batch]
        if self._exact is None:
            self._exact = self.hidden_states.to(torch.float32).contiguous()
        if not getattr(self.module, "has_post_expert_norm", False):
            kernel.place(batch, positions, self.top_k, self._exact, self._scale, self._outputs)
            return
        output = kernel(batch, positions, self.top_k, self._exact)
        output = self.module.post_expert_norm(output.to(self.hidden_states.dtype)).to(torch.float32)
        place = torch.from_numpy(np.concatenate(positions))
        self._outputs[place] = output * self._scale[place]

    def _compute_in_torch(self, expert: HeldExpert) -> None:
        place = torch.from_numpy(self.rows[expert.key.expert])
        # Some row once more, as often as it takes: see ``steady_shapes``.
        missing = missing_rows(self.hidden_states, len(place))
        padded = torch.cat((place, place[:1].expand(missing)))
        output = expert_forward(self.module, expert.weights, self.hidden_states[padded // self.top_k])
        self._outputs[place] = output[: len(place)].to(torch.float32) * self._scale[place]

    def take_over(self, positions: list[int], outputs: torch.Tensor) -> None:
        """Some rows of ``outputs``, [tokens * top_k, hidden], are what was computed elsewhere."""
        place = torch.tensor(positions)
        self._outputs[place] = outputs[place] * self._scale[place]

    def total(self) -> torch.Tensor:
        """[tokens, hidden]: the weighted outputs of each token's experts, summed in ascending expert order."""
        return sum_rows(self._outputs, self.top_k).to(self.hidden_states.dtype)


class TokenWork:
    """One layer of one token: one native call if its experts are all here, else one for those of each arrival.

    Each of the token's experts must be named once. What no kernel computes is left to ``LayerWork``.
    """

    tokens = 1

    def __init__(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        weights: dict[int, float],
        kernel: Callable[[HeldExpert], NativeExperts | None],
    ) -> None:
        """hidden_states: [1, hidden]. weights: by expert, ascending."""
        self._module, self._hidden_states, self._kernel = module, hidden_states, kernel
        self._rows, self._weights = list(weights), list(weights.values())
        self._general: LayerWork | None = None
        self._outputs: torch.Tensor | None = None
        self._done: list[int] = []
        self._total: torch.Tensor | None = None

    def compute(self, experts: Sequence[HeldExpert]) -> None:
        """The outputs of some experts, ascending in each call."""
        kernel = None if self._general is not None else self._kernel_of_all(experts)
        if kernel is None:
            self._leave_to_general().compute(experts)
        elif len(experts) == len(self._weights):
            self._total = kernel.token(experts, self._weights, self._hidden_states)
        else:
            if self._outputs is None:
                shape = len(self._weights), self._hidden_states.shape[-1]
                self._outputs = torch.empty(shape, dtype=torch.float32)
            rows = [self._rows.index(expert.key.expert) for expert in experts]
            kernel.rows(experts, rows, self._hidden_states, self._outputs)
            self._done += rows

    def total(self) -> torch.Tensor:
        """[1, hidden]: the weighted outputs of the token's experts, summed in ascending expert order."""
        if self._total is not None:
            return self._total
        if self._general is not None:
            return self._general.total()
        assert self._outputs is not None and len(self._done) == len(self._weights)
        total = torch.empty_like(self._hidden_states)
        weigh_rows(
            total.shape[-1], self._weights, TYPES[total.dtype], self._outputs.data_ptr(), total.data_ptr()
        )
        return total

    def _kernel_of_all(self, experts: Sequence[HeldExpert]) -> NativeExperts | None:
        """What computes all of them in one call, if anything does."""
        if getattr(self._module, "has_post_expert_norm", False):
            return None
        if any(expert.kind != experts[0].kind for expert in experts):
            return None
        return self._kernel(experts[0])

    def _leave_to_general(self) -> LayerWork:
        """With what has been computed so far."""
        if self._general is None:
            index, weights = torch.tensor([self._rows]), torch.tensor([self._weights])
            choice = Choice.of(index, weights, tuple(self._rows), int(self._module.num_experts))
            self._general = LayerWork(self._module, self._hidden_states, choice, self._kernel)
            if self._outputs is not None:
                self._general.take_over(self._done, self._outputs)
        return self._general


def sum_rows(rows: torch.Tensor, per_token: int) -> torch.Tensor:
    """[tokens * per_token, width] -> [tokens, width]: each token's rows, added one after the other."""
    columns = rows.view(-1, per_token, rows.shape[-1])
    total = columns[:, 0].clone()
    for column in range(1, per_token):
        total += columns[:, column]
    return total


def _rows_by_expert(index: torch.Tensor, num_experts: int) -> dict[int, NDArray[np.int64]]:
    """Flat positions [token * top_k + column] of each chosen expert, experts and positions ascending."""
    chosen = index.reshape(-1).numpy()
    order = np.argsort(chosen, kind="stable")
    experts, starts = np.unique(chosen[order], return_index=True)
    parts = np.split(order, starts[1:]) if len(experts) else []
    return {
        expert: part for expert, part in zip(experts.tolist(), parts, strict=True) if expert < num_experts
    }
