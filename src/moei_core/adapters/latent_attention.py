"""Latent attention of single tokens as one native call, where that computes the same.

The cache holds latents, which transformers expands to the keys and values of all heads, those of all tokens anew for
each one. The native call expands nothing. As in ``native_decode``, what a module computes is found by trying it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moei_core.adapters.dense_linear import TYPES
from moei_core.adapters.growing_layer import GrowingLayer
from moei_core.adapters.native_decode import (
    ModuleCall,
    NativeAttention,
    NativeNorm,
    agrees,
    linear_kernel,
    some,
    tolerance,
)
from moei_core.quant import native
from moei_core.quant.native_latent import TURNS, LatentAttention, LatentProjections, NormWeights

_LOW_QUERY = ("q_a_proj", "q_a_layernorm", "q_b_proj")
_ALWAYS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
_NEEDED = frozenset(
    {"layer_idx", "num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "scaling", "v_head_dim"}
)
_KNOWN_ATTRIBUTES = _NEEDED | {
    "attention_dropout", "config", "hidden_size", "is_causal", "kv_lora_rank", "num_key_value_groups", "q_lora_rank",
    "qk_head_dim", "training",
}  # fmt: skip

_ROUNDED = 0.05
"""Tolerance where something is rounded: with blocks, the module quantises each latent and we what is mixed of them."""


class NativeLatentAttention(NativeAttention):
    """The forward of a latent attention module: native for one token of one sequence, else its own."""

    def __init__(self, module: Any, turn: str, dtype: torch.dtype) -> None:
        """turn: of ``TURNS``. Raises: ValueError if the parts do not fit together."""
        low = module.q_lora_rank is not None
        q = module.q_b_proj if low else module.q_proj
        kv_a, kv_b, o = module.kv_a_proj_with_mqa, module.kv_b_proj, module.o_proj
        self._own, self._layer = module.forward, module.layer_idx
        self._dtype, self._type = dtype, TYPES[dtype]
        nope, rotary, value = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
        self.width, self._rank, self._rotary = kv_a.in_features, kv_b.in_features, rotary
        self._turn, self._turn_dtype = rotary, dtype
        self._complex = turn == "neighbors"
        self.tolerance = tolerance(dtype, (*([module.q_a_proj] if low else []), q, kv_a, kv_b, o), _ROUNDED)
        projections = LatentProjections(
            linear_kernel(module.q_a_proj) if low else None,
            _norm(module.q_a_layernorm) if low else None,
            linear_kernel(q),
            linear_kernel(kv_a),
            _norm(module.kv_a_layernorm),
            linear_kernel(kv_b),
            linear_kernel(o),
        )
        heads = module.num_heads, nope, rotary, value
        self.kernel = LatentAttention(projections, heads, float(module.scaling), turn)

    def _turns(self, turn: Any) -> tuple[int, int] | None:
        if not self._complex:
            return super()._turns(turn)
        if not isinstance(turn, torch.Tensor) or turn.dtype != torch.complex64 or not turn.is_contiguous():
            return None
        return (turn.data_ptr(), turn.data_ptr()) if turn.numel() == self._rotary // 2 else None

    def _place(self, layer: GrowingLayer, like: torch.Tensor) -> tuple[int, int, int, int] | None:
        return layer.place_for_token(1, self._rank, like, self._rotary)

    def random_turns(self, like: Any, tokens: int, generator: torch.Generator) -> Any:
        if not self._complex:
            return super().random_turns(like, tokens, generator)
        return torch.view_as_complex(some((1, tokens, self._rotary // 2, 2), generator, torch.float32))

    def random_states(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        latents, turned = ((1, 1, tokens, width) for width in (self._rank, self._rotary))
        return some(latents, generator, self._dtype), some(turned, generator, self._dtype)


def _norm(module: nn.Module) -> NormWeights:
    """Raises: ValueError if it is no norm that the kernel computes."""
    if not isinstance(module.forward, NativeNorm):
        raise ValueError("a norm of another kind")
    return NormWeights(module.forward.weight, module.forward.eps)


def latent_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that look like attention over latents and have nothing that is not known here."""
    found = []
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        if children - {*_ALWAYS} not in ({"q_proj"}, {*_LOW_QUERY}) or not children >= {*_ALWAYS}:
            continue
        # A child that is missing is an attribute that is None.
        own = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and not (value is None and name in ("q_proj", *_LOW_QUERY))
        }
        plain = not dict(module.named_parameters(recurse=False)) and not list(module.buffers(recurse=False))
        if plain and own >= _NEEDED and own <= _KNOWN_ATTRIBUTES:
            found.append(module)
    return found


def use_native_latent_attention(
    model: PreTrainedModel, calls: Mapping[nn.Module, ModuleCall], dtype: torch.dtype
) -> None:
    """Give latent attention modules the native forward. calls: what modules were called with for one token."""
    if not native.available() or dtype not in TYPES:
        return
    for module in latent_attention_modules(model):
        if module not in calls:
            continue
        for turn in TURNS:
            try:
                found = NativeLatentAttention(module, turn, dtype)
            except Exception:
                # Parts of another kind.
                break
            if agrees(found, calls[module]):
                module.forward = found
                break
