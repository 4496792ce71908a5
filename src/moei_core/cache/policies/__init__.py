"""Cache policies, one file each, and the one registry of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moei_core.cache.policies.activation_aware import ActivationAware
from moei_core.cache.policies.allocation import AllocatedLRU
from moei_core.cache.policies.base import CachePolicy
from moei_core.cache.policies.belady import GlobalBelady, GlobalBeladyBypass, LayerBelady, LayerBeladyBypass
from moei_core.cache.policies.cost_aware import CostAware
from moei_core.cache.policies.learned import LearnedMixture
from moei_core.cache.policies.learned_native import NativeMixture
from moei_core.cache.policies.lfu import DecayedLFU, GlobalLFU, LayerLFU, RequestLFU
from moei_core.cache.policies.lru import GlobalLRU, LayerLRU
from moei_core.cache.policies.static import OnDemand, Static
from moei_core.errors import UsageError
from moei_core.quant import native

POLICIES: dict[str, Callable[[int, Mapping[int, int]], CachePolicy]] = {
    "learned": NativeMixture if native.available() else LearnedMixture,
    "layer-lru": LayerLRU,
    "global-lru": GlobalLRU,
    "layer-lfu": LayerLFU,
    "global-lfu": GlobalLFU,
    "request-lfu": RequestLFU,
    "decayed-lfu": DecayedLFU,
    "activation-aware": ActivationAware,
    "allocated-lru": AllocatedLRU,
    "cost-aware": CostAware,
    "static": Static,
    "on-demand": OnDemand,
    "layer-belady": LayerBelady,
    "layer-belady-bypass": LayerBeladyBypass,
    "global-belady": GlobalBelady,
    "global-belady-bypass": GlobalBeladyBypass,
}
"""Name to constructor(resident capacity, num_experts by layer)."""

LIVE_POLICIES = tuple(name for name, one in POLICIES.items() if not getattr(one, "needs_future", False))
"""Those that can run in a chat: they need no future."""

DEFAULT_POLICY = "learned"


def live_policy(name: str, where: str = "") -> Callable[[int, Mapping[int, int]], CachePolicy]:
    """The constructor of one of ``LIVE_POLICIES``. where: what named it, for the error. Raises: UsageError."""
    if name not in LIVE_POLICIES:
        what = f"there is no cache policy '{name}' for a chat."
        raise UsageError(
            f"{where}: {what}" if where else what[0].upper() + what[1:],
            "It needs the accesses to come: it can only simulate." if name in POLICIES else "",
            f"Choose from: {', '.join(LIVE_POLICIES)}.",
        )
    return POLICIES[name]


__all__ = ["DEFAULT_POLICY", "LIVE_POLICIES", "POLICIES", "CachePolicy", "live_policy"]
