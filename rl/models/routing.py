"""Mixture-of-experts layers of transformers' backbones: the product with the chosen experts, and their routers.

A router returns logits [N, E], weights [N, k] and the chosen experts [N, k] of N tokens. A hook counts how many tokens
each expert got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from rl import distributed

NAME = "diffusion"


def experts_forward(experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' experts interface: one product grouped by expert, and a loop over experts where it has no kernel.

    That is in float64, and where rows of the weights are no multiples of 16 bytes. No expert has a capacity: no token
    is dropped.

    Args:
        hidden: [N, D].
        chosen: int64 [N, k], the experts of each token.
        weight: [N, k], what their outputs are multiplied with.

    Returns:
        [N, D].
    """
    widths = {hidden.shape[-1], experts.down_proj.shape[-1]}
    if hidden.dtype == torch.float64 or any(width * hidden.element_size() % 16 for width in widths):
        return type(experts).forward.__wrapped__(experts, hidden, chosen, weight)
    return grouped_mm_experts_forward(experts, hidden, chosen, weight)


ExpertsInterface.register(NAME, experts_forward)


def routers(model: nn.Module) -> list[Any]:
    """The routers of a model in the order of its layers, without those of a joint head; empty without experts."""
    named = [m for name, m in model.named_modules() if "joint_head" not in name]
    return [m for m in named if hasattr(m, "top_k") and hasattr(m, "num_experts")]


def prepare(backbone: Any) -> None:
    """Give a new backbone our product, and its routers their hook; nothing without experts."""
    found = routers(backbone)
    if found:
        backbone.set_experts_implementation(NAME)
    for router in found:
        router.counts = None
        router.register_forward_hook(_routed)


def freeze(model: nn.Module) -> None:
    """Train no router.

    Raises:
        ValueError: there is none.
    """
    found = routers(model)
    if not found:
        raise ValueError("model.train_router is false, and the model has no routers: leave it out")
    for router in found:
        router.requires_grad_(False)


def _routed(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
    if router.counts is not None:
        flat = output[2].reshape(-1)
        router.counts = router.counts.to(flat.device).scatter_add(0, flat, torch.ones_like(flat))


def count_loads(found: Sequence[Any]) -> None:
    """Begin to count how many tokens each expert of some routers gets."""
    for router in found:
        router.counts = torch.zeros(router.num_experts, dtype=torch.int64)


def load_metrics(found: Sequence[Any]) -> dict[str, float]:
    """How evenly the routers spread the tokens of all ranks since `count_loads`, padding included.

    Returns:
        empty without routers. `moe/load_entropy`: entropy of the experts' shares over its maximum, mean of the layers;
        1 is even. `moe/load_max`: largest share over the even one. `moe/unused`: share of experts without a token.
    """
    if not found:
        return {}
    mine = [router.counts.tolist() for router in found]
    counts = torch.tensor(distributed.gather_objects(mine), dtype=torch.float64).sum(0)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    even = counts.shape[1]
    return {
        "moe/load_entropy": float(torch.special.entr(share).sum(1).mean() / math.log(even)),
        "moe/load_max": float(share.max() * even),
        "moe/unused": float((counts == 0).double().mean()),
    }
