"""Advantages from rewards: pure functions on tensors.

M rewards, each belonging to a group (the rollouts of one prompt). A missing reward is NaN: it takes no
part in its group's statistics and its advantage is NaN, which the caller masks out. Per-step rewards are
[M, T], NaN behind a rollout's last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from rl.estimators.base import Verdicts


def group_advantage(
    reward: torch.Tensor, group: torch.Tensor, baseline: str = "mean", scale: str = "none", eps: float = 1e-4
) -> torch.Tensor:
    """Reward minus a baseline of its group.

    Args:
        reward: [M], NaN where there is no score.
        group: int64 [M], group index of each reward, 0..num_groups-1.
        baseline: "mean" of the group, or "leave_one_out" (mean of the others; RLOO, Ahmadian et al. 2024).
        scale: "none" (Dr. GRPO, Liu et al. 2025), "std" (population standard deviation of the group plus
            eps; GRPO, Shao et al. 2024), "reward_std" (that of all rewards given; Flow-GRPO, Liu et al. 2025) or
            "batch_std" (that of all advantages given). Rewards 0, 1 and 10, 11 of two groups: +-0.5 over 5.02, the
            spread between the groups included, or over 0.5.

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
    elif scale == "reward_std":
        advantage = advantage / (reward[valid].std(correction=0) + eps) if valid.any() else advantage
    elif scale != "none":
        raise ValueError(f"algorithm.scale must be none, std, reward_std or batch_std, got {scale!r}")
    return torch.where(valid, advantage, torch.full_like(advantage, torch.nan))


def returns_to_go(reward: torch.Tensor, given: Sequence[Sequence[float]], gamma: float) -> torch.Tensor:
    """[M, C]: the discounted sum of what an episode is given from each of its chunks on, 0 behind its end.

    Args:
        reward: [M]; what it says beyond the sum of `given`, such as a bonus, counts at the last chunk.
        given: of each episode, what it was given during each chunk.
        gamma: discount from a chunk to the next.
    """
    later = torch.zeros(len(given), max(map(len, given)) + 1, dtype=torch.float64)
    for i, own in enumerate(given):
        for chunk in reversed(range(len(own))):
            bonus = reward[i] - sum(own) if chunk + 1 == len(own) else 0.0
            later[i, chunk] = own[chunk] + bonus + gamma * later[i, chunk + 1]
    return later[:, :-1]


def minus_regression(value: torch.Tensor, seen: Sequence[torch.Tensor], ridge: float = 1e-5) -> torch.Tensor:
    """[N]: values minus what a ridge regression predicts from what is seen, o, and the place t of each chunk.

    The linear baseline of Duan et al. 2016 (arXiv 1604.06778), whose features in rllab are 1, o, o², t, t², t³; here
    with all products o_i o_j, and o scaled to mean 0 and deviation 1.

    Args:
        value: float64 [N], of all chunks of all episodes.
        seen: float64 [C, O] of every episode, N chunks in all.
    """
    every = torch.cat(list(seen))
    scaled = (every - every.mean(0)) / (every.std(0, correction=0) + 1e-8)
    t = torch.cat([torch.arange(len(own), dtype=torch.float64) for own in seen])[:, None]
    t = t / (t.max() + 1)
    first, second = torch.triu_indices(every.shape[1], every.shape[1])
    features = torch.cat([torch.ones_like(t), scaled, scaled[:, first] * scaled[:, second], t, t**2, t**3], dim=1)
    square = features.T @ features + ridge * torch.eye(features.shape[1], dtype=features.dtype)
    return value - features @ torch.linalg.solve(square, features.T @ value)


