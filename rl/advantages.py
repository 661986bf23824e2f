"""Advantages from rewards: pure functions on tensors.

M rewards, each belonging to a group (the rollouts of one prompt). A missing reward is NaN: it takes no
part in its group's statistics and its advantage is NaN, which the caller masks out.
"""

from __future__ import annotations

import torch


def group_advantage(
    reward: torch.Tensor, group: torch.Tensor, baseline: str = "mean", scale: str = "none", eps: float = 1e-4
) -> torch.Tensor:
    """Reward minus a baseline of its group.

    Args:
        reward: [M], NaN where there is no score.
        group: int64 [M], group index of each reward, 0..num_groups-1.
        baseline: "mean" of the group, or "leave_one_out" (mean of the others; RLOO, Ahmadian et al. 2024).
        scale: "none" (Dr. GRPO, Liu et al. 2025), "std" (population standard deviation of the group plus
            eps; GRPO, Shao et al. 2024), or "batch_std" (that of all advantages given).

    Returns:
        [M], NaN where the reward is NaN.
    """
    valid = ~torch.isnan(reward)
    value = torch.where(valid, reward, torch.zeros_like(reward))
    num_groups = int(group.max()) + 1 if len(group) else 0
    zeros = torch.zeros(num_groups, dtype=reward.dtype, device=reward.device)
    count = zeros.index_add(0, group, valid.to(reward.dtype))
    mean = zeros.index_add(0, group, value) / count.clamp(min=1)
    centred = value - mean[group]
    if baseline == "leave_one_out":
        others = count[group] - 1
        # With a single valid rollout there is nothing to compare with: advantage 0.
        advantage = torch.where(others > 0, centred * count[group] / others.clamp(min=1), torch.zeros_like(centred))
    elif baseline == "mean":
        advantage = centred
    else:
        raise ValueError(f"algorithm.baseline must be mean or leave_one_out, got {baseline!r}")
    if scale == "std":
        square = torch.where(valid, centred**2, torch.zeros_like(centred))
        std = (zeros.index_add(0, group, square) / count.clamp(min=1)).sqrt()
        advantage = advantage / (std[group] + eps)
    elif scale == "batch_std":
        # Advantages have mean 0 in every group, so the root mean square is their standard deviation.
        advantage = advantage / (advantage[valid].square().mean().sqrt() + eps)
    elif scale != "none":
        raise ValueError(f"algorithm.scale must be none, std or batch_std, got {scale!r}")
    return torch.where(valid, advantage, torch.full_like(advantage, torch.nan))


def zero_variance_groups(reward: torch.Tensor, group: torch.Tensor, steps: torch.Tensor | None = None) -> torch.Tensor:
    """bool [num_groups]: groups whose scored rewards are all equal (they carry no policy gradient).

    Args:
        steps: [M, T] rewards of every step, which must then be equal too at every step.
    """
    if steps is not None:
        return torch.stack([zero_variance_groups(column, group) for column in (reward, *steps.T)]).all(dim=0)
    num_groups = int(group.max()) + 1 if len(group) else 0
    low = torch.full((num_groups,), torch.inf, dtype=reward.dtype)
    high = -low
    valid = ~torch.isnan(reward)
    low = low.scatter_reduce(0, group[valid], reward[valid], "amin")
    high = high.scatter_reduce(0, group[valid], reward[valid], "amax")
    return ~(high > low)
