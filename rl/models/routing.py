"""Mixture-of-experts layers of transformers' backbones: the product with the chosen experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

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


def has_experts(model: nn.Module) -> bool:
    """Whether some layer stacks experts."""
    return any(name.endswith(".experts.gate_up_proj") for name, _ in model.named_parameters())