def group_softmax(value: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[M]: exp(value) over its mean in the group, so that weights average 1; NaN where the value is NaN."""
    return _softmax_in_groups(value, group) * torch.bincount(group[~torch.isnan(value)], minlength=len(value))[group]


def _softmax_in_groups(value: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    result = torch.full_like(value, torch.nan)
    for index in group.unique():
        members = (group == index) & ~torch.isnan(value)
        result[members] = value[members].softmax(0)
    return result


def zero_variance_groups(reward: torch.Tensor, group: torch.Tensor, steps: torch.Tensor | None = None) -> torch.Tensor:
    """bool [num_groups]: groups that have scored rewards, all equal (they carry no policy gradient).

    A group of one rollout is none of them: its recipe compares it with something else (`needs_group`).

    Args:
        steps: [M, T] rewards of every step, which must then be equal too at every step.
    """
    num_groups = int(group.max()) + 1 if len(group) else 0
    flat = torch.zeros(num_groups, dtype=torch.bool)
    flat[group[~torch.isnan(reward)]] = True
    flat &= torch.bincount(group, minlength=num_groups) > 1
    for column in (reward, *(() if steps is None else steps.T)):
        low = torch.full((num_groups,), torch.inf, dtype=reward.dtype)
        valid = ~torch.isnan(column)
        high = (-low).scatter_reduce(0, group[valid], column[valid], "amax")
        low = low.scatter_reduce(0, group[valid], column[valid], "amin")
        flat &= ~(high > low)
    return flat


def contrast_advantage(advantage: torch.Tensor, group: torch.Tensor, temperature: float) -> torch.Tensor:
    """[M]: w+ - w- = softmax(A / psi) - softmax(-A / psi) over the rollouts of a prompt.

    wd1 (Tang et al. 2025, arXiv 2507.08838): the loss is sum_k (w-_k - w+_k) log pi(o_k), so w+ - w- stands where an
    advantage does. It adds up to 0 in every group; NaN stays NaN.

    Args:
        temperature: psi; the larger, the nearer to A itself (times 2 / (psi |group|)).
    """
    scaled = advantage / temperature
    return _softmax_in_groups(scaled, group) - _softmax_in_groups(-scaled, group)


def sandwich_advantage(advantage: torch.Tensor, omega: float) -> torch.Tensor:
    """[M, 2]: what the lower and the upper bound of an answer's likelihood are multiplied by (SPG, arXiv 2510.09541).

    A >= 0 raises the lower bound; A < 0 lowers the mixture omega upper + (1 - omega) lower.
    """
    upper = torch.where(advantage < 0, omega, 0.0)
    return advantage[:, None] * torch.stack([1.0 - upper, upper], dim=1)


def step_values(reward: torch.Tensor, kind: str) -> torch.Tensor:
    """The credit of every denoising step, from the rewards of every step's x0 prediction.

    With r_i the reward of step i = 0..T-1 (MDPO, He et al. 2025, arXiv 2508.13148, in our time order):

    * "final": r_{T-1} at every step, the terminal reward alone.
    * "step": r_i.
    * "future": the mean of r_j over the later steps j > i; r_{T-1} at the last.
    * "delta": r_i - r_{i-1}, and r_0 at the first.
    * "delta_future": delta + future, the paper's.

    Args:
        reward: [M, T], NaN behind a rollout's last step; one NaN among the others makes the whole rollout NaN.
    """
    steps = torch.arange(reward.shape[1])
    # Steps in front of the last that has a reward belong to the rollout.
    last = torch.where(torch.isnan(reward), -1, steps).amax(1, keepdim=True)
    inside = steps <= last
    broken = (torch.isnan(reward) & inside).any(1) | (last[:, 0] < 0)
    value = torch.where(inside & ~broken[:, None], reward, torch.zeros_like(reward))
    final = value.gather(1, last.clamp(min=0))
    later = value.flip(1).cumsum(1).flip(1) - value
    future = torch.where(steps == last, final, later / (last - steps).clamp(min=1))
    delta = value - torch.nn.functional.pad(value, (1, 0))[:, :-1]
    choices = {
        "final": final.expand_as(value),
        "step": value,
        "future": future,
        "delta": delta,
        "delta_future": delta + future,
    }
    if kind not in choices:
        raise ValueError(f"algorithm.credit must be one of {', '.join(choices)}, got {kind!r}")
    return torch.where(inside & ~broken[:, None], choices[kind], torch.full_like(value, torch.nan))


def step_advantage(value: torch.Tensor, cell: torch.Tensor, scale: str = "std", eps: float = 1e-4) -> torch.Tensor:
    """A step's value minus the mean of its cell, the steps it is compared with.

    Args:
        value: [M, T], NaN where there is none; those take no part.
        cell: int64 [M, T]. Steps of the same group and index share a cell in MDPO; steps of the same group and
            canvas do when states are compared (DiSPO, arXiv 2602.06462).
        scale: "std" divides by the cell's sample standard deviation plus eps (MDPO), "none" by nothing.

    Returns:
        [M, T]; 0 in a cell of one step, NaN where the value is.
    """
    valid = ~torch.isnan(value)
    _, index = cell[valid].unique(return_inverse=True)
    flat = value[valid]
    zeros = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=value.dtype)
    count = zeros.index_add(0, index, torch.ones_like(flat))
    centred = flat - (zeros.index_add(0, index, flat) / count)[index]
    # The mean of equal values may be off by a rounding, which the division below would make an advantage of.
    low = zeros.scatter_reduce(0, index, flat, "amin", include_self=False)
    high = zeros.scatter_reduce(0, index, flat, "amax", include_self=False)
    centred = torch.where((low < high)[index], centred, 0.0)
    if scale == "std":
        variance = zeros.index_add(0, index, centred**2) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[index] + eps)
    elif scale != "none":
        raise ValueError(f"algorithm.scale must be std or none for per-step advantages, got {scale!r}")
    result = torch.full_like(value, torch.nan)
    result[valid] = centred
    return result


def select_steps(
    advantage: torch.Tensor,
    num_steps: int,
    how: str,
    seeds: Sequence[int],
    surprisal: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool [M, T]: up to `num_steps` steps of every rollout to train on.

    * "largest": the largest |advantage|, the earlier of equals (MDPO). It trains on extreme advantages: the mean over
      the chosen steps is no estimate of the mean over all.
    * "uniform": without replacement, each step alike; unbiased for the mean over all steps.
    * "stratified": one step from each of `num_steps` equal stretches of the trajectory; unbiased too where the
      stretches are equally long.
    * "surprisal": without replacement with probabilities softmax(surprisal) (RLDF, arXiv 2605.25638), in which hard
      steps count more; no correction is made.

    Args:
        advantage: [M, T], NaN where a step cannot be chosen.
        seeds: one per rollout; the draw of a rollout depends on its own seed only.
        surprisal: [M, T], mean -log p of what each step revealed; for "surprisal" alone.
    """
    allowed = ~torch.isnan(advantage)
    chosen = torch.zeros_like(allowed)
    for row, seed in enumerate(seeds):
        steps = allowed[row].nonzero().flatten()
        count = min(num_steps, len(steps))
        if not count:
            continue
        rng = np.random.default_rng(seed)
        if how == "largest":
            picked = advantage[row, steps].abs().argsort(descending=True, stable=True)[:count]
        elif how == "uniform":
            picked = torch.from_numpy(rng.permutation(len(steps))[:count])
        elif how == "stratified":
            edges = len(steps) * np.arange(count + 1) // count
            picked = torch.from_numpy(rng.integers(edges[:-1], edges[1:]))
        elif how == "surprisal":
            assert surprisal is not None, "selection by surprisal needs the surprisals"
            # The largest of log-weight + Gumbel noise: a draw without replacement.
            noise = torch.from_numpy(rng.gumbel(size=len(steps)))
            picked = (surprisal[row, steps] + noise).argsort(descending=True)[:count]
        else:
            raise ValueError(f"algorithm.select must be largest, uniform, stratified or surprisal, got {how!r}")
        chosen[row, steps[picked]] = True
    return chosen


def mdpo_advantage(
    verdicts: Verdicts, credit: str, compare: str, scale: str, train_steps: int, select: str, mask_weight: bool
) -> torch.Tensor:
    """[M, T]: the advantage of every step that MDPO trains, NaN at the others.

    Chosen steps of advantage 0 are left out where a rollout's choice has others; a rollout that has only such steps
    keeps them, so that it counts in the mean over rollouts. Its other steps weigh the same either way.

    Args:
        verdicts: with the rewards of all x0 predictions, and `rl.estimators.x0_rows.StepSummary`.
        compare: "index" (same step index of the group) or "canvas" (same canvas of the group).
        mask_weight: multiply by response length over masked positions of the step.
        credit, scale, train_steps, select: see `step_values`, `step_advantage`, `select_steps`.
    """
    assert verdicts.steps is not None, "MDPO needs the rewards of every x0 prediction"
    shape = verdicts.steps.shape
    masked, canvas, surprisal = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    surprisal = surprisal.double()
    for row, summary in enumerate(verdicts.summaries):
        for into, values in ((masked, summary.masked), (canvas, summary.canvas), (surprisal, summary.surprisal)):
            into[row, : len(values)] = torch.from_numpy(values)
    value = step_values(verdicts.steps, credit)
    # A failed last verdict looks like a shorter rollout; its terminal reward says that it failed.
    value[torch.isnan(verdicts.reward)] = torch.nan
    inside = canvas if compare == "canvas" else torch.arange(shape[1]).expand(shape)
    pairs = torch.stack([verdicts.group[:, None].expand(shape), inside], dim=-1).reshape(-1, 2)
    cell = torch.unique(pairs, dim=0, return_inverse=True)[1].view(shape)
    advantage = step_advantage(value, cell, scale)
    chosen = select_steps(advantage, train_steps, select, [summary.seed for summary in verdicts.summaries], surprisal)
    # After the choice: a draw among the useful steps alone would be no estimate of the mean over all.
    useful = chosen & (advantage.nan_to_num() != 0)
    chosen = torch.where(useful.any(1, keepdim=True), useful, chosen)
    if mask_weight:
        advantage = advantage * masked[:, :1] / masked.clamp(min=1)
    return torch.where(chosen, advantage, torch.nan)


def rank_advantage(value: torch.Tensor, order: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """[M, T]: at the `count` steps that come first in a rollout's order, its value minus the group's mean at this rank.

    Steps of one rank are compared across the rollouts of a prompt, whichever steps they are (EGSPO).

    Args:
        value: [M, T], NaN behind a rollout's last step; a rollout of NaN alone has no part.
        order: int64 [M, T], a permutation of the steps of each rollout; those of NaN come last.
    """
    chosen = order[:, :count]
    picked = value.gather(1, chosen)
    advantage = torch.full_like(value, torch.nan)
    for index in group.unique():
        own = group == index
        advantage[own] = advantage[own].scatter(1, chosen[own], picked[own] - picked[own].nanmean(0))
    return advantage


def best_and_worst(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[M]: 1 for the largest reward of every group, -1 for the smallest, NaN for the others and where all are equal.

    Of equal rewards the first counts. Example: rewards 0.2, 0.9, 0.2 of one group give -1, 1, NaN.
    """
    value = torch.full_like(reward, torch.nan)
    for index in range(int(group.max()) + 1 if len(group) else 0):
        inside = ((group == index) & ~torch.isnan(reward)).nonzero().flatten()
        if len(inside) and reward[inside].max() > reward[inside].min():
            value[inside[reward[inside].argmax()]] = 1.0
            value[inside[reward[inside].argmin()]] = -1.0
    return value


def extremes(value: torch.Tensor, group: torch.Tensor, high: float, low: float) -> torch.Tensor:
    """bool [M]: the largest value of every group if it is at least `high`, the smallest if it is below `low`.

    B²-DiffuRL's selection (Hu et al. 2025): 0, 1 or 2 of a group. Of equal values the first counts; NaN never does.
    """
    kept = torch.zeros(len(value), dtype=torch.bool)
    for index in range(int(group.max()) + 1 if len(group) else 0):
        inside = ((group == index) & ~torch.isnan(value)).nonzero().flatten()
        if len(inside):
            best, worst = inside[value[inside].argmax()], inside[value[inside].argmin()]
            kept[best] |= value[best] >= high
            kept[worst] |= value[worst] < low
    return kept


def node_advantage(reward: torch.Tensor, node: torch.Tensor, group: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """[M]: mean reward of the leaves of a leaf's node, z-scored over the nodes of its group (population).

    Args:
        node: int64 [M], node of every leaf at one depth of its tree; a node belongs to one group.
    """
    count = int(node.max()) + 1
    first = torch.stack([(node == index).nonzero()[0, 0] for index in range(count)])
    value = torch.stack([reward[node == index].nanmean() for index in range(count)])
    return group_advantage(value, group[first], scale="std", eps=eps)[node]
