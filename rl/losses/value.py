"""The clipped value loss."""

from __future__ import annotations

import torch


def clipped_value_loss(
    value: torch.Tensor, old_value: torch.Tensor, returns: torch.Tensor, clip: float
) -> torch.Tensor:
    """[N]: half the larger of two squared errors, with the value moved at most `clip` from its old one.

    Schulman et al. 2017's implementation; Wang et al. 2025 use the policy's clip range.
    """
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)
