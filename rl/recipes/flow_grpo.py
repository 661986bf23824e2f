"""Flow-GRPO: group-relative advantages on the SDE of a flow-matching model.

Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL" (arXiv 2505.05470): sampler `flow_sde`,
reward minus the group's mean over the standard deviation of the whole batch, KL to the starting policy.

`shared_noise` starts all rollouts of a prompt from one initial noise, as DanceGRPO does (Xue et al. 2025, arXiv
2505.07818). Departs from the published code: the KL between two steps is the exact one, whose variance includes the
step length that the code leaves out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rl.recipes.image_options import ImageRecipeOptions, on_steps
from rl.recipes.options import Recipe

if TYPE_CHECKING:
    import torch

    from rl.config import Config
    from rl.estimators.base import Verdicts


class FlowGrpoOptions(ImageRecipeOptions):
    name: str = Field("flow_grpo", description="Recipe name.")
    scale: Literal["none", "std", "batch_std"] = Field("batch_std", description="What advantages are divided by.")
    kl_to: Literal["none", "old", "reference"] = Field("reference", description="What the KL term holds to.")
    kl_coef: float = Field(0.04, ge=0, description="Weight of the KL term.")
    shared_noise: int = Field(
        1, ge=1, description="Rollouts that start from one initial noise; train.group_size is DanceGRPO."
    )

    def requires(self, config: Config) -> dict[str, Any]:
        return {"sampler.kind": "flow_sde"}

    def build(self) -> Recipe:
        group = self.group_advantage()

        def advantage(verdicts: Verdicts) -> torch.Tensor:
            return on_steps(group(verdicts), verdicts)

        splits = (lambda rl_step: [(0, self.shared_noise)]) if self.shared_noise > 1 else None
        return self.image_recipe(advantage, splits)
