"""Returns and advantages over denoising steps (generalised advantage estimation, Schulman et al. 2016).

A step decides several tokens at once, so rewards and values are first averaged within each step (Wang et al. 2025,
arXiv 2509.06949). A token then starts from its own value and bootstraps on the averages of the *next* step:

    r*_t = mean r_j,   V*_t = mean V_j                  over the tokens j of step t
    R*_t = r*_t + gamma R*_{t+1}                        R_j = r_j + gamma R*_{t+1}
    d*_t = r*_t - V*_t + gamma V*_{t+1}
    A*_t = d*_t + gamma lambda A*_{t+1}                 A_j = r_j - V_j + gamma V*_{t+1} + gamma lambda A*_{t+1}
"""

from __future__ import annotations

import torch


def step_targets(
    reward: torch.Tensor,
    value: torch.Tensor,
    trajectory: torch.Tensor,
    step: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns and advantages of every decision.

    Args:
        reward: [N], reward given to each token at its step.
        value: [N], the critic's value of each token before the update.
        trajectory: int64 [N], 0..M-1.
        step: int64 [N], denoising step within the trajectory, dense from 0.

    Returns:
        returns [N], advantages [N].
    """
    num_trajectories = int(trajectory.max()) + 1
    num_steps = int(step.max()) + 1
    cell = trajectory * num_steps + step

    def step_mean(x: torch.Tensor) -> torch.Tensor:
        """[M, T] means over the tokens of a step, 0 where a trajectory has no such step."""
        zeros = x.new_zeros(num_trajectories * num_steps)
        total = zeros.index_add(0, cell, x)
        count = zeros.index_add(0, cell, torch.ones_like(x))
        return (total / count.clamp(min=1)).view(num_trajectories, num_steps)

    step_reward, step_value = step_mean(reward), step_mean(value)
    # One column more: what follows the last step is worth nothing. Missing steps are zeros behind the end.
    returns = reward.new_zeros(num_trajectories, num_steps + 1)
    advantages = torch.zeros_like(returns)
    next_value = torch.cat([step_value[:, 1:], step_value.new_zeros(num_trajectories, 1)], dim=1)
    delta = step_reward - step_value + gamma * next_value
    for t in reversed(range(num_steps)):
        returns[:, t] = step_reward[:, t] + gamma * returns[:, t + 1]
        advantages[:, t] = delta[:, t] + gamma * lam * advantages[:, t + 1]
    after = (trajectory, step + 1)
    token_return = reward + gamma * returns[after]
    token_advantage = reward - value + gamma * next_value[trajectory, step] + gamma * lam * advantages[after]
    return token_return, token_advantage


def outcome_rewards(outcome: torch.Tensor, trajectory: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """[N] per-token rewards that give a trajectory's outcome [M] to the tokens of its last step."""
    last = torch.zeros_like(outcome, dtype=step.dtype).scatter_reduce(0, trajectory, step, "amax")
    return torch.where(step == last[trajectory], outcome[trajectory], torch.zeros_like(outcome[trajectory]))


def explained_variance(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - Var(target - value) / Var(target); 0 for a constant value, 1 for a perfect one, NaN if target is constant."""
    variance = target.var(correction=0)
    return torch.where(variance > 0, 1 - (target - value).var(correction=0) / variance, torch.nan)
