"""The rollouts of an RL step, cut into updates and micro-batches that are ready to be scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rl import distributed
from rl.batch import DecisionBatch
from rl.estimators.base import Rows, Scores
from rl.losses.aggregate import decision_weights
from rl.recipes.base import Recipe, ValueOptions
from rl.train.contract import checked_rows
from rl.train.learner import TrainingError
from rl.train.rollouts import ScoredRollouts
from rl.train.run import Run
from rl.values.targets import outcome_rewards, step_targets
from rollouts.trajectory import TokenTrajectory


@dataclass
class MicroBatch:
    """Some trajectories of an update; U decisions, flat.

    Attributes:
        rows: the decisions; they score themselves.
        weight: float64 [U], share of each decision in the loss of the update (`rl/losses/aggregate.py`).
        advantage: float64 [U].
        reward: float64 [U], what each decision was given at its step, for a critic; its trajectory's, for a recipe that
            needs it; else None.
        old_logprob: float64 [U] under the weights before the first update; None where the ratio needs none.
        ref_logprob: float64 [U] under the frozen reference; None without one.
        old_value, returns: float64 [U] of the critic before the first update; None without a critic.
        spare: it fills up a rank that has fewer micro-batches than the others; its loss counts 0 times.
    """

    rows: Rows
    weight: torch.Tensor
    advantage: torch.Tensor
    reward: torch.Tensor | None = None
    old_logprob: torch.Tensor | None = None
    ref_logprob: torch.Tensor | None = None
    old_value: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    spare: bool = False

    def set_value(self, value: torch.Tensor, options: ValueOptions) -> None:
        """Take over the critic's values [U] before the first update: returns, and GAE in place of the advantage."""
        assert self.reward is not None
        self.old_value = value.double()
        self.returns, self.advantage = step_targets(
            self.reward, self.old_value, self.rows.trajectory, self.rows.step, options.gamma, options.lam
        )

    def correct_lag(self, most: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weigh every decision by how much likelier the policy makes it than the older one that sampled it.

        The weight min(exp(logprob before the first update - the sampler's), most) multiplies the advantage, and so the
        policy term, as a constant: truncated importance sampling beside the clipped ratio of the updates (decoupled
        PPO, Hilton et al. 2021, arXiv 2110.00641).

        Returns:
            the weights [U], and bool [U], those that were truncated.
        """
        assert self.old_logprob is not None and self.rows.sampler_logprob is not None
        log_ratio = self.old_logprob - self.rows.sampler_logprob.to(self.old_logprob.dtype)
        weight = log_ratio.clamp(max=math.log(most)).exp()
        self.advantage = self.advantage * weight
        return weight, log_ratio > math.log(most)

    def decisions(self, scores: Scores, old_logprob: str) -> DecisionBatch:
        """What the loss sees.

        Args:
            scores: of the rows under today's weights.
            old_logprob: option of the recipe, where the ratio's denominator comes from.
        """
        logprob = scores.logprob
        choices = {
            "sampler": self.rows.sampler_logprob,
            "recompute": self.old_logprob,
            "on_policy": logprob.detach(),
        }
        old = choices[old_logprob]
        assert old is not None, f"an estimator of old_logprob {old_logprob} must give it"
        decisions = DecisionBatch(
            logprob=logprob,
            entropy=scores.entropy,
            old_logprob=old.to(logprob.dtype),
            ref_logprob=None if self.ref_logprob is None else self.ref_logprob.to(logprob.dtype),
            advantage=self.advantage.to(logprob.dtype),
            weight=self.weight,
            trajectory=self.rows.trajectory,
            step=self.rows.step,
            kl=scores.kl,
            negative=scores.negative,
            reward=self.reward,
        )
        decisions.check()
        return decisions


class Cutter:
    """Cuts the rollouts of RL steps by a recipe. M rollouts of this rank, T denoising steps.

    Attributes:
        block_length: of training, in a block-size curriculum; None scores every trajectory on its own grid.
    """

    def __init__(self, run: Run, recipe: Recipe):
        self.run, self.recipe, self.train = run, recipe, run.config.train
        self.has_critic = recipe.critic() is not None
        self.block_length: int | None = None

    def rows(self, trajectories: Sequence[Any], steps: Any = None, iteration: int = 0) -> Rows:
        """The estimator's distinct rows; see `Recipe.rows`."""
        rows = self.recipe.rows(trajectories, self.run.model, self.block_length, steps, iteration)
        return checked_rows(self.recipe, rows).distinct()

    def passes(self, rollouts: ScoredRollouts, advantage: torch.Tensor) -> list[list[list[MicroBatch]]]:
        """Micro-batches of every update of every pass over the rollouts.

        One pass serves all epochs, unless the recipe's estimator is random.

        Args:
            advantage: [M] or [M, T], NaN where there is nothing to learn.
        """
        size, steps = self.train.micro_batch_size, self.train.micro_batch_steps
        if any(given is not None for given in rollouts.process_rewards) and not self.has_critic:
            raise TrainingError("a reward gives per-step values, which need a value model: set algorithm.value")
        if steps is not None and advantage.dim() == 1:
            raise ValueError("train.micro_batch_steps needs a recipe with an advantage for every step: set it to null")
        updates, passes = self._updates(rollouts, ~torch.isnan(advantage)), []
        for iteration in range(self.train.epochs if self.recipe.redraw else 1):
            cut: list[list[MicroBatch]] = []
            for chosen, weight in updates:
                parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
                windows = [(part, own) for part in parts for own in _windows(advantage[part], steps)]
                cut.append([self.micro_batch(rollouts, part, own, weight[part], iteration) for part, own in windows])
            passes.append(cut)
        return passes

    def _updates(self, rollouts: ScoredRollouts, wanted: torch.Tensor) -> list[tuple[list[int], torch.Tensor]]:
        """Of every update, the rollouts to learn from and the weights [M] of one decision of each.

        Prompts are split over the updates, never a prompt's group. Weights count the trajectories of the update
        over all ranks, with those that are left out because their rewards are all equal (`ScoredRollouts.counted`).

        Args:
            wanted: bool [M] or [M, T], where there is something to learn.
        """
        of_steps, device = wanted.dim() == 2, self.run.device
        valid = rollouts.counted & (wanted.any(dim=1) if of_steps else wanted)
        used = valid & rollouts.keep
        pairs = zip(rollouts.trajectories, wanted, strict=True)
        length = torch.tensor([self.recipe.num_decisions(t, w.numpy() if of_steps else None) for t, w in pairs])
        updates = []
        for index in range(self.train.updates_per_step):
            # Every rank holds a multiple of updates_per_step prompts, so a prompt's update is the same on any
            # number of ranks.
            inside = rollouts.group % self.train.updates_per_step == index
            counted = inside & valid
            decisions = distributed.reduce_number(float(length[counted].sum()), "sum", device)
            trajectories = distributed.reduce_number(float(counted.sum()), "sum", device)
            weight = decision_weights(
                self.recipe.aggregation, length, max(decisions, 1.0), max(trajectories, 1.0), self.run.modality.horizon
            )
            updates.append(((inside & used).nonzero().flatten().tolist(), weight))
        return updates

    def micro_batch(
        self,
        rollouts: ScoredRollouts,
        indices: list[int],
        advantage: torch.Tensor,
        weight: torch.Tensor,
        iteration: int = 0,
    ) -> MicroBatch:
        """Advantage [B] or [B, T] and weight [B] of the B rollouts given, spread over their decisions."""
        trajectories = [rollouts.trajectories[i] for i in indices]
        steps = None if advantage.dim() == 1 else [row.numpy() for row in ~torch.isnan(advantage)]
        rows = self.rows(trajectories, steps, iteration)
        owner, step = rows.trajectory, rows.step
        of_decision = advantage[owner] if advantage.dim() == 1 else advantage[owner, step]
        weight = weight[owner].double()
        if rows.weight_factor is not None:
            weight = weight * rows.weight_factor
        device, reward = self.run.device, None
        if self.has_critic:
            per_step = [rollouts.process_rewards[i] if rollouts.process_rewards else None for i in indices]
            if any(given is not None for given in per_step):
                reward = torch.from_numpy(_rewards_of_steps(trajectories, per_step))
            else:
                reward = outcome_rewards(self.recipe.outcome(advantage, rollouts.reward[indices]), owner, step)
            reward = reward.to(device, torch.float64)
        elif self.recipe.needs_reward:
            reward = rollouts.reward[indices][owner].to(device, torch.float64)
        return MicroBatch(rows.to(device), weight.to(device), of_decision.to(device, torch.float64), reward)

    def spare(self, rollouts: ScoredRollouts) -> MicroBatch:
        """Something to run on a rank that has less to learn from than the others."""
        nothing = torch.zeros(1, dtype=torch.float64)
        if not rollouts.trajectories:
            smallest = self.run.modality.smallest_trajectory(self.run.model)
            rollouts = replace(rollouts, trajectories=[smallest], reward=nothing, process_rewards=[])
        batch = self.micro_batch(rollouts, [0], nothing, nothing)
        zeros = torch.zeros_like(batch.weight)
        return replace(batch, old_logprob=zeros, ref_logprob=zeros, old_value=zeros, returns=zeros, spare=True)


def _windows(advantage: torch.Tensor, steps: int | None) -> list[torch.Tensor]:
    """The advantages [B] or [B, T] cut along T, NaN outside of each part; parts without a trained step are left out."""
    if steps is None:
        return [advantage]
    parts = []
    for start in range(0, advantage.shape[1], steps):
        part = torch.full_like(advantage, torch.nan)
        part[:, start : start + steps] = advantage[:, start : start + steps]
        parts += [] if part.isnan().all() else [part]
    return parts


def _rewards_of_steps(trajectories: list[TokenTrajectory], per_step: list[list[float] | None]) -> np.ndarray:
    """float64 [U]: the reward of each token's denoising step.

    Raises:
        TrainingError: a reward judged another number of steps than the trajectory has.
    """
    parts = []
    for trajectory, steps in zip(trajectories, per_step, strict=True):
        if steps is None or len(steps) != trajectory.num_steps:
            raise TrainingError(
                f"a process reward gave {0 if steps is None else len(steps)} step values for a trajectory of "
                f"{trajectory.num_steps} steps"
            )
        parts.append(np.asarray(steps, dtype=np.float64)[trajectory.step[trajectory.is_reveal]])
    return np.concatenate(parts)
