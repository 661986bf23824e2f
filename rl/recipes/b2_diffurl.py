"""B²-DiffuRL: backward progressive training and branch-based sampling.

Hu et al. 2025, "Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse
Rewards" (arXiv 2503.11240, CVPR). The trained interval begins with the last steps of the chain and grows to all of
it; rollouts of a prompt share what comes before the interval and branch at its start, so that they differ by it.

Of every branch point the best rollout is kept if its reward's z-score (by prompt, over earlier steps too) is high
enough and the worst if it is low enough; the rest is thrown away, and counted in the reward queries.

Each part has a switch: `progressive`, `branches: 1`, `selection: all`, `compare`. The advantage of the paper compares
within a branch point; the code uses the z-score by prompt: `compare: branch` or `prompt`.

Departs from the published code: the clip is 1e-4 (there 0.1 on a mean log-prob, which never clips); a prompt's only
reward is compared with those of all prompts (there NaN), and equal rewards have z-score 0; trajectories are float32,
and steps without a density are not trained.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.images import IntervalRecipe, branch_of, on_steps


class B2DiffuRL(IntervalRecipe):
    renamed: ClassVar[dict[str, str]] = {"advantage": "compare"}

    num_steps: int = Field(20, ge=1, description="sampler.num_inference_steps, where branches are placed.")
    branches: int = Field(5, ge=1, description="Rollouts per branch point; 1 samples without branches.")
    selection: Literal["extremes", "all"] = Field(
        "extremes", description="Train the best and the worst rollout of a branch point, or all of them."
    )
    positive_threshold: float = Field(0.5, description="z-score from which the best rollout is trained.")
    negative_threshold: float = Field(-0.5, description="z-score below which the worst rollout is trained.")
    compare: Literal["prompt", "branch"] = Field(
        "prompt", description="z-score by prompt (published code), or reward minus the branch point's mean (paper)."
    )

    @model_validator(mode="after")
    def _extremes_of_branches(self) -> B2DiffuRL:
        if self.branches == 1 and (self.selection == "extremes" or self.compare == "branch"):
            raise ValueError(
                "algorithm.branches 1 leaves nothing to compare: set algorithm.selection=all and compare=prompt"
            )
        return self

    def check(self, config: Config) -> None:
        steps, group = config.sampler.num_inference_steps, config.train.group_size
        if steps != self.num_steps:
            raise ValueError(f"algorithm.num_steps must be sampler.num_inference_steps ({steps})")
        if group % self.branches:
            raise ValueError(f"train.group_size ({group}) must be a multiple of algorithm.branches")

    def branch_points(self, rl_step: int) -> list[tuple[int, int]]:
        return [(self.first_step(rl_step, self.num_steps), self.branches)] if self.branches > 1 else []

    def advantage(self, verdicts: Verdicts) -> Tensor:
        from rl.advantages import extremes, group_advantage

        first = self.first_step(verdicts.rl_step, self.num_steps)
        value = z = verdicts.memory.z_scores(verdicts.reward, [n.prompt for n in verdicts.summaries])
        point = branch_of(verdicts, first)
        if self.compare == "branch":
            value = group_advantage(verdicts.reward, point, scale="std", eps=0.1)
        if self.selection == "extremes":
            kept = extremes(z, point, self.positive_threshold, self.negative_threshold)
            value = value.masked_fill(~kept, float("nan"))
        return self.clamped(on_steps(value, verdicts, first))
