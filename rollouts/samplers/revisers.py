"""Taking revealed tokens back: which positions go back to the mask, or to another token. Pure functions."""

from __future__ import annotations

import torch

from rollouts.samplers.parts import ranks, times


def running_confidence(
    kind: str, running: torch.Tensor, scores: torch.Tensor, filled_now: torch.Tensor
) -> torch.Tensor:
    """float64 [B, L]: confidences after a step that filled some positions.

    Args:
        kind: "max" (the highest so far, whatever token it belonged to) or "last".
        running: float64 [B, L], before; -inf where a position was never filled.
        scores: float64 [B, L], read where `filled_now`.
        filled_now: bool [B, L].
    """
    new = scores if kind == "last" else scores.maximum(running)
    return torch.where(filled_now, new, running)


def remask_least_confident(
    running: torch.Tensor, eligible: torch.Tensor, filled: torch.Tensor, quota: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running-confidence remasking (He et al. 2025, arXiv 2508.13148, section on RCR).

    Every eligible mask is filled, then all but the most confident of the old and new tokens are masked: as many
    masks remain as the quota says, whatever the confidences are. Ties keep the left-most.

    Args:
        running: float64 [B, L], see `running_confidence`.
        eligible, filled: bool [B, L], masks to fill and tokens that may be taken back; never a prompt's.
        quota: int64 [B], by how many the masks become fewer.

    Returns:
        reveal and remask, bool [B, L]: masks that keep their new token, tokens that become masks.
    """
    both = eligible | filled
    keep = filled.sum(-1) + quota
    kept = both & (ranks(running, both) < keep[:, None])
    return eligible & kept, filled & ~kept


def remdm_chances(cap: float, num_steps: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ReMDM with a capped rate (Wang et al. 2025, arXiv 2503.00307), with a(t) = 1 - t.

    sigma = min(cap, (1 - a_s) / a_t), and a mask is revealed with probability (a_s - (1 - sigma) a_t) / (1 - a_t): the
    share of masks stays what it is without remasking. The last step remasks nothing and reveals all.

    Args:
        num_steps, step: int64 [B], of the block.

    Returns:
        float64 [B] each: probability to reveal a mask, probability to remask a token.
    """
    t, s = times(num_steps, step)
    # At t = 1 no token is there to be remasked.
    sigma = torch.where(t < 1, s / (1 - t).clamp(min=1e-12), 1.0).clamp(max=cap)
    return 1 - (s - sigma * (1 - t)) / t, sigma
