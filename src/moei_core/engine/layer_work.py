"""The rows of one layer of one forward pass, computed expert by expert and summed in a fixed order.

``LayerWork`` is the general way. ``TokenWork`` is the short one that decoding takes when all is in memory; it gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moei_core.engine.expert_compute import HeldExpert, expert_forward
from moei_core.engine.native_compute import NativeExperts
from moei_core.engine.steady_shapes import missing_rows


class LayerWork:
    """One layer of one forward pass: which rows each expert has, and where its outputs go."""

    def __init__(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        kernel: Callable[[HeldExpert], NativeExperts | None],
    ) -> None:
        """hidden_states: [tokens, hidden]. index, weights: [tokens, top_k], index ascending in each row.

        kernel: what computes an expert natively, if anything does.
        """
        self.module, self.hidden_states, self._kernel = module, hidden_states, kernel
        self._exact: torch.Tensor | None = None
        self.tokens, self.top_k = index.shape
        self.rows = _rows_by_expert(index, int(module.num_experts))
        self._scale = weights.to(torch.float32).reshape(-1, 1)
        # Zeros, since a row may have fewer experts than top_k.
        self._outputs = hidden_states.new_zeros(
            (self.tokens * self.top_k, hidden_states.shape[-1]), dtype=torch.float32
        )

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
        output = kernel(batch, positions, self.top_k, self._exact)
        if getattr(self.module, "has_post_expert_norm", False):
            output = self.module.post_expert_norm(output.to(self.hidden_states.dtype)).to(torch.float32)
        place = torch.tensor([position for one in positions for position in one])
        self._outputs[place] = output * self._scale[place]

    def _compute_in_torch(self, expert: HeldExpert) -> None:
        rows = self.rows[expert.key.expert]
        place = torch.tensor(rows)
        # Some row once more, as often as it takes: see ``steady_shapes``.
        missing = missing_rows(self.hidden_states, len(rows))
        padded = torch.tensor(rows + rows[:1] * missing) if missing else place
        output = expert_forward(self.module, expert.weights, self.hidden_states[padded // self.top_k])
        self._outputs[place] = output[: len(rows)].to(torch.float32) * self._scale[place]

    def total(self) -> torch.Tensor:
        """[tokens, hidden]: the weighted outputs of each token's experts, summed in ascending expert order."""
        columns = self._outputs.view(self.tokens, self.top_k, -1)
        total = columns[:, 0].clone()
        for column in range(1, self.top_k):
            total += columns[:, column]
        return total.to(self.hidden_states.dtype)


class TokenWork:
    """One layer of one token: one native call if its experts are all here, else ``LayerWork``.

    Each of the token's experts must be named once.
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
        self._module, self._hidden_states, self._kernel, self._weights = (
            module,
            hidden_states,
            kernel,
            weights,
        )
        self._general: LayerWork | None = None
        self._total: torch.Tensor | None = None

    def compute(self, experts: Sequence[HeldExpert]) -> None:
        """The outputs of some experts, ascending in each call."""
        if self._general is None and len(experts) == len(self._weights):
            kernel = self._kernel(experts[0])
            alike = all(expert.kind == experts[0].kind for expert in experts)
            if kernel is not None and alike and not getattr(self._module, "has_post_expert_norm", False):
                self._total = kernel.token(experts, list(self._weights.values()), self._hidden_states)
                return
        if self._general is None:
            index = torch.tensor([list(self._weights)])
            weights = torch.tensor([list(self._weights.values())])
            self._general = LayerWork(self._module, self._hidden_states, index, weights, self._kernel)
        self._general.compute(experts)

    def total(self) -> torch.Tensor:
        """[1, hidden]: the weighted outputs of the token's experts, summed in ascending expert order."""
        if self._total is not None:
            return self._total
        assert self._general is not None
        return self._general.total()


def _rows_by_expert(index: torch.Tensor, num_experts: int) -> dict[int, list[int]]:
    """Flat positions [token * top_k + column] of each chosen expert, experts and positions ascending."""
    rows: dict[int, list[int]] = {}
    for position, expert in enumerate(index.reshape(-1).tolist()):
        if expert < num_experts:
            rows.setdefault(expert, []).append(position)
    return dict(sorted(rows.items()))
