"""BranchGRPO: rollouts that branch several times, with an advantage of their own at every depth.

Li et al. 2025, "BranchGRPO" (arXiv 2509.06040): the value of a node is the mean reward of its leaves, and the steps
below a branch point are credited with the node's value, z-scored over all nodes of that depth.

Departs from the published code: branches draw ordinary noise (it multiplies it by 4 and keeps the density of 1); nodes
are compared within their prompt; the clip is 1e-4 (there 1e-3); a node's value is always the plain mean (there weighted
by the children's likelihood, as an option); no pruning.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

from pydantic import Field

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.images import ImageRecipe, branch_of, on_steps


class BranchGRPO(ImageRecipe):
    renamed: ClassVar[dict[str, str]] = {"splits": "branch_steps"}

    branch_steps: list[int] = Field(
        [0, 3, 6, 9], min_length=1, description="Steps before which every rollout branches in two, ascending."
    )

    def check(self, config: Config) -> None:
        if self.branch_steps != sorted(set(self.branch_steps)):
            raise ValueError(f"algorithm.branch_steps {self.branch_steps} must ascend")
        leaves = 2 ** len(self.branch_steps)
        if config.train.group_size % leaves:
            raise ValueError(
                f"train.group_size ({config.train.group_size}) must be a multiple of the {leaves} leaves of a tree"
            )

    def branch_points(self, rl_step: int) -> list[tuple[int, int]]:
        return [(step, 2) for step in self.branch_steps]

    def advantage(self, verdicts: Verdicts) -> Tensor:
        from rl.advantages import node_advantage

        per_step = on_steps(verdicts.reward, verdicts)
        # A branch point shows in the noise of its own step: nodes are told apart one latent later.
        for first, last in itertools.pairwise([*self.branch_steps, per_step.shape[1]]):
            value = node_advantage(verdicts.reward, branch_of(verdicts, first + 1), verdicts.group)
            per_step[:, first:last] = per_step[:, first:last].where(per_step[:, first:last].isnan(), value[:, None])
        per_step[:, : self.branch_steps[0]] = float("nan")
        return self.clamped(per_step)
