"""Flow-GRPO: group-relative advantages on the SDE of a flow-matching model.

Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL" (arXiv 2505.05470): sampler `flow_sde`,
reward minus the group's mean over the standard deviation of all rewards of the step, KL to the starting policy.

`shared_noise` starts all rollouts of a prompt from one initial noise, which is the one thing taken over from DanceGRPO
(Xue et al. 2025, arXiv 2505.07818); its z-score by group is `scale: std`, its constant noise and its random 60 % of the
steps are not built.

The sampler may also be `flow_cps`; `sampler.sde_window` keeps noise and gradient to some steps (Flow-GRPO-Fast).

Departs from the published code: the KL between two steps is the exact one, whose variance includes the step length that
the code leaves out; every step that has a density is trained (there the first 99 %: of ten steps, nine).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.images import ImageRecipe, on_steps


class FlowGRPO(ImageRecipe, defaults={"scale": "reward_std", "kl_to": "reference", "kl_coef": 0.04}):
    shared_noise: int = Field(
        1,
        ge=1,
        description="Rollouts that start from one initial noise; train.group_size: all of a prompt, as in DanceGRPO.",
    )

    def requires(self, config: Config) -> dict[str, Any]:
        return {} if config.sampler.kind == "flow_cps" else {"sampler.kind": "flow_sde"}

    def branch_points(self, rl_step: int) -> list[tuple[int, int]]:
        return [(0, self.shared_noise)] if self.shared_noise > 1 else []

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return on_steps(super().advantage(verdicts), verdicts)
