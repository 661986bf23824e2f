"""dFlowGRPO: PPO on the jumps of a discrete flow, whose log-probs know the rates.

Wan et al. 2026, "dFlowGRPO: Rate-Aware Policy Optimization for Discrete Flow Models" (arXiv 2605.09291), by its
abstract and its code (`sampling.py`, `training_grpo.py`, `train_args.py`). A step of length h draws a clean token x1 of
each position from the posterior p1 and jumps to y at the conditional rate Q(x, y | x1), with sum lambda over y, so

    p(y | x) = sum over x1 of p1(x1 | x) (1[x != y] Q / lambda (1 - exp(-h lambda)) + 1[x = y] exp(-h lambda)),

and the last step takes x1. A step is one decision: its ratio is exp of the mean log-ratio over the positions.

Here the path is the mixture of uniform noise and data, whose rate goes to x1 alone, at 1 / (1 - t): the sum over x1 is
exact and has the closed form of `rollouts/samplers/uniform.py` (`sampler.transition: euler`). On the same rollouts
`tracerl` has a decision for every position of every step: without clips, and with `last_step` here, its decisions add
up to the same gradient, times the number of positions.

Choices (published): clip 1e-3 below and 1.5e-3 above, rewards minus the group's mean over the standard deviation of all
rewards (`--global_std` of its script), all steps alike but the last, which is not trained, no KL.

Departs: the paper's model has a metric path and estimates the sum by 24 draws. Not built: changed positions alone, a
clip for each position, rewards of single steps, windows of steps (options of the code, off by default).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rl.config import Config
from rl.recipes.base import Recipe


class DFlowGRPO(Recipe, defaults={"scale": "reward_std", "clip_low": 1e-3, "clip_high": 1.5e-3}):
    noises = ("uniform",)

    last_step: bool = Field(False, description="Train the last step too, which draws every token from the prediction.")

    def requires(self, config: Config) -> dict[str, Any]:
        return {"sampler.transition": "euler"}

    def check(self, config: Config) -> None:
        steps = [config.sampler.num_inference_steps, *config.train.mixed_steps]
        if min(steps) == 1 and not self.last_step:
            raise ValueError("a rollout of one step has only the last: set algorithm.last_step, or more steps")

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        import torch

        from rl.estimators.combine import step_means
        from rl.estimators.trace_rows import trace_rows

        rows = trace_rows(trajectories, model)
        if not self.last_step:
            count = torch.tensor([t.num_steps for t in trajectories])[rows.trajectory]
            rows = rows.some(rows.step < count - 1)
        return step_means(rows)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return int(trajectory.num_steps) - (not self.last_step)
