"""A compact Qwen3-MoE for training on a CPU, with the same maths as the published architecture.

Experts are stored stacked (one tensor per projection and layer) and run as grouped products over
tokens sorted by expert, which is several times faster on two cores than running many small modules.
`to_hf_state` turns the weights into the published layout, one tensor per expert and projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    """The sizes of the model; every matrix dimension is a multiple of 32."""

    vocab: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    top_k: int = 4
    moe_hidden: int = 64
    rope_theta: float = 10000.0
    eps: float = 1e-6
    max_positions: int = 2048


class GroupedSwiGLU(torch.autograd.Function):
    """Each token through its top-k experts, weighted and summed; gradients written out by hand."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, choice: Tensor, gate_up: Tensor, down: Tensor, dtype):
        """x [N,H], weights and choice [N,k], gate_up [E,2I,H], down [E,H,I]; returns [N,H] in float32."""
        n, k = choice.shape
        flat = choice.reshape(-1)
        order = torch.argsort(flat)
        ends = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).tolist()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        xs = x.to(dtype).index_select(0, torch.div(order, k, rounding_mode="floor"))
        gu, dn = gate_up.to(dtype), down.to(dtype)
        mid = torch.empty(len(order), gu.shape[1], dtype=dtype)
        start = 0
        for e, end in enumerate(ends):
            torch.mm(xs[start:end], gu[e].t(), out=mid[start:end])
            start = end
        gate, up = mid.chunk(2, dim=1)
        act = F.silu(gate) * up
        ys = torch.empty(len(order), x.shape[1], dtype=dtype)
        start = 0
        for e, end in enumerate(ends):
            torch.mm(act[start:end], dn[e].t(), out=ys[start:end])
            start = end
        y = ys.index_select(0, inverse).view(n, k, -1)
        ctx.save_for_backward(weights, order, inverse, xs, gu, dn, mid, act, y)
        ctx.ends, ctx.dtype = ends, dtype
        return torch.bmm(weights.to(dtype)[:, None, :], y)[:, 0].float()

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Gradients for x, the routing weights and both stacks of projections."""
        weights, order, inverse, xs, gu, dn, mid, act, y = ctx.saved_tensors
        n, k = weights.shape
        grad = grad.to(ctx.dtype)
        d_weights = torch.bmm(y, grad[:, :, None])[:, :, 0].float()
        token = torch.div(order, k, rounding_mode="floor")
        dy = grad.index_select(0, token) * weights.to(ctx.dtype).reshape(-1)[order][:, None]
        d_act = torch.empty_like(act)
        d_down = torch.zeros(dn.shape, dtype=ctx.dtype)
        start = 0
        for e, end in enumerate(ctx.ends):
            if end > start:
                torch.mm(dy[start:end], dn[e], out=d_act[start:end])
                torch.mm(dy[start:end].t(), act[start:end], out=d_down[e])
            start = end
        gate, up = mid.chunk(2, dim=1)
        sig = torch.sigmoid(gate)
        silu = gate * sig
        d_mid = torch.cat((d_act * up * (sig + silu * (1 - sig)), d_act * silu), dim=1)
        dxs = torch.empty_like(xs)
        d_gu = torch.zeros(gu.shape, dtype=ctx.dtype)
        start = 0
        for e, end in enumerate(ctx.ends):
            if end > start:
                torch.mm(d_mid[start:end], gu[e], out=dxs[start:end])
                torch.mm(d_mid[start:end].t(), xs[start:end], out=d_gu[e])
            start = end
        dx = dxs.index_select(0, inverse).view(n, k, -1).float().sum(1)
        return dx, d_weights, None, d_gu.float(), d_down.float(), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps)


class Layer(nn.Module):
    """One decoder layer: grouped-query attention with q/k norm, then a sparse mixture of experts."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.c = c
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.norm1 = nn.Parameter(torch.ones(c.hidden))
        self.norm2 = nn.Parameter(torch.ones(c.hidden))
        self.q_norm = nn.Parameter(torch.ones(c.head_dim))
        self.k_norm = nn.Parameter(torch.ones(c.head_dim))
        self.q_proj = nn.Parameter(torch.empty(q, c.hidden))
        self.k_proj = nn.Parameter(torch.empty(kv, c.hidden))
        self.v_proj = nn.Parameter(torch.empty(kv, c.hidden))
        self.o_proj = nn.Parameter(torch.empty(c.hidden, q))
        self.router = nn.Parameter(torch.empty(c.experts, c.hidden))
        self.gate_up = nn.Parameter(torch.empty(c.experts, 2 * c.moe_hidden, c.hidden))
        self.down = nn.Parameter(torch.empty(c.experts, c.hidden, c.moe_hidden))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the new hidden states, the router's probabilities and the experts chosen."""
        c = self.c
        b, t, _ = x.shape
        h = rms_norm(x, self.norm1, c.eps).to(dtype)
        q = F.linear(h, self.q_proj.to(dtype)).view(b, t, c.heads, c.head_dim)
        k = F.linear(h, self.k_proj.to(dtype)).view(b, t, c.kv_heads, c.head_dim)
        v = F.linear(h, self.v_proj.to(dtype)).view(b, t, c.kv_heads, c.head_dim)
        q = rotate(rms_norm(q, self.q_norm, c.eps), rope).to(dtype).transpose(1, 2)
        k = rotate(rms_norm(k, self.k_norm, c.eps), rope).to(dtype).transpose(1, 2)
        k = k.repeat_interleave(c.heads // c.kv_heads, dim=1)
        v = v.transpose(1, 2).repeat_interleave(c.heads // c.kv_heads, dim=1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).reshape(b, t, -1), self.o_proj.to(dtype)).float()
        h = rms_norm(x, self.norm2, c.eps).view(b * t, -1)
        probs = F.linear(h, self.router).softmax(-1)
        weights, choice = probs.topk(c.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = GroupedSwiGLU.apply(h, weights, choice, self.gate_up, self.down, dtype)
        return x + out.view(b, t, -1), probs, choice


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in the half-split convention; x is [batch, tokens, heads, head_dim]."""
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None, :] + turned * sin[:, None, :]


class DemoModel(nn.Module):
    """The whole model; the output projection is tied to the embedding."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.c = c
        self.embed = nn.Parameter(torch.empty(c.vocab, c.hidden))
        self.blocks = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.hidden))
        for name, p in self.named_parameters():
            if p.dim() > 1:
                deep = name.endswith(("o_proj", "down"))
                std = 0.05 if name.endswith("embed") else p.shape[-1] ** -0.5 * (0.05 if deep else 1.0)
                nn.init.normal_(p, std=std)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the first `length` positions."""
        c = self.c
        inv = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angle = torch.outer(torch.arange(length).float(), inv).repeat(1, 2)
        return angle.cos(), angle.sin()

    def forward(
        self, ids: Tensor, dtype=torch.float32
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """ids [batch, tokens] to final states, router probabilities, choices and states per layer."""
        x = self.embed[ids]
        rope = self.rope(ids.shape[1])
        probs, choices, states = [], [], []
        for block in self.blocks:
            x, p, chosen = block(x, rope, dtype)
            probs.append(p)
            choices.append(chosen)
            states.append(x)
        return rms_norm(x, self.norm, self.c.eps), probs, choices, states

    def to_hf_state(self) -> dict[str, Tensor]:
        """The weights under their published names, one tensor per expert and projection."""
        state = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        for i, b in enumerate(self.blocks):
            at = f"model.layers.{i}."
            state[at + "input_layernorm.weight"] = b.norm1
            state[at + "post_attention_layernorm.weight"] = b.norm2
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
                state[f"{at}self_attn.{name}.weight"] = getattr(b, name)
            state[at + "mlp.gate.weight"] = b.router
            for e in range(self.c.experts):
                gate, up = b.gate_up[e].chunk(2)
                state[f"{at}mlp.experts.{e}.gate_proj.weight"] = gate
                state[f"{at}mlp.experts.{e}.up_proj.weight"] = up
                state[f"{at}mlp.experts.{e}.down_proj.weight"] = b.down[e]
        return {name: p.detach().clone().contiguous() for name, p in state.items()}

    def load_hf_state(self, state: dict[str, Tensor]) -> None:
        """Takes weights under their published names."""
        with torch.no_grad():
            self.embed.copy_(state["model.embed_tokens.weight"])
            self.norm.copy_(state["model.norm.weight"])
            for i, b in enumerate(self.blocks):
                at = f"model.layers.{i}."
                b.norm1.copy_(state[at + "input_layernorm.weight"])
                b.norm2.copy_(state[at + "post_attention_layernorm.weight"])
                for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
                    getattr(b, name).copy_(state[f"{at}self_attn.{name}.weight"])
                b.router.copy_(state[at + "mlp.gate.weight"])
                for e in range(self.c.experts):
                    expert = f"{at}mlp.experts.{e}."
                    pair = [state[expert + "gate_proj.weight"], state[expert + "up_proj.weight"]]
                    b.gate_up[e].copy_(torch.cat(pair))
                    b.down[e].copy_(state[expert + "down_proj.weight"])

    def hf_config(self) -> dict:
        """The contents of config.json."""
        c = self.c
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": c.vocab,
            "hidden_size": c.hidden,
            "intermediate_size": c.moe_hidden * c.top_k,
            "moe_intermediate_size": c.moe_hidden,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "num_experts": c.experts,
            "num_experts_per_tok": c.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
            "hidden_act": "silu",
            "rms_norm_eps": c.eps,
            "rope_theta": c.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": c.max_positions,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": c.layers,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
