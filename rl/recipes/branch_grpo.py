"""BranchGRPO: rollouts that branch several times, with an advantage of their own at every depth.

Li et al. 2025, "BranchGRPO" (arXiv 2509.06040): the value of a node is the mean reward of its leaves, and the steps
below a split are credited with the node's value, z-scored over all nodes of that depth.

Departs from the published code: branches draw ordinary noise (it multiplies it by 4 and keeps the density of 1), and
nodes are compared within their prompt; no pruning.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from pydantic import Field

from rl.recipes.image_options import ImageRecipeOptions, branch_of, on_steps
from rl.recipes.options import Recipe

if TYPE_CHECKING:
    import torch

    from rl.estimators.base import Verdicts


class BranchGrpoOptions(ImageRecipeOptions):
    name: str = Field("branch_grpo", description="Recipe name.")
    splits: list[int] = Field([0, 3, 6, 9], description="Steps before which every rollout branches in two, ascending.")

    def check_sampler(self, num_inference_steps: int, group_size: int) -> None:
        if group_size % 2 ** len(self.splits):
            raise ValueError(
                f"train.group_size ({group_size}) must be a multiple of the {2 ** len(self.splits)} leaves of a tree"
            )

    def build(self) -> Recipe:
        from rl.advantages import node_advantage

        def advantage(verdicts: Verdicts) -> torch.Tensor:
            per_step = on_steps(verdicts.reward, verdicts)
            # What a split decided shows in the noise of its own step: nodes are told apart one latent later.
            bounds = [*self.splits, per_step.shape[1]]
            for first, last in itertools.pairwise(bounds):
                node = branch_of(verdicts, first + 1)
                value = node_advantage(verdicts.reward, node, verdicts.group)
                per_step[:, first:last] = per_step[:, first:last].where(per_step[:, first:last].isnan(), value[:, None])
            per_step[:, : self.splits[0]] = float("nan")
            return per_step

        return self.image_recipe(advantage, lambda rl_step: [(step, 2) for step in self.splits])
